"""ZImageOmniDiT equals diffusers' network in its mode for reference images, which has the same key names."""

from __future__ import annotations

import pytest
import torch
from diffusers import ZImageTransformer2DModel

import parity
from diffsynth_zimage.config import ZImageOmniDiTConfig
from diffsynth_zimage.extension import Network, Stream
from diffsynth_zimage.omni import ZImageOmniDiT

SMALL = ZImageOmniDiTConfig(
    dim=64,
    n_layers=2,
    n_refiner_layers=2,
    n_heads=4,
    n_kv_heads=4,
    cap_feat_dim=48,
    axes_dims=(4, 6, 6),
    siglip_feat_dim=40,
)
# Height and width of each reference image's latents, rows and columns of its features, and for each prompt the numbers
# of tokens of its caption's segments.
CASES = {
    "no image": ([], [], [[7]]),
    "no image, two prompts": ([], [], [[5], [70]]),
    "one image": ([(26, 22)], [(5, 7)], [[3, 17, 2]]),
    "one image, nothing to pad": ([(16, 16)], [(4, 8)], [[32, 64, 32]]),
    "one small image": ([(4, 4)], [(2, 2)], [[3, 4, 2]]),
    "three images": ([(10, 6), (4, 8), (12, 12)], [(3, 4), (1, 5), (6, 6)], [[3, 2, 2, 40, 2]]),
    "one image, prompts of two lengths": ([(10, 6)], [(3, 4)], [[3, 40, 2], [3, 5, 2]]),
}


class Append:
    """Extension that appends reference images and their features."""

    def __init__(self, images: list[torch.Tensor], features: list[torch.Tensor]) -> None:
        self.images, self.features = images, features

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        return dit.append_references(stream, self.images, self.features)


def build_pair() -> tuple[ZImageOmniDiT, ZImageTransformer2DModel]:
    oracle = ZImageTransformer2DModel(
        in_channels=SMALL.in_channels,
        dim=SMALL.dim,
        n_layers=SMALL.n_layers,
        n_refiner_layers=SMALL.n_refiner_layers,
        n_heads=SMALL.n_heads,
        n_kv_heads=SMALL.n_kv_heads,
        cap_feat_dim=SMALL.cap_feat_dim,
        axes_dims=list(SMALL.axes_dims),
        siglip_feat_dim=SMALL.siglip_feat_dim,
    ).eval()
    ours = ZImageOmniDiT(SMALL).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    ours.load_state_dict(weights, assign=True)
    return ours, oracle


def draw_inputs(case: str) -> dict[str, object]:
    sizes, grids, prompts = CASES[case]
    generator = torch.Generator().manual_seed(2)
    longest = max(map(sum, prompts))
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, lengths in zip(mask, prompts, strict=True):
        row[: sum(lengths)] = torch.repeat_interleave(torch.arange(len(lengths)) + 1, torch.tensor(lengths))
    return {
        "latents": torch.randn(len(prompts), 16, 14, 10, generator=generator),
        "time": torch.linspace(0.15, 0.85, len(prompts)),
        "prompt_embeds": torch.randn(len(prompts), longest, SMALL.cap_feat_dim, generator=generator),
        "prompt_mask": mask,
        "images": [torch.randn(1, 16, *size, generator=generator) for size in sizes],
        "features": [torch.randn(*grid, SMALL.siglip_feat_dim, generator=generator) for grid in grids],
    }


def run_ours(ours: ZImageOmniDiT, inputs: dict[str, object]) -> torch.Tensor:
    arguments = {name: inputs[name] for name in ("latents", "time", "prompt_embeds", "prompt_mask")}
    extensions = (Append(inputs["images"], inputs["features"]),) if inputs["images"] else ()
    return ours(**arguments, extensions=extensions)


def run_oracle(oracle: ZImageTransformer2DModel, inputs: dict[str, object]) -> torch.Tensor:
    images = [image[0].unsqueeze(1) for image in inputs["images"]]
    latents, count = inputs["latents"].unsqueeze(2), len(images)
    prompts = [
        [embeds[mask == number + 1] for number in range(int(mask.max()))]
        for embeds, mask in zip(inputs["prompt_embeds"], inputs["prompt_mask"], strict=True)
    ]
    result = oracle(
        [[*images, each] for each in latents],
        inputs["time"],
        prompts,
        siglip_feats=[[*inputs["features"], None] if count else None for _ in latents],
        image_noise_mask=[[0] * count + [1] for _ in latents],
        return_dict=False,
    )[0]
    return torch.stack(result).squeeze(2)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_equals_diffusers(case: str) -> None:
    ours, oracle = build_pair()
    inputs = draw_inputs(case)
    assert parity.relative_error(run_ours(ours, inputs), run_oracle(oracle, inputs)) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    """Every parameter changes the output, so the comparisons above cover all of them."""
    _, oracle = build_pair()
    inputs = draw_inputs("one small image")
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, inputs)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair()
    inputs = draw_inputs("one image")
    truth = run_oracle(oracle, inputs)
    lowered = {
        name: [each.bfloat16() for each in value] if isinstance(value, list) else value.bfloat16()
        for name, value in inputs.items()
        if name not in ("time", "prompt_mask")
    }
    inputs |= lowered
    theirs = parity.relative_error(run_oracle(oracle.bfloat16(), inputs), truth)
    assert parity.relative_error(run_ours(ours.bfloat16(), inputs), truth) <= 1.5 * theirs


@torch.no_grad()
def test_padding_may_stand_on_the_left() -> None:
    ours, oracle = build_pair()
    inputs = draw_inputs("one image, prompts of two lengths")
    truth = run_oracle(oracle, inputs)
    for name in ("prompt_embeds", "prompt_mask"):
        inputs[name][1] = inputs[name][1].roll(35, dims=0)
    assert parity.relative_error(run_ours(ours, inputs), truth) <= parity.TOLERANCE
