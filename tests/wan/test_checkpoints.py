"""Published layouts of Wan are recognised by signature and by structure, with the right config, and load strictly."""

from __future__ import annotations

import functools
import gzip
import json

import pytest
import torch

from diffsynth import _discovery
from diffsynth.core.loader import component, header, recognize
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.layouts import layout_of
from diffsynth.errors import Unrecognized
from diffsynth_wan.checkpoints import CHECKPOINTS
from diffsynth_wan.config import (
    Wan22AutoencoderConfig,
    WanAnimateConfig,
    WanDiTConfig,
    WanImageEncoderConfig,
    WanMotionControllerConfig,
    WanTextEncoderConfig,
    WanVaceConfig,
    infer_dit_config,
    infer_motion_controller_config,
)
from source_tree import ROOT

MEDIUM = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40}
LARGE = {**MEDIUM, "num_layers": 40}
IMAGE = {"image_dim": 1280}
CONFIGS = {
    "wan_dit/t2v_1.3b": WanDiTConfig(),
    "wan_dit/t2v_14b": WanDiTConfig(**LARGE),
    "wan_dit/t2v_14b_diffusers": WanDiTConfig(**LARGE),
    "wan_dit/i2v_14b": WanDiTConfig(**LARGE, **IMAGE, in_channels=36),
    "wan_dit/flf2v_14b": WanDiTConfig(**LARGE, **IMAGE, in_channels=36, image_tokens=514),
    "wan_dit/i2v_a14b": WanDiTConfig(**LARGE, in_channels=36),
    "wan_dit/ti2v_5b": WanDiTConfig(
        dim=3072, ffn_dim=14336, num_heads=24, in_channels=48, out_channels=48, frame_times=True
    ),
    "wan_dit/fun_1.3b_inp": WanDiTConfig(**IMAGE, in_channels=36),
    "wan_dit/fun_1.3b_control": WanDiTConfig(**IMAGE, in_channels=48),
    "wan_dit/fun_14b_control": WanDiTConfig(**LARGE, **IMAGE, in_channels=48),
    "wan_dit/fun_1.3b_control_ref": WanDiTConfig(**IMAGE, in_channels=48, reference_channels=16),
    "wan_dit/fun_14b_control_ref": WanDiTConfig(**LARGE, **IMAGE, in_channels=48, reference_channels=16),
    "wan_dit/fun_a14b_control": WanDiTConfig(**LARGE, in_channels=52, reference_channels=16),
    "wan_dit/fun_1.3b_camera": WanDiTConfig(**IMAGE, in_channels=32, camera_channels=24),
    "wan_dit/fun_14b_camera": WanDiTConfig(**LARGE, **IMAGE, in_channels=32, camera_channels=24),
    "wan_dit/fun_a14b_camera": WanDiTConfig(**LARGE, in_channels=36, camera_channels=24),
    "wan_dit/vace_1.3b": WanDiTConfig(),
    "wan_vace/vace_1.3b": WanVaceConfig(),
    "wan_dit/vace_14b": WanDiTConfig(**LARGE),
    "wan_vace/vace_14b": WanVaceConfig(**MEDIUM, num_layers=8),
    "wan_dit/animate_14b": WanDiTConfig(**LARGE, **IMAGE, in_channels=36),
    "wan_animate_adapter/animate_14b": WanAnimateConfig(),
    "wan_dit/animate_2_14b": WanDiTConfig(**LARGE, **IMAGE, in_channels=36, reference_video=True),
    "wan_motion_controller/speed_control_1.3b": WanMotionControllerConfig(),
    "wan_text_encoder": WanTextEncoderConfig(),
    "wan_image_encoder": WanImageEncoderConfig(),
    "wan22_autoencoder": Wan22AutoencoderConfig(),
}
WITH_LAYOUT = {spec.name: spec for spec in CHECKPOINTS if spec.layout}
LAYOUTS = sorted({spec.layout for spec in WITH_LAYOUT.values()})
LATER = {
    "Wan2.2-S2V-14B--wan_video_dit": "a tensor of Wan-S2V",
    "Wan-Dancer-14B--wan_video_dit": "a tensor of Wan-Dancer",
    "Video-As-Prompt-Wan2.1-14B--wan_video_dit+wan_video_vap": "a tensor of Video-As-Prompt",
    "LongCat-Video--wan_video_dit": "",
}


