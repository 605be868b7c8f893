"""Key rules of FLUX.2 layouts whose names differ from our parameter names, those of the diffusers folders."""

from __future__ import annotations

from diffsynth.core.loader.convert import Drop, Rename, ReorderChunks, Rule, Split
from diffsynth.models.convert import FLUX_AUTOENCODER_ORIGINAL

_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def _weights(names: dict[str, str], source: str = "", target: str = "", *, ending: str = "weight") -> list[Rule]:
    return [Rename(f"{source}{theirs}.{ending}", f"{target}{ours}.weight") for theirs, ours in names.items()]


_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


def _fused(source: str, names: tuple[str, str, str]) -> Split:
    return Split(source, tuple(f"transformer_blocks.{{n}}.attn.{name}.weight" for name in names))


_DOUBLE_BLOCK, _SINGLE_BLOCK = "double_blocks.{n}.", "single_blocks.{n}."
_OUR_DOUBLE_BLOCK, _OUR_SINGLE_BLOCK = "transformer_blocks.{n}.", "single_transformer_blocks.{n}."

ORIGINAL_DIT: tuple[Rule, ...] = (
    *_weights(_OUTER),
    # The original has shift, then scale.
    ReorderChunks("final_layer.adaLN_modulation.1.weight", "norm_out.linear.weight", (1, 0)),
    _fused("double_blocks.{n}.img_attn.qkv.weight", _IMAGE),
    _fused("double_blocks.{n}.txt_attn.qkv.weight", _TEXT),
    *_weights(_DOUBLE, _DOUBLE_BLOCK, _OUR_DOUBLE_BLOCK),
    *_weights(_DOUBLE_NORMS, _DOUBLE_BLOCK, _OUR_DOUBLE_BLOCK, ending="scale"),
    *_weights(_SINGLE, _SINGLE_BLOCK, _OUR_SINGLE_BLOCK),
    *_weights(_SINGLE_NORMS, _SINGLE_BLOCK, _OUR_SINGLE_BLOCK, ending="scale"),
)
"""Transformer under the names of the original code, as in single files such as `flux2-dev.safetensors`."""

FUSED_LORA: tuple[Rule, ...] = (
    _fused("transformer_blocks.{n}.attn.to_qkv.weight", _IMAGE),
    _fused("transformer_blocks.{n}.attn.to_added_qkv.weight", _TEXT),
    Rename("sformer_blocks.{n}.{*}", "transformer_blocks.{n}.{*}"),
)
"""Layers of LoRAs of the network of diffusers with joined projections, as diffusers writes LoKr, and the shortened
names of blocks in some files."""

ORIGINAL_AUTOENCODER: tuple[Rule, ...] = (
    Rename("encoder.quant_conv.{*}", "quant_conv.{*}"),
    Rename("decoder.post_quant_conv.{*}", "post_quant_conv.{*}"),
    *FLUX_AUTOENCODER_ORIGINAL,
)
"""Autoencoder under the names of the original code, as in `ae.safetensors` of FLUX.2."""

MISTRAL: tuple[Rule, ...] = (
    Rename("language_model.model.{*}", "language_model.model.{*}"),
    Drop("language_model.lm_head.weight", "FLUX.2 reads hidden states only"),
    Drop("vision_tower.{*}", "FLUX.2 encodes text only"),
    Drop("multi_modal_projector.{*}", "FLUX.2 encodes text only"),
)
"""Text encoder of FLUX.2-dev in a file of the whole vision-language model."""
