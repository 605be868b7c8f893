"""A pipeline with a LoRA: its results, its record, and the refusals, which change nothing."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_networks as small
from diffsynth import ModelConfig, provenance
from diffsynth.core.loader.state_dict import load_metadata_from_safetensors
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
    opposite = {key: -tensor if "lora_B" in key else tensor for key, tensor in style(pipe.dit).items()}
    pipe.load_lora(pipe.dit, ModelConfig(state_dict=opposite), alpha=0.5)
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
    "no number": (lambda pipe: (pipe.dit, {"alpha": float("nan")}), ValueError, "alpha=nan: expected a finite number"),
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


TEXT = [f"model.layers.{n}.self_attn.q_proj" for n in range(2)]


def both(pipe, network="lora_unet_[].lora_{down,up}.weight", text="lora_te1_[].lora_{down,up}.weight"):
    """Layers of the network and of the text encoder, as kohya writes them."""
    parts = small.state_dict(network, small.factors(pipe.dit, LAYERS))
    return parts | small.state_dict(text, small.factors(pipe.text_encoder, TEXT))


def changes(pipe, before):
    """Return role -> names of changed parameters."""
    return {
        role: sorted(key for key, tensor in pipe.parts[role].state_dict().items() if not torch.equal(tensor, old[key]))
        for role, old in before.items()
    }


def weights_of(pipe):
    return {
        role: {key: tensor.clone() for key, tensor in pipe.parts[role].state_dict().items()}
        for role in ("dit", "text_encoder")
    }


WRITERS = {
    "kohya": ("lora_unet_[].lora_{down,up}.weight", "lora_te1_[].lora_{down,up}.weight"),
    "diffusers": ("transformer.{}.lora_{A,B}.weight", "text_encoder.{}.lora_{A,B}.weight"),
    "comfy": ("diffusion_model.{}.lora_{A,B}.weight", "text_encoders.qwen3_4b.transformer.{}.lora_{A,B}.weight"),
    "bare": ("{}.lora_{A,B}.default.weight", "{}.lora_{A,B}.default.weight"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("way", ["no role", "one by one"])
def test_each_role_gets_its_layers(writer, way, tmp_path):
    pipe = tiny_z_image()
    before, keys = weights_of(pipe), both(pipe, *WRITERS[writer])
    save_file(keys, tmp_path / "both.safetensors")
    if way == "no role":
        file = tmp_path / "both.safetensors"
        pipe.load_lora(ModelConfig(path=file) if writer == "kohya" else file, alpha=0.5)
    else:
        pipe.load_lora(pipe.text_encoder, state_dict=keys, alpha=0.5)
        pipe.load_lora(pipe.dit, state_dict=keys, alpha=0.5)
    assert changes(pipe, before) == {
        "dit": sorted(f"{name}.weight" for name in LAYERS),
        "text_encoder": [f"{name}.weight" for name in TEXT],
    }
    assert {lora.role for lora in pipe.loras} == {"dit", "text_encoder"}
    down, up = small.factors(pipe.text_encoder, TEXT)[TEXT[0]]
    expected = before["text_encoder"][f"{TEXT[0]}.weight"] + 0.5 * up @ down
    torch.testing.assert_close(pipe.text_encoder.get_submodule(TEXT[0]).weight, expected)


def test_a_layer_that_nothing_has(caplog):
    pipe = tiny_z_image()
    before = weights_of(pipe)
    keys = both(pipe) | small.state_dict(
        "lora_te2_[].lora_{down,up}.weight", {"a.b": (torch.ones(1, 2), torch.ones(2, 1))}
    )
    for module, message in (
        ((), "9 of its 10 layers fit; no component has lora_te2_a_b. strict=False adds those that fit"),
        ((pipe.dit,), "7 of its 8 layers fit; it does not have lora_te2_a_b.* strict=False adds those that fit"),
    ):
        with pytest.raises(KeyMismatch, match=message):
            pipe.load_lora(*module, state_dict=keys)
    assert changes(pipe, before) == {"dit": [], "text_encoder": []}
    pipe.load_lora(state_dict=keys, strict=False)
    assert "left out: no component has lora_te2_a_b" in caplog.text
    assert len(changes(pipe, before)["dit"]) == len(LAYERS)


def test_a_layer_that_a_component_has_in_another_size():
    pipe, layer = tiny_z_image(), "layers.0.attention.to_k"
    keys = both(pipe) | small.state_dict(made={f"transformer.{layer}": (torch.ones(1, 3), torch.ones(3, 1))})
    with pytest.raises(
        KeyMismatch, match=rf"9 of its 10 layers fit; {layer}.weight is \(.*\), the LoRA is for \(3, 3\)"
    ):
        pipe.load_lora(state_dict=keys)


def test_keys_that_cannot_be_read(caplog):
    pipe = tiny_z_image()
    before, keys = weights_of(pipe), style(pipe.dit) | {"a.oft_blocks": torch.ones(2, 2, 2)}
    with pytest.raises(KeyMismatch, match="a.oft_blocks: OFT, .*strict=False, which leaves them out"):
        pipe.load_lora(pipe.dit, state_dict=keys)
    assert changes(pipe, before)["dit"] == []
    pipe.load_lora(pipe.dit, state_dict=keys, strict=False)
    assert "left out, because it cannot be read: a.oft_blocks" in caplog.text
    assert len(changes(pipe, before)["dit"]) == len(LAYERS)


def test_nothing_fits_any_component():
    pipe = tiny_z_image()
    keys = small.state_dict(made={"blocks.0.q": (torch.ones(1, 2), torch.ones(2, 1))})
    for strict in (True, False):
        with pytest.raises(KeyMismatch, match="0 of its 1 layers fit"):
            pipe.load_lora(state_dict=keys, strict=strict)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("second", [True, False])
def test_the_same_file_twice(first, second, tmp_path):
    """Whether fused or hot, and from whichever file: the strength would be the sum, without a word."""
    pipe = tiny_z_image()
    files = [save_lora(style(pipe.dit), tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    pipe.load_lora(pipe.dit, files[0], alpha=0.5, hotload=first)
    before = weights_of(pipe)
    for call in ((pipe.dit, files[1]), (files[1],)):
        with pytest.raises(ValueError, match="already, with alpha=0.5, and would be added twice"):
            pipe.load_lora(*call, hotload=second)
    assert changes(pipe, before)["dit"] == []
    assert len(pipe.loras) == 1
    pipe.clear_lora()
    if first:
        pipe.load_lora(pipe.dit, files[1], hotload=second)


def test_another_strength_is_that_of_a_fresh_model():
    pipe, fresh = tiny_z_image(), tiny_z_image()
    pipe.load_lora(pipe.dit, state_dict=style(pipe.dit), alpha=0.5, hotload=True)
    generate(pipe)
    pipe.clear_lora()
    for each in (pipe, fresh):
        each.load_lora(each.dit, state_dict=style(each.dit), alpha=1.5, hotload=True)
    assert torch.equal(generate(pipe), generate(fresh))


def test_one_component_that_refuses_keeps_the_others_unchanged():
    pipe = tiny_z_image()
    pipe.load_lora(pipe.text_encoder, state_dict=both(pipe))
    before = weights_of(pipe)
    with pytest.raises(ValueError, match="already"):
        pipe.load_lora(state_dict=both(pipe))
    assert changes(pipe, before) == {"dit": [], "text_encoder": []}


def lokr(pipe):
    return {"layers.0.attention.to_q.lokr_w1": torch.eye(2) / 9, "layers.0.attention.to_q.lokr_w2": torch.ones(12, 12)}


def test_what_can_only_be_fused_under_a_policy(caplog):
    """The default, hot, is not possible; asked for, it is refused, with what to do instead."""
    pipe, expected = tiny_z_image(), tiny_z_image()
    pipe.dit.requires_grad_(False)
    wrap(pipe.dit, Policy.preset("cpu-offload", "cpu"), smallest=0).configure(resident=(), slots=1)
    with pytest.raises(ValueError, match="by LoKr, which cannot be computed beside the weights. Use hotload=False"):
        pipe.load_lora(pipe.dit, state_dict=lokr(pipe), hotload=True)
    with caplog.at_level(logging.INFO, "diffsynth"):
        pipe.load_lora(pipe.dit, state_dict=lokr(pipe))
    assert "by LoKr, which cannot be computed beside the weights; the LoRA is fused into dit" in caplog.text
    assert [lora.hot for lora in pipe.loras] == [False]
    expected.load_lora(expected.dit, state_dict=lokr(expected))
    assert torch.equal(generate(pipe), generate(expected))
    coarse = tiny_z_image()
    wrap(coarse.dit.requires_grad_(False), Policy.preset("fp8", "cpu", torch.float32), smallest=0)
    with pytest.raises(ValueError, match="too coarse to add a LoRA to.*so it must be fused: load the model in 16 bits"):
        coarse.load_lora(coarse.dit, state_dict=lokr(coarse))


def test_a_folder_of_peft(tmp_path):
    pipe = tiny_z_image()
    weight = pipe.dit.get_submodule(LAYERS[0]).weight
    before, made = weight.detach().clone(), small.factors(pipe.dit, LAYERS)
    save_file(small.state_dict("base_model.model.{}.lora_{A,B}.weight", made), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, "lora_alpha": 12, "use_rslora": False}))
    pipe.load_lora(pipe.dit, tmp_path)
    down, up = made[LAYERS[0]]
    torch.testing.assert_close(weight.detach(), before + 4 * up @ down)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "module"])
def test_a_pickle(wrapper, tmp_path):
    pipe, expected = tiny_z_image(), tiny_z_image()
    keys = {f"module.{key}": tensor for key, tensor in style(pipe.dit).items()}
    torch.save(keys if wrapper is None else {wrapper: keys, "epoch": 3}, tmp_path / "lora.ckpt")
    pipe.load_lora(pipe.dit, tmp_path / "lora.ckpt")
    expected.load_lora(expected.dit, state_dict=style(expected.dit))
    assert all(torch.equal(a, b) for a, b in zip(pipe.dit.parameters(), expected.dit.parameters(), strict=True))


def test_a_file_for_another_program(tmp_path):
    """The pipeline's components give the layers; nothing is changed, and the new file makes the same weights."""
    pipe, other = tiny_z_image(), tiny_z_image()
    before = {key: tensor.clone() for key, tensor in pipe.dit.state_dict().items()}
    file = save_lora(style(pipe.dit), tmp_path / "style.safetensors")
    out = pipe.convert_lora(file, tmp_path / "new" / "kohya.safetensors", spelling="kohya", metadata={"note": "x"})
    assert out == tmp_path / "new" / "kohya.safetensors"
    assert all(torch.equal(tensor, before[key]) for key, tensor in pipe.dit.state_dict().items())
    assert pipe.loras == ()
    keys = load_file(out)
    assert "lora_unet_layers_0_attention_qkv.lora_down.weight" in keys
    assert load_metadata_from_safetensors([out])["note"] == "x"
    pipe.load_lora(file)
    other.load_lora(out)
    for key, tensor in pipe.dit.state_dict().items():
        torch.testing.assert_close(other.dit.state_dict()[key], tensor)


def test_what_cannot_be_written_for_another_program(tmp_path):
    pipe = tiny_z_image()
    file = save_lora(style(pipe.dit), tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match="spelling='kohja': LoRAs of z_image_dit are written as ai-toolkit, comfyui"):
        pipe.convert_lora(file, tmp_path / "new.safetensors", spelling="kohja")
    save_file({"diffusion_model.layers.0.attention_norm1.diff": torch.ones(24)}, tmp_path / "diff.safetensors")
    with pytest.raises(KeyMismatch, match="changes .*attention_norm1.weight by difference; expected a plain LoRA"):
        pipe.convert_lora(tmp_path / "diff.safetensors", tmp_path / "new.safetensors", spelling="kohya")
    assert not (tmp_path / "new.safetensors").exists()
