"""Published layouts of Qwen-Image are recognised by signature and structure, with their configs, and load strictly."""

from __future__ import annotations

import pytest
import torch

from diffsynth import _discovery
from diffsynth.core.loader import component, recognize
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.layouts import layout_of
from diffsynth_qwen_image.checkpoints import CHECKPOINTS
from diffsynth_qwen_image.config import QwenImageDiTConfig

CONFIGS = {
    "qwen_image_dit": QwenImageDiTConfig(),
    "qwen_image_dit/layered": QwenImageDiTConfig(layered=True),
}
WITH_LAYOUT = {spec.name: spec for spec in CHECKPOINTS if spec.layout}


def head(tensors: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorInfo("BF16", tuple(shape)) for name, shape in tensors.items()})


def recognized(file: Header, *tiers: str) -> list[recognize.Recognized]:
    return recognize.recognize(file, *_discovery.catalog().layouts(), tiers=tiers)


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_a_published_layout_is_recognised_and_loaded(name: str, tier: str) -> None:
    file = head(layout_of(WITH_LAYOUT[name]))
    (found,) = recognized(file, tier)
    assert (found.checkpoint.name if tier == "signature" else name, found.config) == (name, CONFIGS[name])
    assert found.extra == ()
    module = component.load_component(found, file, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_every_layout_has_its_config_here() -> None:
    assert set(CONFIGS) == set(WITH_LAYOUT)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "pipe.dit.", "transformer."])
def test_a_prefix_changes_nothing(prefix: str) -> None:
    plain = layout_of(WITH_LAYOUT["qwen_image_dit"])
    (found,) = recognized(head({f"{prefix}{name}": shape for name, shape in plain.items()}), "structure")
    assert (found.config, found.prefix) == (QwenImageDiTConfig(), prefix)
