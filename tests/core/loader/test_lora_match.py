"""Names in LoRA files and the parameters that they mean, in every spelling known."""

import pytest

from diffsynth.core.loader import convert
from diffsynth.core.loader.lora_keys import lora_keys
from diffsynth.core.loader.lora_match import Layout, match, role_hint, without_prefix

NAMES = {"blocks.0.attn.to_q", "blocks.0.attn.to_out.0", "model.layers.0.q_proj"}
UNDERSCORED = {name.replace(".", "_"): name for name in NAMES}

SPELLINGS = {
    "blocks.0.attn.to_q": [
        "blocks.0.attn.to_q",
        "lora_unet_blocks_0_attn_to_q",
        "lora_unet__blocks_0_attn_to_q",
        "lora_unet_blocks.0.attn.to_q",
        "lora_unet.blocks.0.attn.to_q",
        "lora_transformer_blocks_0_attn_to_q",
        "lora_unet_diffusion_model_blocks_0_attn_to_q",
        "lycoris_blocks_0_attn_to_q",
        "lycoris_transformer_blocks_0_attn_to_q",
        "dit.blocks.0.attn.to_q",
        "pipe.dit.blocks.0.attn.to_q",
        "transformer.blocks.0.attn.to_q",
        "transformer_2.blocks.0.attn.to_q",
        "diffusion_model.blocks.0.attn.to_q",
        "model.diffusion_model.blocks.0.attn.to_q",
        "base_model.model.blocks.0.attn.to_q",
        "base_model.model.transformer.blocks.0.attn.to_q",
        "module.blocks.0.attn.to_q",
        "state_dict.module.blocks.0.attn.to_q",
        "_orig_mod.blocks.0._fsdp_wrapped_module.attn.to_q",
        "unet.blocks.0.attn.to_q",
    ],
    "blocks.0.attn.to_out.0": ["blocks.0.attn.to_out", "lora_unet_blocks_0_attn_to_out_0"],
    "model.layers.0.q_proj": [
        "lora_te_model_layers_0_q_proj",
        "lora_te1_model_layers_0_q_proj",
        "lora_te1_layers_0_q_proj",
        "lora_text_encoder_model_layers_0_q_proj",
        "text_encoder.model.layers.0.q_proj",
        "text_encoder.layers.0.q_proj",
        "text_encoders.qwen3_4b.transformer.model.layers.0.q_proj",
        "text_encoders.qwen3_4b.model.layers.0.q_proj",
        "base_model.model.model.layers.0.q_proj",
    ],
}


@pytest.mark.parametrize(("spelling", "name"), [(each, name) for name, found in SPELLINGS.items() for each in found])
def test_spellings(spelling, name):
    assert without_prefix(spelling, NAMES, UNDERSCORED) == name


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.to_q", "lora_unet_blocks_1_attn_to_q", "transformer.", "", "model.model"]
)
def test_unknown(name):
    assert without_prefix(name, NAMES, UNDERSCORED) is None


HINTS = {
    "lora_te1_x": ("text", "1"),
    "lora_te_x": ("text", ""),
    "lora_te2_x": ("text", "2"),
    "text_encoder.x": ("text", ""),
    "text_encoder_2.x": ("text", "2"),
    "text_encoders.t5xxl.transformer.x": ("text", ""),
    "lora_unet_x": ("network", ""),
    "base_model.model.transformer.x": ("network", ""),
    "transformer_2.x": ("network", "2"),
    "diffusion_model.x": ("network", ""),
    "pipe.dit2.x": ("role:dit2", ""),
    "terms.x": ("", ""),
    "transformers.x": ("", ""),
    "blocks.0.x": ("", ""),
}


@pytest.mark.parametrize("name", HINTS)
def test_what_a_prefix_says(name):
    assert role_hint(name) == HINTS[name]


RULES = (
    convert.Split("qkv.weight", ("q.weight", "k.weight", "v.weight")),
    convert.Rename("out.weight", "o.weight"),
)
OWN = {"q.weight": (2, 3), "k.weight": (2, 3), "v.weight": (2, 3), "o.weight": (4, 4)}


def matched(**shapes):
    keys = {}
    for name, (outputs, inputs) in shapes.items():
        keys |= {f"{name}.lora_A.weight": (1, inputs), f"{name}.lora_B.weight": (outputs, 1)}
    return match(lora_keys(keys).changes, OWN, [Layout("own", (), OWN, {}), Layout("other", RULES, OWN, {})])


def test_fused_and_split_keys_together():
    found = matched(qkv=(6, 3), q=(2, 3), out=(4, 4))
    assert found.fits
    assert {key: {each.changes[0].module for each in parts} for key, parts in found.targets.items()} == {
        "q.weight": {"q", "qkv"},
        "k.weight": {"qkv"},
        "v.weight": {"qkv"},
        "o.weight": {"out"},
    }


def test_what_does_not_fit_is_left_as_a_whole():
    found = matched(qkv=(6, 3), out=(4, 5), absent=(1, 1))
    assert found.targets.keys() == {"q.weight", "k.weight", "v.weight"}
    assert found.left == {"out": "o.weight is (4, 4), the LoRA is for (4, 5)", "absent": ""}
    wrong = matched(qkv=(7, 3), o=(4, 4))
    assert wrong.targets.keys() == {"o.weight"}
    assert "does not split into" in wrong.left["qkv"]


def test_one_parameter_under_two_names():
    """Only values tell whether both are the same change."""
    assert matched(out=(4, 4), o=(4, 4)).twice == ["o.weight"]
    assert matched(qkv=(6, 3), q=(2, 3)).twice == ["q.weight"]
    assert matched(qkv=(6, 3), o=(4, 4)).twice == []
