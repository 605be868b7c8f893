"""ZImageControlNet: variants told by shapes, recognition of files, refusals, sizes, training."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from importlib.resources import files

import pytest
import torch
from torch import Tensor

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth.core.lora import fit, parse
from diffsynth.core.vram import Policy, wrap
from diffsynth.errors import Unrecognized
from diffsynth.runtime.architectures import architecture_of, cuts
from diffsynth_zimage.config import (
    TINY_CONTROLNET,
    TINY_DIT,
    ZImageControlNetConfig,
    infer_controlnet_config,
    tiny_dit_inputs,
)
from diffsynth_zimage.controlnet import ControlNetResiduals, ZImageControlNet, hinted_layers
from diffsynth_zimage.dit import ZImageDiT
from diffsynth_zimage.tiny import tiny_controlnet_inputs

VARIANTS = {
    "2.1": ZImageControlNetConfig(),
    "2.1-lite": ZImageControlNetConfig(n_layers=3),
    "2.0, as diffusers saves it": ZImageControlNetConfig(refiner_hints="control_layers"),
    "1.0": ZImageControlNetConfig(n_layers=6, in_channels=16, refiner_hints="none"),
    "tiny": TINY_CONTROLNET,
}
SHARED = replace(TINY_CONTROLNET, refiner_hints="control_layers")


def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed))
    return module.eval()


def inputs() -> dict[str, Tensor]:
    return tiny_dit_inputs(TINY_DIT, torch.Generator().manual_seed(0))


def context(batch: int = 2, channels: int = 33, size: tuple[int, int] = (6, 10)) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(4))


def published_shapes() -> dict[str, tuple[int, ...]]:
    packed = files("diffsynth_zimage").joinpath("layouts/controlnet_union_2.1.json.gz").read_bytes()
    return {name: tuple(shape) for name, shape in json.loads(gzip.decompress(packed))["tensors"].items()}


def shapes_of(config: ZImageControlNetConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return parity.shapes_of(ZImageControlNet(config))


def load(tensors: dict[str, Tensor]) -> tuple[recognize.Recognized, torch.nn.Module]:
    header = pickled.of_state_dict(tensors)
    (found,) = recognize.recognize(header, *_discovery.catalog().layouts())
    return found, component.load_component(found, header, device="cpu", dtype=torch.float32)


def test_official_size_has_the_published_layout() -> None:
    assert shapes_of(VARIANTS["2.1"]) == published_shapes()
    assert sum(torch.Size(shape).numel() for shape in published_shapes().values()) == 3_356_225_792


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_tell_the_variant(variant: str) -> None:
    assert infer_controlnet_config(shapes_of(VARIANTS[variant])) == VARIANTS[variant]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (VARIANTS["2.1"], [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28]),
        (VARIANTS["2.1-lite"], [0, 10, 20]),
        (VARIANTS["1.0"], [0, 5, 10, 15, 20, 25]),
    ],
)
def test_hinted_layers_are_those_of_the_published_configs(config, expected) -> None:
    assert list(hinted_layers(30, config.n_layers)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_noise_refiner.1.after_proj.weight": None}, "1 of 2 blocks of control_noise_refiner have after_proj"),
        ({"control_layers.0.feed_forward.w1.weight": (9999, 3840)}, "feed-forward width 9999: expected 8/3 of 3840"),
        ({"control_layers.0.attention.norm_q.weight": None}, "norm_q.weight is missing"),
        ({"control_layers.0.attention.norm_q.weight": (100,)}, "head dimension 100"),
        ({"control_all_x_embedder.2-1.weight": (3840, 131)}, "patches of 131 values"),
        ({"control_all_x_embedder.4-1.weight": (3840, 528)}, "2 patch embedders"),
    ],
)
def test_files_of_no_variant_are_refused(changes, message) -> None:
    shapes = {name: shape for name, shape in (published_shapes() | changes).items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        infer_controlnet_config(shapes)


def test_an_unknown_refiner_is_refused() -> None:
    with pytest.raises(ValueError, match=r"refiner_hints='control_layer': expected .*; did you mean 'control_layers'"):
        ZImageControlNetConfig(refiner_hints="control_layer")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("config", [TINY_CONTROLNET, replace(TINY_CONTROLNET, in_channels=16, refiner_hints="none")])
def test_files_are_recognised_and_loaded(config, prefix) -> None:
    state = drawn(ZImageControlNet(config)).state_dict()
    found, module = load({f"{prefix}{key}": tensor for key, tensor in state.items()})
    assert (found.architecture.name, found.config, found.prefix) == ("z_image_controlnet", config, prefix)
    assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())


def test_a_file_with_transformer_and_controlnet_holds_both() -> None:
    parts = {"z_image_dit": ZImageDiT(TINY_DIT), "z_image_controlnet": ZImageControlNet(TINY_CONTROLNET)}
    merged = {key: tensor for part in parts.values() for key, tensor in drawn(part).state_dict().items()}
    header = pickled.of_state_dict(merged)
    found = recognize.recognize(header, *_discovery.catalog().layouts())
    assert {each.architecture.name: each.config for each in found} == {
        name: part.config for name, part in parts.items()
    }
    for each in found:
        module = component.load_component(each, header, device="cpu", dtype=torch.float32)
        assert all(torch.equal(tensor, merged[key]) for key, tensor in module.state_dict().items())


def test_the_published_file_of_union_2_0_is_refused_and_loads_without_its_untrained_refiner() -> None:
    """It has the shapes of 2.1, and its control_noise_refiner, which no step uses, gives no hints: it is zero."""
    state = drawn(ZImageControlNet(replace(TINY_CONTROLNET, n_refiner_layers=2))).state_dict()
    for name in ("control_noise_refiner.0.before_proj", "control_noise_refiner.0.after_proj"):
        state[f"{name}.weight"].zero_()
    with pytest.raises(Unrecognized, match=r"Union 2.0.*Leave out all control_noise_refiner"):
        load(state)
    found, _ = load({key: tensor for key, tensor in state.items() if not key.startswith("control_noise_refiner.")})
    assert found.config == replace(TINY_CONTROLNET, n_refiner_layers=2, refiner_hints="control_layers")


@pytest.mark.parametrize("config", [TINY_CONTROLNET, replace(TINY_CONTROLNET, refiner_hints="none")])
@torch.no_grad()
def test_one_call_for_both_stacks_is_two_calls(config) -> None:
    """A call for both gives the hints of two calls with one stream, as for a transformer without refiners."""
    controlnet = drawn(ZImageControlNet(config))
    arguments = tiny_controlnet_inputs(config, torch.Generator().manual_seed(0))
    stream = arguments["stream"]
    _, both = controlnet(**arguments)
    control, refiner = controlnet(stream, arguments["control"], ("noise_refiner",))
    _, layers = controlnet(stream, control, ("layers",))
    assert {stack: len(hints) for stack, hints in both.items()} == {
        "noise_refiner": 0 if config.refiner_hints == "none" else 1,
        "layers": 2,
    }
    for stack, hints in (refiner | layers).items():
        assert all(torch.equal(*pair) for pair in zip(hints, both[stack], strict=True))


@torch.no_grad()
def test_a_context_of_one_serves_a_batch() -> None:
    dit, controlnet = drawn(ZImageDiT(TINY_DIT)), drawn(ZImageControlNet(TINY_CONTROLNET), seed=1)
    one, arguments = context(batch=1), inputs()
    shared = dit(**arguments, extensions=[ControlNetResiduals(controlnet, one, 0.7)])
    for_each = dit(**arguments, extensions=[ControlNetResiduals(controlnet, one.expand(2, -1, -1, -1), 0.7)])
    assert parity.relative_error(shared, for_each) < 1e-5
    assert parity.relative_error(shared, dit(**arguments)) > 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (context(channels=16), r"takes b c h w with 33 channels: 16 of control latents, 1 of the mask and 16 of the"),
        (context(size=(8, 10)), r"8x10 latent pixels, the image 6x10"),
        (context(batch=3), r"a batch of 3, the latents of 2"),
        (context()[0], r"has the shape \(33, 6, 10\)"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(given, message) -> None:
    extension = ControlNetResiduals(drawn(ZImageControlNet(TINY_CONTROLNET)), given)
    with pytest.raises(ValueError, match=message):
        drawn(ZImageDiT(TINY_DIT))(**inputs(), extensions=[extension])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(TINY_CONTROLNET, n_layers=3), "3 control layers do not divide the 2 layers"),
        (replace(TINY_CONTROLNET, dim=128), "tokens of width 128, the transformer of 64"),
        (replace(TINY_CONTROLNET, n_refiner_layers=2), "names block 1 of noise_refiner, which has 1 blocks"),
    ],
)
def test_a_controlnet_of_another_transformer_is_refused(config, message) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(ZImageDiT(TINY_DIT))(
            **inputs(), extensions=[ControlNetResiduals(drawn(ZImageControlNet(config)), context())]
        )


def test_an_unknown_stack_is_refused() -> None:
    arguments = tiny_controlnet_inputs(TINY_CONTROLNET, torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"stack 'layer': expected one of noise_refiner, layers; did you mean 'layers'"
    ):
        ZImageControlNet(TINY_CONTROLNET)(**arguments, stacks=("layer",))


@pytest.mark.parametrize("config", [TINY_CONTROLNET, SHARED])
def test_gradient_checkpointing_changes_no_gradient(config) -> None:
    dit, controlnet = drawn(ZImageDiT(TINY_DIT)), drawn(ZImageControlNet(replace(config, n_refiner_layers=1)), seed=1)
    dit.requires_grad_(False)
    gradients = []
    for switch in (False, True):
        controlnet.gradient_checkpointing = dit.gradient_checkpointing = switch
        controlnet.zero_grad()
        dit(**inputs(), extensions=[ControlNetResiduals(controlnet, context())]).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in controlnet.named_parameters()})
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients[0].values())
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("config", [TINY_CONTROLNET, replace(SHARED, n_refiner_layers=1)])
@torch.no_grad()
def test_a_streamed_controlnet_gives_the_same(config) -> None:
    """A step calls it twice, between blocks of a transformer that is streamed, too."""
    dit = drawn(ZImageDiT(TINY_DIT)).requires_grad_(False)
    controlnet = drawn(ZImageControlNet(config), seed=1).requires_grad_(False)
    extension = ControlNetResiduals(controlnet, context(), 0.7)
    truth = dit(**inputs(), extensions=[extension])
    for module in (dit, controlnet):
        wrap(module, Policy.preset("cpu-offload", "cpu"), smallest=0, **cuts(architecture_of(module)))
    for _ in range(2):
        assert torch.equal(dit(**inputs(), extensions=[extension]), truth)


def test_a_lora_fits() -> None:
    controlnet = ZImageControlNet(TINY_CONTROLNET)
    name, shape = "control_layers.1.attention.to_q", (64, 64)
    state = {f"transformer.{name}.lora_A.weight": torch.ones(2, shape[1])}
    state[f"transformer.{name}.lora_B.weight"] = torch.ones(shape[0], 2)
    found = fit(parse(state), controlnet, _discovery.catalog().layouts()[1], architecture="z_image_controlnet")
    assert list(found.layers) == [name]


def test_autocast_keeps_the_control_tokens_in_fp32() -> None:
    dit, controlnet = drawn(ZImageDiT(TINY_DIT)), drawn(ZImageControlNet(TINY_CONTROLNET), seed=1)
    seen = []
    controlnet.control_noise_refiner[0].register_forward_hook(
        lambda module, arguments, out: seen.append((arguments[0].dtype, out[0].dtype))
    )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = dit(**inputs(), extensions=[ControlNetResiduals(controlnet, context())])
    assert seen == [(torch.float32, torch.float32)]
    assert out.dtype == torch.float32
