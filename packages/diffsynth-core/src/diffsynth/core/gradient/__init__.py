"""Gradient checkpointing: less memory in the backward pass for more computation."""

from __future__ import annotations

from diffsynth.core.gradient.checkpoint import gradient_checkpoint_forward

__all__ = ["gradient_checkpoint_forward"]
