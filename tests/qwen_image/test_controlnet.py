"""QwenImageControlNet equals diffusers' network (0.42), and with QwenImageDiT its transformer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import QwenImageControlNetModel
from torch import Tensor

import parity
from diffsynth_qwen_image.config import TINY_DIT
from diffsynth_qwen_image.controlnet import ControlNetResiduals, QwenImageControlNet
from diffsynth_qwen_image.controlnet_config import TINY_CONTROLNET, QwenImageControlNetConfig, tiny_controlnet_inputs
from diffsynth_qwen_image.dit import QwenImageDiT, patchify
from diffsynth_qwen_image.extension import Inputs
from diffsynth_qwen_image.features.edit import References
from qwen_image_oracles import oracle_controlnet, oracle_dit

CASES = {"union": replace(TINY_CONTROLNET, n_layers=2), "inpainting": replace(TINY_CONTROLNET, control_channels=17)}
GRID = (1, 3, 5)


def run_oracle(oracle: QwenImageControlNetModel, inputs: Inputs, control: Tensor) -> list[Tensor]:
    return oracle(
        hidden_states=patchify(inputs.latents, 2),
        controlnet_cond=patchify(control.expand(2, -1, -1, -1), 2),
        encoder_hidden_states=inputs.prompt_embeds,
        encoder_hidden_states_mask=inputs.prompt_mask,
        timestep=inputs.sigma,
        img_shapes=[[GRID]] * 2,
        return_dict=False,
    )


def pair(config: QwenImageControlNetConfig) -> tuple[QwenImageControlNet, QwenImageControlNetModel, dict]:
    oracle, ours = oracle_controlnet(config), QwenImageControlNet(config).eval()
    ours.load_state_dict(oracle.state_dict())
    return ours, oracle, tiny_controlnet_inputs(config, torch.Generator().manual_seed(0))


def drawn_dit(**fields) -> QwenImageDiT:
    dit = QwenImageDiT(replace(TINY_DIT, **fields)).eval()
    dit.load_state_dict(parity.draw_weights(parity.shapes_of(dit)))
    return dit


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_hints_equal_diffusers(case: str) -> None:
    ours, oracle, inputs = pair(CASES[case])
    hints, samples = ours(**inputs), run_oracle(oracle, **inputs)
    assert len(hints) == len(samples) == ours.config.n_layers
    for hint, sample in zip(hints, samples, strict=True):
        assert parity.relative_error(hint, sample) <= parity.TOLERANCE


def test_every_parameter_matters() -> None:
    """Every parameter changes a hint, so the comparison above covers all of them, except the text's tokens after the
    last attention, which nothing reads.
    """
    _, oracle, inputs = pair(CASES["inpainting"])
    unread = ("attn.add_q_proj", "attn.norm_added_q", "attn.to_add_out", "txt_mlp")
    neutral = parity.neutral_parameters(oracle, lambda: torch.cat(run_oracle(oracle, **inputs), dim=1))
    assert all(name.startswith(tuple(f"transformer_blocks.0.{part}" for part in unread)) for name in neutral), neutral


@pytest.mark.parametrize("blocks", [2, 5])
@torch.no_grad()
def test_the_transformer_adds_them_as_diffusers_does(blocks: int) -> None:
    """A hint is added after several consecutive blocks; several ControlNets add up, also at once in diffusers."""
    dit = drawn_dit(n_layers=blocks)
    oracle = oracle_dit(dit.config)
    oracle.load_state_dict(dit.state_dict())
    ours, controlnet, given = pair(CASES["union"])
    inputs, control = given["inputs"], given["control"][:1]
    other = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(1))
    found = dit(
        *(inputs.latents, inputs.sigma, inputs.prompt_embeds, inputs.prompt_mask),
        extensions=[ControlNetResiduals(ours, control, 0.7), ControlNetResiduals(ours, other, 0.4)],
    )
    samples = [run_oracle(controlnet, inputs, each) for each in (control, other)]
    velocity = oracle(
        hidden_states=patchify(inputs.latents, 2),
        encoder_hidden_states=inputs.prompt_embeds,
        encoder_hidden_states_mask=inputs.prompt_mask,
        timestep=inputs.sigma,
        img_shapes=[[GRID]] * 2,
        controlnet_block_samples=[a * 0.7 + b * 0.4 for a, b in zip(*samples, strict=True)],
        return_dict=False,
    )[0]
    assert parity.relative_error(patchify(found, 2), velocity) <= parity.TOLERANCE


@torch.no_grad()
def test_tokens_of_other_images_get_no_hint() -> None:
    """An image that an edit model gets beside the control image: its tokens are as without a ControlNet."""
    dit, (ours, _, given) = drawn_dit(n_layers=1), pair(CASES["union"])
    reference = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    stream = dit.embed(**vars(given["inputs"]))
    stream = References((reference,))(dit, stream)
    hinted = ControlNetResiduals(ours, given["control"])(dit, stream)
    tokens = torch.zeros_like(stream.image)
    (residual,) = hinted.residuals["transformer_blocks", 0]
    assert torch.equal(residual(tokens)[:, 15:], tokens[:, 15:])
    assert torch.equal(residual(tokens)[:, :15], ours(**given)[0])


@torch.no_grad()
def test_scale_0_and_projections_of_zeros_change_no_bit() -> None:
    dit, (ours, _, given) = drawn_dit(), pair(CASES["union"])
    plain = dit(**vars(given["inputs"]))
    run = lambda scale: dit(**vars(given["inputs"]), extensions=[ControlNetResiduals(ours, given["control"], scale)])  # noqa: E731
    assert torch.equal(run(0.0), plain)
    assert not torch.allclose(run(1.0), plain)
    for parameter in ours.controlnet_blocks.parameters():
        parameter.zero_()
    assert torch.equal(run(1.0), plain)


def test_gradients_reach_every_parameter_also_with_checkpointing() -> None:
    dit, (ours, _, given) = drawn_dit().requires_grad_(False), pair(CASES["union"])
    extension, gradients = ControlNetResiduals(ours, given["control"]), []
    for switch in (False, True):
        ours.gradient_checkpointing = switch
        ours.zero_grad()
        dit(**vars(given["inputs"]), extensions=[extension]).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in ours.named_parameters()})
    last = "transformer_blocks.1"
    unread = tuple(f"{last}.{part}" for part in ("txt_mlp", "attn.to_add_out", "attn.add_q_proj", "attn.norm_added_q"))
    for name, gradient in gradients[0].items():
        assert name.startswith(unread) or bool(gradient.abs().sum() > 0), name
        assert gradient is gradients[1][name] is None or torch.allclose(gradient, gradients[1][name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control": torch.zeros(1, 17, 6, 10)}, "takes b c h w with 16 channels: 16 of control latents"),
        ({"control": torch.zeros(1, 16, 6, 8)}, "encode a control image of the size of the result"),
        ({"control": torch.zeros(3, 16, 6, 10)}, "a batch of 3, the latents 6x10 and a batch of 2"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message) -> None:
    ours, _, given = pair(CASES["union"])
    with pytest.raises(ValueError, match=message):
        ours(**{**given, **changes})


def test_a_controlnet_of_another_transformer_is_refused() -> None:
    ours, _, given = pair(CASES["union"])
    dit = drawn_dit(dim=128, n_heads=4)
    with pytest.raises(ValueError, match="tokens of width 64, the transformer of 128; load a ControlNet of this"):
        dit(**vars(given["inputs"]), extensions=[ControlNetResiduals(ours, given["control"])])
