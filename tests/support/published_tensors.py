"""Load tensors under published names as our modules, through recognition and the key rules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled
from diffsynth.core.loader.recognize import recognize


def load_published(tensors: Mapping[str, Tensor], *, expect: str) -> nn.Module:
    """Return the fp32 module of one checkpoint, recognised by structure alone.

    Args:
        tensors: published key -> tensor.
        expect: name of the checkpoint that must be recognised.
    """
    ((name, module),) = load_components(tensors).items()
    assert name == expect
    return module


def load_components(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return checkpoint name -> fp32 module for each component of one file; unused keys fail."""
    header = pickled.of_state_dict({key: tensor.detach().contiguous() for key, tensor in tensors.items()})
    found = recognize(header, *_discovery.catalog().layouts(), tiers=("structure",))
    assert [one.extra for one in found] == [()] * len(found)
    return {
        one.checkpoint.name: component.load_component(one, header, device="cpu", dtype=torch.float32) for one in found
    }
