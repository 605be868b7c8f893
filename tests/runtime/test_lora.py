"""A pipeline with a LoRA: its results, its record, and the refusals, which change nothing."""

import logging

import pytest
import torch

import lora_networks as small
from diffsynth import ModelConfig, provenance
from diffsynth.core.lora import save_lora
from diffsynth.core.vram import Policy, wrap
from diffsynth.errors import KeyMismatch, NoFiles
from limited import keep_limit
from tiny_z_image import SMALL, tiny_z_image

LAYERS = [f"layers.{n}.attention.to_q" for n in range(6)] + ["layers.0.feed_forward.w2"]


def style(module, seed=1):
    """With the prefix of ComfyUI."""
    made = small.factors(module, LAYERS, seed=seed)
    return small.state_dict("diffusion_model.{}.lora_{A,B}.weight", made)


def generate(pipe):
    return pipe("a", num_inference_steps=2, **SMALL)


def test_hot_cold_and_cleared(tmp_path, caplog):
    pipe = tiny_z_image()
    plain, weights = generate(pipe), {key: tensor.clone() for key, tensor in pipe.dit.state_dict().items()}
    file = save_lora(style(pipe.dit), tmp_path / "style.safetensors")
    pipe.enable_lora_hot_loading(pipe.dit)
    with caplog.at_level(logging.INFO, "diffsynth"):
        pipe.load_lora(pipe.dit, file, alpha=0.5)
    assert f"{file}: 7 layers of dit changed, beside the weights, alpha=0.5" in caplog.text
    hot = generate(pipe)
    assert not torch.allclose(hot, plain, atol=1e-3)
    (recorded,) = provenance.record(pipe, {"prompt": "a"})["loras"]
    assert (recorded["role"], recorded["alpha"], recorded["hot"], list(recorded["files"])) == (
        "dit",
        0.5,
        True,
        ["style.safetensors"],
    )
    pipe.load_lora(pipe.dit, ModelConfig(path=file), alpha=-0.5)
    torch.testing.assert_close(generate(pipe), plain)
    pipe.clear_lora()
    assert pipe.loras == ()
    assert torch.equal(generate(pipe), plain)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in pipe.dit.state_dict().items())

    pipe.load_lora(pipe.dit, state_dict=style(pipe.dit), alpha=0.5, hotload=False)
    torch.testing.assert_close(generate(pipe), hot, rtol=1e-4, atol=1e-5)
    pipe.clear_lora()
    assert "fused LoRAs stay in the weights until the model is loaded anew" in caplog.text
    assert [lora.hot for lora in pipe.loras] == [False]


def test_a_component_under_a_policy_is_hot_by_default():
    pipe, expected = tiny_z_image(), tiny_z_image()
    pipe.dit.requires_grad_(False)
    wrap(pipe.dit, Policy.preset("cpu-offload", "cpu"), smallest=0).configure(resident=(), slots=1)
    for each in (pipe, expected):
        each.load_lora(each.dit, state_dict=style(each.dit), hotload=None if each is pipe else True, verbose=0)
    assert pipe.loras[0].hot
    assert torch.equal(generate(pipe), generate(expected))


def test_plans_are_made_anew():
    """Matrices beside the weights take memory, which an earlier plan does not count."""
    pipe = tiny_z_image()
    for role in ("dit", "text_encoder"):
        wrap(pipe.components[role].requires_grad_(False), Policy.preset("cpu-offload", "cpu"))
    plans = keep_limit(pipe, 8)
    for change in (
        lambda: None,
        lambda: pipe.load_lora(pipe.dit, state_dict=style(pipe.dit), hotload=True),
        pipe.clear_lora,
    ):
        change()
        generate(pipe)
        generate(pipe)
    assert len(plans) == 3


REFUSED = {
    "no module": (lambda pipe: ("dit", {}), TypeError, "module='dit': expected a component of this pipeline"),
    "another's": (
        lambda pipe: (tiny_z_image().dit, {}),
        ValueError,
        "no component of the ZImagePipeline; expected one of pipe.dit",
    ),
    "no LoRA": (lambda pipe: (pipe.dit, {"state_dict": None}), ValueError, "got no LoRA; expected lora_config or"),
    "two": (lambda pipe: (pipe.dit, {"lora_config": "a.safetensors"}), ValueError, "got two; expected"),
    "no file": (
        lambda pipe: (pipe.dit, {"state_dict": None, "lora_config": "absent/a.safetensors"}),
        NoFiles,
        "absent/a.safetensors",
    ),
    "no number": (lambda pipe: (pipe.dit, {"alpha": float("nan")}), ValueError, "alpha=nan: expected a number"),
    "another component": (lambda pipe: (pipe.text_encoder, {}), KeyMismatch, "0 of its 7 layers fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    pipe = tiny_z_image()
    call, error, message = REFUSED[name]
    module, arguments = call(pipe)
    weights = {key: tensor.clone() for key, tensor in pipe.dit.state_dict().items()}
    with pytest.raises(error, match=message):
        pipe.load_lora(module, **{"state_dict": style(pipe.dit), **arguments})
    assert pipe.loras == ()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in pipe.dit.state_dict().items())
