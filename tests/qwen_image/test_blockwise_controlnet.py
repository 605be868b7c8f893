"""Block-wise ControlNets against a naive form of the published forward pass; limit cases, gradients, refusals.

No other program computes them in a form that could be an oracle here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import parity
from diffsynth_qwen_image.blockwise_controlnet import BlockwiseControlNet, BlockwiseResiduals, Control
from diffsynth_qwen_image.config import TINY_DIT, tiny_dit_inputs
from diffsynth_qwen_image.controlnet_config import TINY_BLOCKWISE
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.features.edit import References

INPAINT = replace(TINY_BLOCKWISE, additional_in_dim=4)
REFERENCE = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(8))


def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed))
    return module.eval()


def control(config=TINY_BLOCKWISE, seed: int = 1, batch: int = 1, size: tuple[int, int] = (6, 10)) -> Tensor:
    return torch.randn(batch, config.control_channels, *size, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, Tensor]:
    return tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0))


def naive_hint(network: BlockwiseControlNet, index: int, image: Tensor, latents: Tensor) -> Tensor:
    """Return the hint of a block, in the terms of the published code: two RMS norms, a sum, an MLP with GELU."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    tokens = network.img_in(rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2))
    weights = dict(network.controlnet_blocks[index].named_parameters())
    hidden = norm(image, weights["x_rms.weight"]) + norm(tokens, weights["y_rms.weight"])
    hidden = F.gelu(F.linear(hidden, weights["input_proj.weight"], weights["input_proj.bias"]))
    return F.linear(hidden, weights["output_proj.weight"], weights["output_proj.bias"])


def naive(dit: QwenImageDiT, controls: list[Control], *, appended: int = 0) -> Tensor:
    """Return the transformer's velocity with hooks that add the hints to the first tokens after each block."""

    def hook(index):
        def add(module, arguments, out):
            image, text = out
            count = image.shape[1] - appended
            first = image[:, :count].clone()
            hints = [naive_hint(each.network, index, first, each.latents) * each.scale for each in controls]
            return torch.cat((first + sum(hints), image[:, count:]), dim=1), text

        return add

    handles = [block.register_forward_hook(hook(index)) for index, block in enumerate(dit.transformer_blocks)]
    out = dit(**inputs(), extensions=[References((REFERENCE,))] if appended else [])
    for handle in handles:
        handle.remove()
    return out


@pytest.fixture(scope="module")
def dit() -> QwenImageDiT:
    return drawn(QwenImageDiT(TINY_DIT)).requires_grad_(False)


