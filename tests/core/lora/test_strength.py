"""The factor of a LoRA is found wherever its writer put it; what cannot be understood is an error."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

import lora_networks as small
from diffsynth.core.lora import read_lora
from diffsynth.core.lora.strength import read_adapter_config, strengths_of
from diffsynth.errors import CorruptFile, KeyMismatch

NAME = "transformer.blocks.0.attn.to_q"
DIFFUSERS = {"transformer.r": 4, "transformer.lora_alpha": 16, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
WAYS = {
    "kohya and musubi": ({"ss_network_dim": "4", "ss_network_alpha": "16", "ss_network_module": "networks.lora"}, 4),
    "diffusers": ({"lora_adapter_metadata": json.dumps(DIFFUSERS)}, 4),
    "diffusers, nested": ({"lora_adapter_metadata": json.dumps({"transformer": {"r": 4, "lora_alpha": 16}})}, 4),
    "rsLoRA": ({"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 16, "use_rslora": True})}, 8),
    "SimpleTuner": ({"transformer.lora_alpha": "16", "transformer.r": "4"}, 4),
    "flat": ({"alpha": "16", "rank": "4"}, 4),
    "alpha alone": ({"lora_alpha": "16"}, 4),
    "peft": ({"peft_config": json.dumps({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn.to_q": 2}})}, 0.5),
    "no one number": ({"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}, None),
    "none": ({"ss_network_dim": "None", "ss_network_alpha": "None"}, None),
    "ai-toolkit": ({"software": '{"name": "ai-toolkit"}', "training_info": '{"step": 9}', "format": "pt"}, None),
}


@pytest.mark.parametrize("way", WAYS)
def test_metadata(way):
    metadata, expected = WAYS[way]
    assert strengths_of("a.safetensors", metadata).scale(NAME, 4) == expected


def test_each_component_has_its_own():
    strengths = strengths_of("a.safetensors", {"lora_adapter_metadata": json.dumps(DIFFUSERS)})
    assert strengths.scale("text_encoder.model.layers.0.q", 4) == 0.5
    # Names of other programs are told apart by what they are for.
    assert strengths.scale("lora_te1_model_layers_0_q", 4) == 0.5
    assert strengths.scale("diffusion_model.blocks.0.attn.to_q", 4) == 4


PATTERNS = [
    ("to_q", "blocks.0.attn.to_q", 2),
    ("o_q", "blocks.0.attn.to_q", 1),
    ("^to_q", "blocks.0.attn.to_q", 1),
    ("^blocks.0.attn.to_q", "transformer.blocks.0.attn.to_q", 2),
    (r"blocks\.\d+\.attn\.to_(q|k)", "blocks.12.attn.to_k", 2),
    (r"blocks\.[0-3]\.attn\.to_q", "blocks.4.attn.to_q", 1),
    ("blocks.*to_q", "x.blocks.0.attn.to_q", 2),
    ("blocks.*attn", "blocks.0.attn.to_q", 1),
    ("^attn.*to_q", "blocks.0.attn.to_q", 1),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), PATTERNS)
def test_patterns(pattern, name, expected):
    """The values are those of peft's own lookup."""
    from peft.utils.other import get_pattern_key

    theirs = get_pattern_key([pattern], name.removeprefix("transformer.")) == pattern
    assert theirs == (expected == 2)
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 8}}
    assert strengths_of("a", {}, config).scale(name, 4) == expected


def test_the_first_pattern_counts():
    config = {"lora_alpha": 4, "alpha_pattern": {"attn.to_q": 8, "to_q": 12, ".*to_q": 16}}
    assert strengths_of("a", {}, config).scale("blocks.0.attn.to_q", 4) == 2
    assert strengths_of("a", {}, config).scale("blocks.0.to_q", 4) == 3
    assert strengths_of("a", {}, config).scale("blocks.0.x_to_q", 4) == 4


