"""ZImageDiT with ControlNets equals diffusers' transformer and ControlNet, which have the same key names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from diffusers import ZImageControlNetModel, ZImageTransformer2DModel
from torch import Tensor, nn

import parity
from diffsynth_zimage.config import ZImageControlNetConfig, ZImageDiTConfig
from diffsynth_zimage.controlnet import ControlNetResiduals, ZImageControlNet
from diffsynth_zimage.dit import ZImageDiT

BLOCK = {"dim": 64, "n_heads": 4, "n_kv_heads": 4}
DIT = ZImageDiTConfig(**BLOCK, n_layers=4, cap_feat_dim=48, axes_dims=(4, 6, 6))
VARIANTS = {
    "2.1": ZImageControlNetConfig(**BLOCK, n_layers=2),
    "2.1-lite": ZImageControlNetConfig(**BLOCK, n_layers=1),
    "2.0": ZImageControlNetConfig(**BLOCK, n_layers=2, refiner_hints="control_layers"),
    "1.0": ZImageControlNetConfig(**BLOCK, n_layers=2, in_channels=16, refiner_hints="none"),
}
# Latent height and width, then the length of each prompt. 26x22 is a grid of 13x11 tokens.
CASES = {
    "prompts that pad to different multiples": ((26, 22), [5, 70]),
    "one prompt, nothing to pad": ((16, 16), [32]),
}


@dataclass(frozen=True)
class Control:
    """A ControlNet of ours and diffusers', with the control context and scale of a call."""

    ours: ZImageControlNet
    oracle: ZImageControlNetModel
    context: Tensor
    scale: float


