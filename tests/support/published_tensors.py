"""Tensors under published names, through recognition and the published rules, to modules of ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled
from diffsynth.core.loader.recognize import recognize


def load_published(tensors: Mapping[str, Tensor], *, expect: str) -> nn.Module:
    """In fp32, by structure alone; `expect` names the checkpoint that it must be taken for."""
    ((name, module),) = load_components(tensors).items()
    assert name == expect
    return module


def load_components(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Checkpoint -> module, for each component of one file; no key may be left over."""
    header = pickled.of_state_dict({key: tensor.detach().contiguous() for key, tensor in tensors.items()})
    found = recognize(header, *_discovery.catalog().layouts(), tiers=("structure",))
    assert [one.extra for one in found] == [()] * len(found)
    return {
        one.checkpoint.name: component.load_component(one, header, device="cpu", dtype=torch.float32) for one in found
    }
