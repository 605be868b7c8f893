"""Key rules of FLUX.1 layouts whose names differ from our parameter names, those of `flux1-dev.safetensors`."""

from __future__ import annotations

from diffsynth.core.loader.convert import Drop, Fuse, Rename, ReorderChunks, Rule

_EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}


def _double_block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *(Rename(f"{source}.{theirs}.{{*}}", f"{target}.{ours}.{{*}}") for theirs, ours in _DOUBLE.items()),
        *(Rename(f"{source}.{theirs}.weight", f"{target}.{ours}.scale") for theirs, ours in _DOUBLE_NORMS.items()),
        Fuse(tuple(f"{source}.attn.to_{part}.{{*}}" for part in "qkv"), f"{target}.img_attn.qkv.{{*}}"),
        Fuse(tuple(f"{source}.attn.add_{part}_proj.{{*}}" for part in "qkv"), f"{target}.txt_attn.qkv.{{*}}"),
    )


def _single_block(source: str, target: str) -> tuple[Rule, ...]:
    fused = (*(f"{source}.attn.to_{part}.{{*}}" for part in "qkv"), f"{source}.proj_mlp.{{*}}")
    return (
        Rename(f"{source}.norm.linear.{{*}}", f"{target}.modulation.lin.{{*}}"),
        Rename(f"{source}.attn.norm_q.weight", f"{target}.norm.query_norm.scale"),
        Rename(f"{source}.attn.norm_k.weight", f"{target}.norm.key_norm.scale"),
        Fuse(fused, f"{target}.linear1.{{*}}"),
        Rename(f"{source}.proj_out.{{*}}", f"{target}.linear2.{{*}}"),
    )


BLOCKS: tuple[Rule, ...] = (
    *(Rename(f"{theirs}.{{*}}", f"{ours}.{{*}}") for theirs, ours in _EMBEDDERS.items()),
    *_double_block("transformer_blocks.{n}", "double_blocks.{n}"),
    *_single_block("single_transformer_blocks.{n}", "single_blocks.{n}"),
)
"""Embedders and blocks under the names of diffusers."""

DIFFUSERS: tuple[Rule, ...] = (
    *BLOCKS,
    # diffusers has the scale before the shift.
    ReorderChunks("norm_out.linear.{*}", "final_layer.adaLN_modulation.1.{*}", (1, 0)),
    Rename("proj_out.{*}", "final_layer.linear.{*}"),
)
"""Transformer under the names of diffusers, as in `transformer/*.safetensors`."""

CONTROLNET: tuple[Rule, ...] = BLOCKS
"""ControlNet under the names of diffusers; those of its own parts are ours."""

_XLABS_DOUBLE = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
}

XLABS_LORA: tuple[Rule, ...] = (
    *(
        Rename(f"double_blocks.{{n}}.{theirs}.{{*}}", f"double_blocks.{{n}}.{ours}.{{*}}")
        for theirs, ours in _XLABS_DOUBLE.items()
    ),
    # XLabs changes queries, keys and values alone; the rest of the fused weight has a name here and in no file.
    Fuse(
        ("single_blocks.{n}.processor.qkv_lora.{*}", "single_blocks.{n}.mlp.{*}"),
        "single_blocks.{n}.linear1.{*}",
    ),
    Rename("single_blocks.{n}.processor.proj_lora.{*}", "single_blocks.{n}.linear2.{*}"),
)
"""Layers of LoRAs that were trained with XLabs' code, which names them after the attention processors."""

_OWN_DOUBLE = {
    "norm1_a.linear": "img_mod.lin",
    "norm1_b.linear": "txt_mod.lin",
    "attn.a_to_qkv": "img_attn.qkv",
    "attn.b_to_qkv": "txt_attn.qkv",
    "attn.a_to_out": "img_attn.proj",
    "attn.b_to_out": "txt_attn.proj",
    "ff_a.0": "img_mlp.0",
    "ff_a.2": "img_mlp.2",
    "ff_b.0": "txt_mlp.0",
    "ff_b.2": "txt_mlp.2",
}
_OWN_DOUBLE_NORMS = {
    "attn.norm_q_a": "img_attn.norm.query_norm",
    "attn.norm_k_a": "img_attn.norm.key_norm",
    "attn.norm_q_b": "txt_attn.norm.query_norm",
    "attn.norm_k_b": "txt_attn.norm.key_norm",
}
_OWN_EMBEDDERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_embedder.timestep_embedder.0": "time_in.in_layer",
    "time_embedder.timestep_embedder.2": "time_in.out_layer",
    "guidance_embedder.timestep_embedder.0": "guidance_in.in_layer",
    "guidance_embedder.timestep_embedder.2": "guidance_in.out_layer",
    "pooled_text_embedder.0": "vector_in.in_layer",
    "pooled_text_embedder.2": "vector_in.out_layer",
    "final_norm_out.linear": "final_layer.adaLN_modulation.1",
    "final_proj_out": "final_layer.linear",
}

