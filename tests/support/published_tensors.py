"""Tensors under published names, through recognition and the published rules, to a module of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import load, pickled
from diffsynth.core.loader.recognize import recognize


def load_published(tensors: Mapping[str, Tensor], *, expect: str) -> nn.Module:
    """In fp32, by structure alone; `expect` names the checkpoint that it must be taken for."""
    header = pickled.of_state_dict({key: tensor.detach().contiguous() for key, tensor in tensors.items()})
    (found,) = recognize(header, *_discovery.catalog().layouts(), tiers=("structure",))
    assert (found.checkpoint.name, found.extra) == (expect, ())
    return load.load_component(found, header, device="cpu", dtype=torch.float32)
