"""VACE, Animate and Animate-2 equal diffusers' networks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanAnimate2Transformer3DModel, WanAnimateTransformer3DModel, WanVACETransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_animate_2_transformer_to_diffusers
from diffusers.models.transformers import transformer_wan_animate_2 as animate_2_of_diffusers
from torch import Tensor

import parity
from diffsynth_wan.config import WanAnimateConfig, WanDiTConfig, WanVaceConfig
from diffsynth_wan.dit import WanDiT
from diffsynth_wan.variants.animate import AnimateMotion, WanAnimateAdapter
from diffsynth_wan.variants.animate2 import (
    REFERENCE_TIME,
    SKIPPED_BLOCKS,
    RecordReference,
    ReferenceAttention,
    ReferenceKVCache,
)
from diffsynth_wan.variants.vace import VaceControl, WanVace
from wan_networks import SMALL, draw, load_published, meta, oracle_arguments, to_diffusers

BESIDE = {name: SMALL[name] for name in ("dim", "num_heads")}


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth_faces(batch: int) -> Tensor:
    """Return pixels that the blur filter leaves unchanged."""
    coarse = rand(batch * 5, 3, 6, 6, seed=7).clamp(-1, 1)
    fine = F.interpolate(coarse, (512, 512), mode="bilinear", align_corners=True)
    return fine.unflatten(0, (batch, 5)).transpose(1, 2).contiguous()


class Vace:
    """The first and the third of four blocks get a hint."""

    def __init__(self, num_layers: int = 4) -> None:
        network = WanDiTConfig(**{**SMALL, "num_layers": num_layers})
        added = WanVaceConfig(**BESIDE, ffn_dim=320, num_layers=2)
        self.published = draw(meta(WanDiT, network), meta(WanVace, added))
        parts = load_published(self.published)
        self.dit, self.vace = parts["wan_dit"], parts["wan_vace"]
        assert (self.dit.config, self.vace.config) == (network, added)
        hinted = list(range(0, num_layers, num_layers // 2))
        self.oracle = WanVACETransformer3DModel(**oracle_arguments(network), vace_layers=hinted).eval()
        self.oracle.load_state_dict(to_diffusers(self.published))

    def inputs(self, batch: int = 2) -> dict[str, Tensor]:
        return {
            "latents": rand(batch, 16, 3, 4, 6, seed=2),
            "time": torch.linspace(0.2, 0.9, batch),
            "prompt_embeds": rand(batch, 5, 48, seed=3),
            "control": rand(batch, 96, 3, 4, 6, seed=4),
        }

    def run(self, latents: Tensor, time: Tensor, prompt_embeds: Tensor, control: Tensor, scale: float = 1.0) -> Tensor:
        return self.dit(latents, time, prompt_embeds, extensions=[VaceControl(self.vace, control, scale)])

    def run_oracle(
        self, latents: Tensor, time: Tensor, prompt_embeds: Tensor, control: Tensor, scale: float = 1.0
    ) -> Tensor:
        scales = torch.full((2,), scale, dtype=latents.dtype)
        return self.oracle(
            latents,
            1000 * time,
            prompt_embeds,
            control_hidden_states=control,
            control_hidden_states_scale=scales,
            return_dict=False,
        )[0]


class Animate:
    """Config for faces of 512 x 512 pixels with few channels: diffusers' converter needs the published depth."""

    added = WanAnimateConfig(
        **BESIDE,
        num_layers=2,
        motion_channels=(3, 4, 4, 5, 6, 7, 8, 8),
        style_dim=12,
        style_layers=3,
        motion_dim=5,
        motion_embed_dim=14,
        face_hidden_dim=24,
        face_heads=2,
    )

    def __init__(self, num_layers: int = 4) -> None:
        network = WanDiTConfig(**{**SMALL, "num_layers": num_layers}, in_channels=36, image_dim=80)
        self.published = draw(meta(WanDiT, network), WanAnimateAdapter(self.added))
        for name, weight in self.published.items():
            if name.startswith("motion_encoder.enc.") and name.endswith(".weight"):
                weight.mul_(weight[0].numel() ** 0.5)  # these layers divide by it in forward()
        parts = load_published(self.published)
        self.dit, self.adapter = parts["wan_dit"], parts["wan_animate_adapter"]
        assert (self.dit.config, self.adapter.config) == (network, self.added)
        sizes = [str(512 >> number) for number in range(8)]
        self.oracle = WanAnimateTransformer3DModel(
            **oracle_arguments(network),
            motion_encoder_channel_sizes=dict(zip(sizes, self.added.motion_channels, strict=True)),
            motion_style_dim=12,
            motion_dim=5,
            motion_encoder_dim=14,
            face_encoder_hidden_dim=24,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=num_layers // 2,
        )
        # diffusers' network has no argument for the depth of the head.
        del self.oracle.motion_encoder.motion_network[1:3]
        self.oracle.eval().load_state_dict(to_diffusers(self.published))

    def inputs(self, batch: int = 1) -> dict[str, Tensor]:
        return {
            "latents": rand(batch, 16, 3, 4, 6, seed=2),
            "condition_latents": rand(batch, 20, 3, 4, 6, seed=3),
            "time": torch.linspace(0.4, 0.9, batch),
            "prompt_embeds": rand(batch, 512, 48, seed=4),
            "image_embeds": rand(batch, 7, 80, seed=5),
            "pose_latents": rand(batch, 16, 2, 4, 6, seed=6),
            "face_pixels": smooth_faces(batch),
        }

    def run(self, *, pose_latents: Tensor, face_pixels: Tensor, **inputs: Tensor) -> Tensor:
        motion = AnimateMotion(self.adapter, *self.adapter(pose_latents, face_pixels))
        return self.dit(**inputs, extensions=[motion])

    def run_oracle(self, **inputs: Tensor) -> Tensor:
        latents = torch.cat((inputs["latents"], inputs["condition_latents"]), dim=1)
        return self.oracle(
            latents,
            1000 * inputs["time"],
            inputs["prompt_embeds"],
            inputs["image_embeds"],
            inputs["pose_latents"],
            inputs["face_pixels"],
            return_dict=False,
        )[0]


