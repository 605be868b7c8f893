"""Weights that are quantized while they are read."""

from __future__ import annotations

import pytest
import torch

import diffsynth
from diffsynth import ModelConfig, provenance
from diffsynth.core.quant.config import QuantizeConfig
from diffsynth.core.quant.modules import quantize_module, quantized_layers
from diffsynth.errors import CorruptFile
from diffsynth.runtime.architectures import architecture_of, cuts

CALL = {
    "prompt": "a red apple",
    "seed": 0,
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "output_type": "latents",
}


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """Latents of nano, quantized in memory."""
    pipe = diffsynth.load("z-image-nano", device="cpu")
    cut = cuts(architecture_of(pipe.dit))
    before = pipe(**CALL)
    quantize_module(pipe.dit, QuantizeConfig("int8_row"), high_precision=cut["high_precision"], atomic=cut["atomic"])
    after = pipe(**CALL)
    assert 1e-4 < (after - before).norm() / before.norm() < 0.1
    return after


@pytest.mark.parametrize("policy", [None, "cpu-offload", "fp8", "disk"])
def test_read_and_offloaded_it_is_the_same(expected: torch.Tensor, policy: str | None) -> None:
    policies = None if policy is None else {"dit": policy}
    pipe = diffsynth.load("z-image-nano", device="cpu", quantize="int8_row", policy=policies)
    assert len(list(quantized_layers(pipe.dit))) > 10
    assert not list(quantized_layers(pipe.text_encoder))
    assert provenance.record(pipe, CALL)["quantization"] == {"dit": {"int8_row": len(list(quantized_layers(pipe.dit)))}}
    latents = pipe(**CALL)
    if policy == "fp8":  # this policy rounds what is not quantized
        assert 0 < (latents - expected).norm() / expected.norm() < 0.1
    else:
        assert torch.equal(latents, expected)


def test_weights_that_are_rounded_once_are_ordinary(expected: torch.Tensor) -> None:
    pipe = diffsynth.load(
        "z-image-nano", device="cpu", quantize={"dit": QuantizeConfig("int8_row", mode="dequant_once")}
    )
    assert not list(quantized_layers(pipe.dit))
    assert torch.equal(pipe(**CALL), expected)


def test_what_is_wrong_is_said_before_anything_is_read(monkeypatch) -> None:
    monkeypatch.setattr("diffsynth.core.loader.component.materialize", None)
    for quantize, message in {
        "int8_rows": "method 'int8_rows' is unknown; did you mean 'int8_row'",
        "dit": "method 'dit' is unknown",
    }.items():
        with pytest.raises(ValueError, match=message):
            diffsynth.load("z-image-nano", device="cpu", quantize=quantize)
    with pytest.raises(ValueError, match="quantize for 'ditt', which has no file; did you mean 'dit'"):
        diffsynth.load("z-image-nano", device="cpu", quantize={"ditt": "int8_row"})
    with pytest.raises(ValueError, match="target_modules has 'to_x', the name of no linear layer"):
        diffsynth.load("z-image-nano", device="cpu", quantize={"method": "int8_row", "target_modules": ["to_x"]})


def test_weights_with_nan_are_refused() -> None:
    network = diffsynth.load("z-image-nano", device="cpu").dit
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    name = next(iter(name for name in state if name.endswith("to_q.weight")))
    state[name][0, 0] = float("nan")
    with pytest.raises(CorruptFile, match="NaN or infinity"):
        diffsynth.load(
            "z-image-nano", device="cpu", components={"dit": ModelConfig(state_dict=state, quantize="int8_row")}
        )