def head(tensors: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorInfo("BF16", tuple(shape)) for name, shape in tensors.items()})


@functools.cache
def published(name: str) -> Header:
    """Return the header of a published layout, from the copies in this repository."""
    file = ROOT / "tests/data/layouts" / f"{name}.json.gz"
    return head(json.loads(gzip.decompress(file.read_bytes()))["tensors"])


def recognized(file: Header, *tiers: str) -> list[recognize.Recognized]:
    return recognize.recognize(file, *_discovery.catalog().layouts(), tiers=tiers)


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_is_recognised_and_loaded(layout: str, tier: str) -> None:
    """Each tier alone finds all components of the file with their configs, and no missing or extra key."""
    expected = {spec.architecture: CONFIGS[spec.name] for spec in WITH_LAYOUT.values() if spec.layout == layout}
    file = head(layout_of(next(spec for spec in WITH_LAYOUT.values() if spec.layout == layout)))
    found = recognized(file, tier)
    assert {one.architecture.name: one.config for one in found} == expected
    for one in found:
        assert one.extra == ()
        module = component.load_component(one, file, device="meta", dtype=torch.bfloat16)
        assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_every_layout_has_its_config_here() -> None:
    assert set(CONFIGS) == set(WITH_LAYOUT)


@pytest.mark.parametrize("prefix", ["model.", "model.diffusion_model.", "pipe.dit.", "diffusion_model."])
def test_a_prefix_changes_nothing(prefix: str) -> None:
    """krea-realtime's file has the first one."""
    plain = published("Wan2.1-T2V-14B--wan_video_dit")
    (found,) = recognized(head({f"{prefix}{name}": shape for name, shape in plain.shapes.items()}), "signature")
    assert (found.checkpoint.name, found.prefix) == ("wan_dit/t2v_14b", prefix)
    assert header.signature({f"model.{name}": shape for name, shape in plain.shapes.items()}) == (
        "5ec04e02b42d2580483ad69f4e76346a"
    )


@pytest.mark.parametrize(("name", "reason"), LATER.items())
@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_networks_that_are_not_here_are_not_claimed(name: str, reason: str, tier: str) -> None:
    with pytest.raises(Unrecognized) as raised:
        recognized(published(name), tier)
    assert tier == "signature" or reason in str(raised.value)


def test_a_key_more_is_named() -> None:
    shapes = published("Wan2.1-T2V-1.3B--wan_video_dit").shapes
    (found,) = recognized(head({**shapes, "blocks.0.projector.weight": (1536, 1536)}), "structure")
    assert found.extra == ("blocks.0.projector.weight",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embedding.weight": (1500, 16, 1, 2, 2)}, "width 1500: expected a multiple of the head dimension 128"),
        ({"time_projection.1.weight": (4608, 1536)}, r"time_projection.1.weight is \(4608, 1536\); expected \(9216"),
        ({"img_emb.proj.1.weight": (1280, 1280)}, "one of img_emb"),
        ({"audio_injector.injector.0.q.weight": (1, 1)}, "audio_injector.* a tensor of Wan-S2V"),
    ],
)
def test_what_is_not_wan_is_refused(changes: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {**published("Wan2.1-T2V-1.3B--wan_video_dit").shapes, **changes}
    if "patch_embedding.weight" in changes:
        shapes["time_projection.1.weight"] = (9000, 1500)
    with pytest.raises(ValueError, match=message):
        infer_dit_config(shapes)


def test_three_linear_layers_of_something_else_are_no_speed_control() -> None:
    shapes = published("Wan2.1-1.3b-speedcontrol-v1--wan_video_motion_controller").shapes
    for changes in ({"linear.4.weight": (1536, 1536)}, {"linear.6.weight": (1536, 1536)}):
        with pytest.raises(ValueError, match="three linear layers from 256 to 6 \\* 1536"):
            infer_motion_controller_config({**shapes, **changes})


@pytest.mark.parametrize("kind", [WanDiTConfig, WanVaceConfig, WanAnimateConfig])
def test_heads_that_do_not_divide_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match="num_heads=7 must divide dim=256"):
        kind(dim=256, num_heads=7)


def test_positions_without_an_image_branch_are_refused() -> None:
    with pytest.raises(ValueError, match="image_tokens=514 without an image branch"):
        WanDiTConfig(image_tokens=514)