class Animate2:
    """A reference of two latent frames and a new video of three."""

    network = WanDiTConfig(**{**SMALL, "num_layers": 2}, in_channels=36, image_dim=1280, reference_video=True)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_layers: int = 2) -> None:
        config = WanDiTConfig(**{**vars(self.network), "num_layers": num_layers})
        own = draw(meta(WanDiT, config))
        published = {
            ".".join((*name.split(".")[:2], "block", *name.split(".")[2:])) if name.startswith("blocks.") else name: x
            for name, x in own.items()
        }
        self.published = published
        self.dit = load_published(published)["wan_dit"]
        assert self.dit.config == config
        self.oracle = WanAnimate2Transformer3DModel(
            text_len=9,
            in_dim=36,
            dim=config.dim,
            ffn_dim=config.ffn_dim,
            freq_dim=config.freq_dim,
            text_dim=config.text_dim,
            num_heads=config.num_heads,
            num_layers=num_layers,
        ).eval()
        self.oracle.load_state_dict(convert_wan_animate_2_transformer_to_diffusers(dict(published)))
        # diffusers compiles the function that builds its mask; the mask is the same without.
        made = functools.partial(animate_2_of_diffusers.create_block_mask)
        monkeypatch.setattr(
            animate_2_of_diffusers,
            "create_block_mask",
            lambda *arguments, _compile, **named: made(*arguments, **named),
        )

    def inputs(self) -> dict[str, dict[str, Tensor]]:
        return {
            "reference": {
                "latents": rand(1, 16, 2, 4, 6, seed=2),
                "condition_latents": rand(1, 20, 2, 4, 6, seed=3),
                "prompt_embeds": rand(1, 9, 48, seed=4),
                "image_embeds": rand(1, 5, 1280, seed=5),
            },
            "new": {
                "latents": rand(1, 16, 3, 4, 6, seed=6),
                "condition_latents": rand(1, 20, 3, 4, 6, seed=7),
                "prompt_embeds": rand(1, 9, 48, seed=8),
                "image_embeds": rand(1, 5, 1280, seed=9),
            },
        }

    def run(self, inputs: dict[str, dict[str, Tensor]], *, prompted: bool = True, offload: bool = False) -> Tensor:
        video = ReferenceKVCache(offload=offload)
        self.dit(**inputs["reference"], time=torch.tensor([REFERENCE_TIME]), extensions=[RecordReference(video)])
        return self.dit(
            **inputs["new"],
            time=torch.tensor([0.7]),
            extensions=[ReferenceAttention(video, skip_blocks=frozenset() if prompted else SKIPPED_BLOCKS)],
        )

    def run_oracle(self, inputs: dict[str, dict[str, Tensor]], *, prompted: bool = True) -> Tensor:
        cache = animate_2_of_diffusers.WanAnimate2KVCache(self.oracle.config.num_layers)
        grid = torch.tensor([[2, 2, 3]])
        where = {"offset_grid_sizes": grid, "seq_len": 12}
        self._pass(inputs["reference"], 1.0, cache, "extract", **where)
        where = {"reference_grid_sizes": grid, "seq_len": 18, "origin_len": 5, "origin_area": [32, 48]}
        return self._pass(inputs["new"], 700.0, cache, "cached", **where, is_uncondtion=not prompted)

    def _pass(self, inputs: dict[str, Tensor], time: float, cache: Any, mode: str, **where: Any) -> Tensor:
        return self.oracle(
            [inputs["latents"][0]],
            torch.tensor([time]),
            [inputs["prompt_embeds"][0]],
            [inputs["condition_latents"][0]],
            cache,
            mode,
            encoder_hidden_states_image=inputs["image_embeds"],
            return_dict=False,
            **where,
        )[0][0][None]


