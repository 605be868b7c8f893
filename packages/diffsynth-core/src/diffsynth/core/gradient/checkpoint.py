"""Activation checkpointing as a function of a module and its arguments."""

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
    """`model(*args, **kwargs)`; in the backward pass its activations are computed again rather than kept.

    Nothing changes where no gradient is recorded.

    Args:
        model: a module or function.
        use_gradient_checkpointing: keep the inputs alone.
        use_gradient_checkpointing_offload: keep them in host memory; implies checkpointing.
        args, kwargs: what the model is called with; keyword arguments stay keyword arguments.
    """
    wanted = use_gradient_checkpointing or use_gradient_checkpointing_offload
    if not wanted or not torch.is_grad_enabled():
        return model(*args, **kwargs)

    # torch's checkpoint has keyword arguments of its own, and offloads positional tensors alone.
    def call(*values: Any) -> Any:
        return model(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

    # The second forward runs when the choice of an attention backend may have ended, and perhaps in another thread.
    again = {} if chosen_backend() is None else {"context_fn": lambda: (nullcontext(), restored_choice())}
    with save_on_cpu() if use_gradient_checkpointing_offload else nullcontext():
        return checkpoint(call, *args, *kwargs.values(), use_reentrant=False, **again)
