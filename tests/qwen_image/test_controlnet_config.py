"""ControlNet files are recognised by signature and by structure, with their configs, and load strictly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component, recognize
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.layouts import layout_of
from diffsynth_qwen_image.blockwise_controlnet import BlockwiseControlNet
from diffsynth_qwen_image.controlnet import QwenImageControlNet
from diffsynth_qwen_image.controlnet_config import (
    CHECKPOINTS,
    TINY_BLOCKWISE,
    TINY_CONTROLNET,
    BlockwiseControlNetConfig,
    QwenImageControlNetConfig,
    infer_blockwise_config,
    infer_controlnet_config,
)

BLOCKWISE, INPAINT = BlockwiseControlNetConfig(), BlockwiseControlNetConfig(additional_in_dim=4)
CONFIGS = {"qwen_image_blockwise_controlnet": BLOCKWISE, "qwen_image_blockwise_controlnet/inpaint": INPAINT}
WITH_LAYOUT = {spec.name: spec for spec in CHECKPOINTS if spec.layout}


def head(tensors: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorInfo("BF16", tuple(shape)) for name, shape in tensors.items()})


def shapes_of(network: type, config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return parity.shapes_of(network(config))


def recognized(file: Header, *tiers: str) -> list[recognize.Recognized]:
    return recognize.recognize(file, *_discovery.catalog().layouts(), tiers=tiers)


def test_every_layout_has_its_config_here() -> None:
    assert set(CONFIGS) == set(WITH_LAYOUT)


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_a_published_layout_is_recognised_and_loaded(name: str, tier: str) -> None:
    shapes = layout_of(WITH_LAYOUT[name])
    assert shapes_of(BlockwiseControlNet, CONFIGS[name]) == {key: tuple(shape) for key, shape in shapes.items()}
    file = head(shapes)
    (found,) = recognized(file, tier)
    assert (found.checkpoint.name if tier == "signature" else name, found.config) == (name, CONFIGS[name])
    assert found.extra == ()
    module = component.load_component(found, file, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize(
    ("network", "config"),
    [
        (QwenImageControlNet, QwenImageControlNetConfig()),
        (QwenImageControlNet, QwenImageControlNetConfig(n_layers=6, control_channels=17)),
        (QwenImageControlNet, TINY_CONTROLNET),
        (BlockwiseControlNet, replace(TINY_BLOCKWISE, additional_in_dim=4)),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_is_recognised_by_structure(network, config, prefix: str) -> None:
    """The files of InstantX have the names of diffusers, to which ours are equal; see `test_controlnet`."""
    file = head({f"{prefix}{name}": shape for name, shape in shapes_of(network, config).items()})
    (found,) = recognized(file, "structure")
    assert (found.config, found.prefix, found.extra) == (config, prefix, ())
    component.load_component(found, file, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("infer", "network", "config", "changes", "message"),
    [
        (
            infer_controlnet_config,
            QwenImageControlNet,
            TINY_CONTROLNET,
            {"controlnet_x_embedder.weight": (64, 72)},
            "control latents of 18 channels: expected those of the latents, 16, or with a mask 17",
        ),
        (
            infer_controlnet_config,
            QwenImageControlNet,
            TINY_CONTROLNET,
            {"controlnet_x_embedder.weight": (64, 66)},
            "control tokens of 66 values",
        ),
        (
            infer_blockwise_config,
            BlockwiseControlNet,
            TINY_BLOCKWISE,
            {"img_in.weight": (64, 60)},
            "additional_in_dim=-4: expected 0, or 4 for a mask",
        ),
    ],
)
def test_files_of_no_controlnet_are_refused(infer, network, config, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        infer(shapes_of(network, config) | changes)


def test_a_controlnet_of_a_layered_transformer_is_refused() -> None:
    with pytest.raises(ValueError, match="layered=True: a ControlNet of a layered transformer is not known"):
        replace(TINY_CONTROLNET, layered=True)