REFUSED = {
    "no number": (
        {"lora_alpha": "much"},
        None,
        "a.safetensors, metadata: lora_alpha is 'much'; expected a finite number",
    ),
    "not a number": ({"alpha": "nan"}, None, "alpha is 'nan'; expected a finite number"),
    "no JSON": ({"lora_adapter_metadata": "{"}, None, "metadata lora_adapter_metadata is no JSON"),
    "deep JSON": ({"lora_adapter_metadata": "[" * 99999}, None, "metadata lora_adapter_metadata is no JSON"),
    "no truth": ({}, {"use_rslora": "maybe"}, "use_rslora is 'maybe'; expected true or false"),
    "no patterns": ({}, {"alpha_pattern": [1]}, "alpha_pattern is a list"),
    "slow": ({}, {"alpha_pattern": {"(a*)*b": 1}}, "expected names of layers, and at most 100 expressions"),
    "no expression": ({}, {"alpha_pattern": {"(a": 1}}, "which is no expression"),
    "many": ({}, {"alpha_pattern": {f"{n}.*a": 1 for n in range(101)}}, "101 expressions"),
    "changed base": ({}, {"init_lora_weights": "pissa_niter_4"}, "changed the weights of the base model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    metadata, config, message = REFUSED[name]
    with pytest.raises(KeyMismatch, match=message):
        strengths_of("a.safetensors", metadata, config)


def folder_of(path, name="adapter_model.safetensors", config='{"r": 3, "lora_alpha": 12}', keys=None):
    save_file(keys or small.state_dict(), path / name)
    (path / "adapter_config.json").write_text(config)
    return path


def test_an_alpha_of_a_layer_comes_first(tmp_path):
    layer = small.TARGETS[0]
    keys = small.state_dict() | {f"{layer}.alpha": torch.tensor(6.0)}
    lora = read_lora(folder_of(tmp_path, keys=keys))
    assert {name: each.scale for name, each in lora.layers.items()} == dict.fromkeys(small.TARGETS, 4) | {layer: 2}


def test_a_config_beside_several_files_is_of_the_adapter_model(tmp_path, caplog):
    folder_of(tmp_path)
    save_file(small.state_dict(), tmp_path / "other.safetensors")
    scale = {name: {layer.scale for layer in read_lora(tmp_path / name).layers.values()} for name in
             ("adapter_model.safetensors", "other.safetensors")}  # fmt: skip
    assert scale == {"adapter_model.safetensors": {4}, "other.safetensors": {1}}
    assert "adapter_config.json is not read for other.safetensors" in caplog.text


def test_one_file_of_any_name_has_the_config_beside_it(tmp_path):
    lora = read_lora(folder_of(tmp_path, "style.safetensors"))
    assert {layer.scale for layer in lora.layers.values()} == {4}


@pytest.mark.parametrize("content", ["{", "[]", "[" * 99999])
def test_a_config_that_does_not_parse(content, tmp_path):
    with pytest.raises(CorruptFile, match="adapter_config.json"):
        read_adapter_config(folder_of(tmp_path, config=content) / "adapter_model.safetensors")


def test_an_adapter_config_with_a_byte_order_mark(tmp_path):
    folder = folder_of(tmp_path, config="{}")
    (folder / "adapter_config.json").write_text('{"lora_alpha": 6, "r": 3}', encoding="utf-8-sig")
    assert read_adapter_config(folder / "adapter_model.safetensors") == {"lora_alpha": 6, "r": 3}


def test_dora_without_magnitudes(tmp_path):
    with pytest.raises(KeyMismatch, match=r"says use_dora, but blocks.0.attn.to_\S+ has no magnitudes"):
        read_lora(folder_of(tmp_path, config='{"r": 3, "lora_alpha": 3, "use_dora": true}'))


def test_matrices_of_another_rank(tmp_path, caplog):
    lora = read_lora(folder_of(tmp_path, config='{"r": 6, "lora_alpha": 12}'))
    assert {layer.scale for layer in lora.layers.values()} == {4}
    assert "8 layers have another rank than its metadata says" in caplog.text
    assert "rank 3, declared 6" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        read_lora(small.state_dict())
    assert not caplog.records
