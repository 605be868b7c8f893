"""Checkpoints of a training run: safetensors weights, and the state from which a run is resumed bit-exactly."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core import device as devices
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.errors import TrainingError
from diffsynth_train.components import Component

logger = logging.getLogger(__name__)

STATE = "state.pt"


def save_weights(
    folder: Path, components: Iterable[Component], *, dtype: torch.dtype, step: int, notes: Mapping[str, str]
) -> list[Path]:
    """Write `folder/<role>.safetensors` (role: name of a component) for each trained component, with its config as
    metadata, and return a list of the files' paths.

    Args:
        folder: output folder; created if missing.
        components: all components; those that are not trained are skipped.
        dtype: dtype of matrices in the file.
        step: number of steps done.
        notes: further metadata.

    Returns:
        the paths of the files.
    """
    paths = []
    for component in components:
        if not component.trained:
            continue
        path = folder / f"{component.role}.safetensors"
        save_checkpoint(
            component.module,
            path,
            architecture=component.architecture.name,
            config=component.config,
            metadata={**notes, "diffsynth.step": str(step)},
            dtype=dtype,
            base=component.base,
        )
        _discovery.notify("adapter_saved", path=path, step=step)
        paths.append(path)
    return paths


def save_state(
    folder: Path,
    *,
    step: int,
    seed: int,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
    device: torch.device,
) -> None:
    """Write `folder/state.pt` with what the next step depends on: `parameters`, the optimizer's state, the weight
    average, random states, step and seed.

    The position in the data and the learning rate follow from the step number and the seed.
    """
    state = {
        "step": step,
        "seed": seed,
        "parameters": {name: parameter.detach() for name, parameter in parameters},
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else dict(ema),
        "random": torch.get_rng_state(),
        "device_type": device.type,
        "random_device": None if device.type == "cpu" else devices.random_state(device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATE}.partial"
    torch.save(state, partial)
    partial.replace(folder / STATE)


def load_state(
    folder: Path,
    *,
    seed: int,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[int, dict[str, Tensor] | None]:
    """Restore `parameters`, `optimizer` and the random state from a checkpoint folder, and return (steps done, averaged
    weights as a dict name -> tensor, or None if they were not averaged).

    Raises:
        TrainingError: the folder holds no state, or one with another seed or other parameters.
    """
    path = folder / STATE
    if not path.is_file():
        raise TrainingError(f"{folder} holds no {STATE}; pass the folder of a checkpoint, or --resume last")
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["seed"] != seed:
        raise TrainingError(
            f"{path} was trained with seed {state['seed']}, the recipe has {seed}: the order of samples would differ"
        )
    named = dict(parameters)
    if differing := sorted(set(named) ^ set(state["parameters"])):
        raise TrainingError(f"{path} and the recipe train different parameters; first difference: {differing[0]!r}")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"].cpu())
    # The state of another device type cannot be restored, and results would differ there anyway.
    if state["random_device"] is not None and state.get("device_type", device.type) == device.type:
        devices.set_random_state(state["random_device"], device)
    return state["step"], state["ema"]


def step_folder(root: Path, step: int) -> Path:
    """Return the path `root/step-NNNNNNN` of the checkpoint after `step` steps, whether or not it exists."""
    return root / f"step-{step:07d}"


def last_checkpoint(root: Path) -> Path:
    """Return the path of the newest checkpoint in `root`: the folder `step-NNNNNNN` with the highest number that holds
    a `state.pt`; raise TrainingError if there is none.

    Raises:
        TrainingError: there is no checkpoint.
    """
    found = sorted(path.parent for path in root.glob(f"step-*/{STATE}"))
    if not found:
        raise TrainingError(f"{root} holds no checkpoint to resume from")
    return found[-1]


def drop_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoint folders (`step-NNNNNNN` with a `state.pt`) in `root`; delete none if
    `keep` is 0.
    """
    found = sorted(path.parent for path in root.glob(f"step-*/{STATE}"))
    for folder in found[:-keep] if keep else []:
        logger.info("deleting %s", folder)
        shutil.rmtree(folder)
