"""diffusers' schedulers in flow-matching form, by the names of our solvers, at noise levels that a test gives."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

MULTISTEP = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "final_sigmas_type": "zero",
}
"""With these (and `lower_order_final`, a default) the last step is of order 1, as ours."""


def flow_scheduler(solver: str) -> Any:
    """Return a new scheduler that takes the steps of our solver of that name."""
    match solver:
        case "euler":
            return diffusers.FlowMatchEulerDiscreteScheduler()
        case "heun":
            return diffusers.FlowMatchHeunDiscreteScheduler()
        case "dpmpp_2m":
            return diffusers.DPMSolverMultistepScheduler(
                **MULTISTEP, algorithm_type="dpmsolver++", solver_type="midpoint"
            )
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**MULTISTEP, solver_type="bh2", lower_order_final=True)
    raise ValueError(f"no scheduler of flow matching for {solver!r}")


def set_levels(scheduler: Any, sigmas: torch.Tensor) -> None:
    """Have a scheduler take the steps between our noise levels, and reset its state.

    Heun's lists each level between the first and the last twice, and evaluates at each entry but the last. Timesteps
    are not rounded, as some schedulers would.
    """
    type(scheduler).set_timesteps(scheduler, len(sigmas) - 1)
    if scheduler.order == 2:
        sigmas = torch.cat((sigmas[:1], sigmas[1:-1].repeat_interleave(2), sigmas[-1:]))
    scheduler.sigmas, scheduler.timesteps = sigmas, 1000 * sigmas[:-1]
    scheduler.set_begin_index(0)