@pytest.mark.parametrize("scale", [1.0, 0.6])
@torch.no_grad()
def test_vace(scale: float) -> None:
    pair = Vace()
    inputs = pair.inputs()
    truth = pair.run_oracle(**inputs, scale=scale)
    assert parity.relative_error(pair.run(**inputs, scale=scale), truth) <= parity.TOLERANCE


def test_vace_every_parameter_matters() -> None:
    pair = Vace(num_layers=2)
    inputs = pair.inputs(batch=1)
    assert parity.neutral_parameters(pair.oracle, lambda: pair.run_oracle(**inputs)) == []


@torch.no_grad()
def test_vace_in_the_layout_of_diffusers() -> None:
    pair = Vace()
    parts = load_published(to_diffusers(pair.published))
    for name, part in (("wan_dit", pair.dit), ("wan_vace", pair.vace)):
        loaded = parts[name].state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in part.state_dict().items())


@torch.no_grad()
def test_animate() -> None:
    pair = Animate()
    inputs = pair.inputs()
    assert parity.relative_error(pair.run(**inputs), pair.run_oracle(**inputs)) <= parity.TOLERANCE


@torch.no_grad()
def test_animate_for_two_videos_at_once() -> None:
    pair = Animate()
    inputs = pair.inputs(batch=2)
    assert parity.relative_error(pair.run(**inputs), pair.run_oracle(**inputs)) <= parity.TOLERANCE


def test_animate_every_parameter_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare the motion encoder on one face, then the other modules on its output."""
    pair = Animate(num_layers=2)
    inputs = pair.inputs()
    encoder = pair.oracle.motion_encoder
    faces = inputs["face_pixels"][0].transpose(0, 1)
    assert parity.neutral_parameters(encoder, lambda: encoder(faces[:1])) == []
    with torch.no_grad():
        motion = encoder(faces)
    monkeypatch.setattr(encoder, "forward", lambda faces: motion)
    of_encoder = [f"motion_encoder.{name}" for name, _ in encoder.named_parameters()]
    assert parity.neutral_parameters(pair.oracle, lambda: pair.run_oracle(**inputs), skip=of_encoder) == []
    truth = pair.run_oracle(**inputs)
    motion.add_(0.5 * motion.roll(1))
    assert parity.relative_error(pair.run_oracle(**inputs), truth) > 1e-3


@torch.no_grad()
def test_animate_in_the_layout_of_diffusers() -> None:
    pair = Animate()
    parts = load_published(to_diffusers(pair.published))
    for name, part in (("wan_dit", pair.dit), ("wan_animate_adapter", pair.adapter)):
        loaded = parts[name].state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in part.state_dict().items())


@torch.no_grad()
def test_animate_2(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Animate2(monkeypatch)
    inputs = pair.inputs()
    assert parity.relative_error(pair.run(inputs), pair.run_oracle(inputs)) <= parity.TOLERANCE


def test_animate_2_every_parameter_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Animate2(monkeypatch)
    inputs = pair.inputs()
    assert parity.neutral_parameters(pair.oracle, lambda: pair.run_oracle(inputs)) == []


@torch.no_grad()
def test_animate_2_without_a_prompt_leaves_a_block_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Animate2(monkeypatch, num_layers=10)
    inputs = pair.inputs()
    ours = pair.run(inputs, prompted=False)
    assert parity.relative_error(ours, pair.run_oracle(inputs, prompted=False)) <= parity.TOLERANCE
    assert parity.relative_error(ours, pair.run(inputs)) > 0.01


@torch.no_grad()
def test_animate_2_in_the_layout_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Animate2(monkeypatch)
    theirs = convert_wan_animate_2_transformer_to_diffusers(dict(pair.published))
    loaded = load_published(theirs)["wan_dit"]
    assert loaded.config == pair.dit.config
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in pair.dit.state_dict().items())


@torch.no_grad()
def test_animate_2_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Animate2(monkeypatch)
    inputs = pair.inputs()
    assert torch.equal(pair.run(inputs, offload=True), pair.run(inputs))


def lowered(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs in bf16, except the time."""
    return {
        name: lowered(x) if isinstance(x, dict) else x if name == "time" else x.bfloat16() for name, x in inputs.items()
    }


@torch.no_grad()
def test_vace_in_bf16_is_as_good_as_the_oracle() -> None:
    pair = Vace()
    inputs = pair.inputs()
    truth = pair.run_oracle(**inputs)
    for network in (pair.oracle, pair.dit, pair.vace):
        network.bfloat16()
    theirs = parity.relative_error(pair.run_oracle(**lowered(inputs)), truth)
    assert parity.relative_error(pair.run(**lowered(inputs)), truth) <= 1.5 * theirs


@torch.no_grad()
def test_animate_2_in_bf16_is_as_good_as_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Animate2(monkeypatch)
    inputs = pair.inputs()
    truth = pair.run_oracle(inputs)
    for network in (pair.oracle, pair.dit):
        network.bfloat16()
    theirs = parity.relative_error(pair.run_oracle(lowered(inputs)), truth)
    assert parity.relative_error(pair.run(lowered(inputs)), truth) <= 1.5 * theirs