@pytest.fixture(scope="module")
def controls() -> list[Control]:
    """Two ControlNets, of which one inpaints, with a batch of one and of two control images."""
    plain, inpaint = (drawn(BlockwiseControlNet(config), seed) for seed, config in ((1, TINY_BLOCKWISE), (2, INPAINT)))
    return [Control(plain, control(), 0.7), Control(inpaint, control(INPAINT, 3, batch=2), 0.4)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("appended", [0, 4])
@torch.no_grad()
def test_equals_the_naive_form(dit, controls, count: int, appended: int) -> None:
    """Several get the tokens without the hints of each other; tokens of further images get none."""
    extensions = [References((REFERENCE,))] if appended else []
    found = dit(**inputs(), extensions=[*extensions, BlockwiseResiduals(controls[:count])])
    expected = naive(dit, controls[:count], appended=appended)
    assert parity.relative_error(found, expected) <= parity.TOLERANCE
    assert parity.relative_error(dit(**inputs(), extensions=extensions), expected) > 1e-2
    if count == 2:
        one_by_one = [*extensions, *(BlockwiseResiduals([each]) for each in controls)]
        assert parity.relative_error(dit(**inputs(), extensions=one_by_one), expected) > 1e-3


def test_every_parameter_matters(dit, controls) -> None:
    network = controls[1].network
    assert parity.neutral_parameters(network, lambda: naive(dit, controls[1:])) == []


@torch.no_grad()
def test_scale_0_is_no_controlnet_to_the_bit(dit, controls) -> None:
    off = [replace(each, scale=0.0) for each in controls]
    plain = dit(**inputs())
    for given in ([], off[:1], off):
        assert torch.equal(dit(**inputs(), extensions=[BlockwiseResiduals(given)]), plain)
    alone = dit(**inputs(), extensions=[BlockwiseResiduals(controls[:1])])
    assert torch.equal(dit(**inputs(), extensions=[BlockwiseResiduals([controls[0], off[1]])]), alone)


@torch.no_grad()
def test_an_untrained_adapter_is_the_base_model_to_the_bit(dit) -> None:
    """Training begins with output projections of zeros."""
    network = drawn(BlockwiseControlNet(TINY_BLOCKWISE))
    for block in network.controlnet_blocks:
        block.output_proj.weight.zero_()
        block.output_proj.bias.zero_()
    assert torch.equal(dit(**inputs(), extensions=[BlockwiseResiduals([Control(network, control())])]), dit(**inputs()))


@torch.no_grad()
def test_a_golden(dit, controls) -> None:
    """The naive form has these values, with weights and inputs drawn from fixed seeds; the comparison above would not
    notice a change of both sides. The numbers were computed by `naive` alone.
    """
    found = dit(**inputs(), extensions=[BlockwiseResiduals(controls)])
    golden = torch.tensor(GOLDEN)
    assert torch.allclose(found[:, ::5, 3, 4].flatten(), golden, atol=1e-3 * float(golden.abs().max()))


GOLDEN = [-3.1371, -1.313, -0.3105, 1.6868, -0.8574, 0.7099, 0.0447, 2.2069]


@torch.no_grad()
def test_the_hints_of_equal_tokens(controls) -> None:
    network = controls[0].network
    image = torch.randn(2, 15, 64, generator=torch.Generator().manual_seed(5))
    hints = network(image, controls[0].latents)
    assert len(hints) == 2
    for index, hint in enumerate(hints):
        expected = naive_hint(network, index, image, controls[0].latents)
        assert parity.relative_error(hint, expected) <= parity.TOLERANCE


def test_gradients_equal_those_of_the_naive_form_also_with_checkpointing(dit, controls) -> None:
    network, gradients = controls[0].network, []
    extension = BlockwiseResiduals(controls[:1])
    runs = [lambda: naive(dit, controls[:1])] + 2 * [lambda: dit(**inputs(), extensions=[extension])]
    for switch, run in zip((False, False, True), runs, strict=True):
        network.gradient_checkpointing = switch
        network.zero_grad()
        run().square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    network.gradient_checkpointing = False
    for name, expected in gradients[0].items():
        assert bool(expected.abs().sum() > 0), name
        assert all(parity.relative_error(each[name], expected) < 1e-3 for each in gradients[1:]), name
    assert all(torch.equal(gradients[1][name], gradients[2][name]) for name in gradients[1])


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (TINY_BLOCKWISE, control(INPAINT), "takes b c h w with 16 channels: 16 of control latents"),
        (INPAINT, control(), "takes b c h w with 17 channels: 16 of control latents and 1 of a mask"),
        (TINY_BLOCKWISE, control(size=(6, 8)), "encode a control image of the size of the result"),
        (replace(TINY_BLOCKWISE, n_layers=3), control(), "the ControlNet has 3 blocks, the transformer 2; load a"),
        (replace(TINY_BLOCKWISE, dim=128), control(), "tokens of width 128, the transformer of 64; load a ControlNet"),
    ],
)
def test_what_does_not_fit_is_refused(dit, config, given, message) -> None:
    extension = BlockwiseResiduals([Control(BlockwiseControlNet(config), given)])
    with pytest.raises(ValueError, match=message):
        dit(**inputs(), extensions=[extension])


@torch.no_grad()
def test_a_layered_transformer_is_refused(controls) -> None:
    layered = QwenImageDiT(replace(TINY_DIT, layered=True))
    given = inputs() | {"latents": torch.zeros(2, 16, 2, 6, 10)}
    with pytest.raises(ValueError, match="a ControlNet takes those of one image"):
        layered(**given, extensions=[BlockwiseResiduals(controls)])
