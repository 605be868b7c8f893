"""Gradient (activation) checkpointing of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from diffsynth.core.attention.select import chosen_backend, restored_choice


def gradient_checkpoint_forward(
    model: Callable[..., Any],
    use_gradient_checkpointing: bool,
    use_gradient_checkpointing_offload: bool = False,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call `model(*args, **kwargs)` and return its result; if an option is set and gradients are recorded, the backward
    pass computes the activations again.

    Without gradient recording, or if neither option is set, this is a plain call.

    Args:
        model: a module or function.
        use_gradient_checkpointing: whether to store only the inputs.
        use_gradient_checkpointing_offload: whether to store the inputs in host memory; implies checkpointing.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model; they are passed on as keyword arguments.
    """
    wanted = use_gradient_checkpointing or use_gradient_checkpointing_offload
    if not wanted or not torch.is_grad_enabled():
        return model(*args, **kwargs)

    # torch's checkpoint has keyword arguments of its own, and offloads only tensors that are positional.
    def call(*values: Any) -> Any:
        return model(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    # The second forward may run in another thread, and after a `use_attention` context has ended.
    again = {} if chosen_backend() is None else {"context_fn": lambda: (nullcontext(), restored_choice())}
    with save_on_cpu() if use_gradient_checkpointing_offload else nullcontext():
        return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, **again)