@dataclass(frozen=True)
class Networks:
    ours: ZImageDiT
    oracle: ZImageTransformer2DModel

    @classmethod
    def build(cls) -> Networks:
        config = {name: value for name, value in vars(DIT).items() if name not in ("patch_size", "time_hidden_dim")}
        oracle = ZImageTransformer2DModel(**config).eval()
        ours = ZImageDiT(DIT).eval()
        weights = parity.draw_weights(parity.shapes_of(oracle))
        oracle.load_state_dict(weights)
        ours.load_state_dict(weights, assign=True)
        return cls(ours, oracle)

    def control(self, variant: str, batch: int, size: tuple[int, int], *, scale: float = 0.7, seed: int = 1) -> Control:
        config = VARIANTS[variant]
        oracle = ZImageControlNetModel(
            **BLOCK,
            control_layers_places=list(range(0, DIT.n_layers, DIT.n_layers // config.n_layers)),
            control_refiner_layers_places=[0, 1],
            control_in_dim=config.in_channels,
            add_control_noise_refiner=None if config.refiner_hints == "none" else config.refiner_hints,
        ).eval()
        ours = ZImageControlNet(config).eval()
        weights = parity.draw_weights(parity.shapes_of(oracle), seed)
        oracle.load_state_dict(weights)
        ours.load_state_dict(weights)
        oracle = ZImageControlNetModel.from_transformer(oracle, self.oracle)
        context = torch.randn(batch, config.in_channels, *size, generator=torch.Generator().manual_seed(seed))
        return Control(ours, oracle, context, scale)

    def run(self, inputs: dict[str, Tensor], *controls: Control) -> Tensor:
        extensions = [ControlNetResiduals(each.ours, each.context, each.scale) for each in controls]
        return self.ours(**inputs, extensions=extensions)

    def run_oracle(self, inputs: dict[str, Tensor], *controls: Control) -> Tensor:
        """Return the output of diffusers' transformer with ControlNets.

        diffusers' ControlNet adds its hints for the noise refiner in its own run of it, but returns those of the layers
        only, so its transformer refines without them. The published code has one run of the noise refiner, with the
        hints; hooks add them here.
        """
        prompts = [embeds[mask] for embeds, mask in zip(inputs["prompt_embeds"], inputs["prompt_mask"], strict=True)]
        arguments = (list(inputs["latents"].unsqueeze(2)), inputs["time"], prompts)
        refiner_hints = [self._refiner_hints(each, arguments) for each in controls]
        samples: dict[int, Tensor] = {}
        for number, each in enumerate(controls):
            with self._refining([*refiner_hints[:number], *refiner_hints[number + 1 :]]):
                given = each.oracle(*arguments, list(each.context.unsqueeze(2)), conditioning_scale=each.scale)
            samples |= {block: hint + samples.get(block, 0) for block, hint in given.items()}
        with self._refining(refiner_hints):
            out = self.oracle(*arguments, return_dict=False, controlnet_block_samples=samples)[0]
        return torch.stack(out).squeeze(2)

    def _refiner_hints(self, control: Control, arguments: tuple) -> Sequence[Tensor]:
        if control.oracle.add_control_noise_refiner is None:
            return ()
        stacks: list[Tensor] = []
        last = getattr(control.oracle, control.oracle.add_control_noise_refiner)[-1]
        handle = last.register_forward_hook(lambda module, arguments, out: stacks.append(out))
        control.oracle(*arguments, list(control.context.unsqueeze(2)))
        handle.remove()
        return [hint * control.scale for hint in stacks[0].unbind()[: DIT.n_refiner_layers]]

    @contextmanager
    def _refining(self, hints: Sequence[Sequence[Tensor]]) -> Iterator[None]:
        """Context manager in which the blocks of the noise refiner return their tokens plus hints."""
        handles = []
        for each in hints:
            for block, hint in zip(self.oracle.noise_refiner, each, strict=False):
                handles.append(block.register_forward_hook(lambda module, arguments, out, hint=hint: out + hint))
        yield
        for handle in handles:
            handle.remove()


@pytest.fixture(scope="module")
def networks() -> Networks:
    return Networks.build()


def draw_inputs(size: tuple[int, int], lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "latents": torch.randn(len(lengths), 16, *size, generator=generator),
        "time": torch.linspace(0.15, 0.85, len(lengths)),
        "prompt_embeds": torch.randn(len(lengths), max(lengths), DIT.cap_feat_dim, generator=generator),
        "prompt_mask": torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equals_diffusers(networks, variant: str, case: str) -> None:
    inputs, size, batch = draw_inputs(*CASES[case]), CASES[case][0], len(CASES[case][1])
    control = networks.control(variant, batch, size)
    truth = networks.run_oracle(inputs, control)
    assert parity.relative_error(networks.run(inputs, control), truth) <= parity.TOLERANCE
    assert parity.relative_error(networks.run(inputs), truth) > 0.1


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_scale_0_changes_no_bit(networks, variant: str) -> None:
    inputs = draw_inputs((10, 6), [5, 40])
    control = networks.control(variant, 2, (10, 6), scale=0.0)
    assert torch.equal(networks.run(inputs, control), networks.run(inputs))
    assert (
        parity.relative_error(networks.run(inputs, control), networks.run_oracle(inputs, control)) <= parity.TOLERANCE
    )


@pytest.mark.parametrize("second", VARIANTS)
@torch.no_grad()
def test_two_controlnets_add_up(networks, second: str) -> None:
    inputs = draw_inputs((26, 22), [5, 70])
    controls = [
        networks.control("2.1", 2, (26, 22), scale=0.7),
        networks.control(second, 2, (26, 22), scale=0.4, seed=3),
    ]
    truth = networks.run_oracle(inputs, *controls)
    assert parity.relative_error(networks.run(inputs, *controls), truth) <= parity.TOLERANCE
    assert parity.relative_error(networks.run(inputs, *controls[::-1]), truth) <= parity.TOLERANCE
    for control in controls:
        assert parity.relative_error(networks.run(inputs, control), truth) > 0.01


@pytest.mark.parametrize("variant", ["2.1", "1.0"])
def test_every_parameter_matters(networks, variant: str) -> None:
    """Every parameter of the ControlNet changes the output, so the comparisons above cover all of them.

    The other variants have the same parameters, or fewer.
    """
    inputs = draw_inputs((4, 6), [9])
    control = networks.control(variant, 1, (4, 6))
    own = nn.ModuleDict({name: part for name, part in control.oracle.named_children() if name.startswith("control_")})
    assert parity.neutral_parameters(own, lambda: networks.run_oracle(inputs, control)) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    networks = Networks.build()
    inputs = draw_inputs((26, 22), [5, 70])
    control = networks.control("2.1", 2, (26, 22))
    truth = networks.run_oracle(inputs, control)
    lowered = {name: x.bfloat16() if name in ("latents", "prompt_embeds") else x for name, x in inputs.items()}
    networks.oracle.bfloat16()
    networks.ours.bfloat16()
    control = Control(control.ours.bfloat16(), control.oracle.bfloat16(), control.context.bfloat16(), control.scale)
    theirs = parity.relative_error(networks.run_oracle(lowered, control), truth)
    assert parity.relative_error(networks.run(lowered, control), truth) <= 1.5 * theirs