DIFFSYNTH_STUDIO: tuple[Rule, ...] = (
    *(Rename(f"{theirs}.{{*}}", f"{ours}.{{*}}") for theirs, ours in _OWN_EMBEDDERS.items()),
    *(
        Rename(f"blocks.{{n}}.{theirs}.{{*}}", f"double_blocks.{{n}}.{ours}.{{*}}")
        for theirs, ours in _OWN_DOUBLE.items()
    ),
    *(
        Rename(f"blocks.{{n}}.{theirs}.weight", f"double_blocks.{{n}}.{ours}.scale")
        for theirs, ours in _OWN_DOUBLE_NORMS.items()
    ),
    Rename("single_blocks.{n}.norm.linear.{*}", "single_blocks.{n}.modulation.lin.{*}"),
    Rename("single_blocks.{n}.norm_q_a.weight", "single_blocks.{n}.norm.query_norm.scale"),
    Rename("single_blocks.{n}.norm_k_a.weight", "single_blocks.{n}.norm.key_norm.scale"),
    Rename("single_blocks.{n}.to_qkv_mlp.{*}", "single_blocks.{n}.linear1.{*}"),
    Rename("single_blocks.{n}.proj_out.{*}", "single_blocks.{n}.linear2.{*}"),
)
"""Transformer under the names of DiffSynth-Studio's own network, in its LoRAs and in full weights that it trained."""

_FINAL_NORM = "final_norm_out.linear.{*}"

NEXUS_GEN: tuple[Rule, ...] = (
    *(
        Rename(f"pipe.dit.{rule.source}", rule.target)
        for rule in DIFFSYNTH_STUDIO
        if isinstance(rule, Rename) and rule.source != _FINAL_NORM
    ),
    # An older version of that network had the scale before the shift.
    ReorderChunks(f"pipe.dit.{_FINAL_NORM}", "final_layer.adaLN_modulation.1.{*}", (1, 0)),
    Drop("adapter.{*}", "Nexus-Gen's adapter is not supported"),
)
"""Transformer in a decoder of Nexus-Gen, under the names of an older version of DiffSynth-Studio's own network."""

_CLIP_UNUSED = (
    Drop("text_model.embeddings.position_ids", "older versions of transformers saved it"),
    Drop("text_projection.weight", "FLUX.1 takes the pooled hidden state before the projection"),
    Drop("logit_scale"),
)

CLIP: tuple[Rule, ...] = _CLIP_UNUSED
"""CLIP's text encoder under its published names, without the parts that FLUX.1 does not use."""

CLIP_WITHOUT_PREFIX: tuple[Rule, ...] = (
    Drop("embeddings.position_ids"),
    *(
        Rename(f"{name}.{{*}}", f"text_model.{name}.{{*}}")
        for name in ("embeddings", "encoder.layers", "final_layer_norm")
    ),
    *_CLIP_UNUSED[1:],
)
"""CLIP's text encoder as transformers 5 names it."""

_T5_UNUSED = (Drop("decoder.{*}"), Drop("lm_head.weight"))

T5: tuple[Rule, ...] = (Drop("encoder.embed_tokens.weight", "it equals shared.weight"), *_T5_UNUSED)
"""T5's encoder under its published names; the token embeddings may be there twice, and the decoder is dropped."""

T5_WITHOUT_SHARED: tuple[Rule, ...] = (Rename("encoder.embed_tokens.weight", "shared.weight"), *_T5_UNUSED)
"""T5's encoder with the token embeddings under their other name."""
