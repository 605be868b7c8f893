"""Key rules of the encoders' published layouts."""

from __future__ import annotations

from typing import Any

from diffsynth.core.loader.convert import Apply, Drop, Fuse, Rename, Rule


def _text_encoder_transformers(embedding: str) -> tuple[Rule, ...]:
    block, ours = "encoder.block.{n}", "blocks.{n}"
    attention = f"{block}.layer.0.SelfAttention"
    feed_forward = f"{block}.layer.1.DenseReluDense"
    return (
        Rename(embedding, "token_embedding.weight"),
        *(Rename(f"{attention}.{part}.weight", f"{ours}.attn.{part}.weight") for part in "qkvo"),
        Rename(f"{attention}.relative_attention_bias.weight", f"{ours}.pos_embedding.embedding.weight"),
        Rename(f"{block}.layer.0.layer_norm.weight", f"{ours}.norm1.weight"),
        Rename(f"{feed_forward}.wi_0.weight", f"{ours}.ffn.gate.0.weight"),
        Rename(f"{feed_forward}.wi_1.weight", f"{ours}.ffn.fc1.weight"),
        Rename(f"{feed_forward}.wo.weight", f"{ours}.ffn.fc2.weight"),
        Rename(f"{block}.layer.1.layer_norm.weight", f"{ours}.norm2.weight"),
        Rename("encoder.final_layer_norm.weight", "norm.weight"),
    )


TEXT_ENCODER_TRANSFORMERS = (
    *_text_encoder_transformers("shared.weight"),
    Drop("encoder.embed_tokens.weight", "the same table again"),
)
"""The names of transformers' `UMT5EncoderModel`."""

TEXT_ENCODER_TRANSFORMERS_TIED = _text_encoder_transformers("encoder.embed_tokens.weight")
"""The same, where of the two names of the one embedding the writer kept the encoder's."""

IMAGE_ENCODER: tuple[Rule, ...] = (
    Drop("visual.transformer.31.{*}", "Wan reads what comes out of block 30"),
    Drop("visual.post_norm.{*}"),
    Drop("visual.head"),
    Rename("visual.{*}", "{*}"),
    Drop("textual.{*}", "the text tower"),
    Drop("log_scale"),
)
"""The whole CLIP of both towers, as published; and the same with the text tower left out."""


def _batch_of_one(tensor: Any) -> Any:
    return tensor[None]


def _sequence_of_one(tensor: Any) -> Any:
    return tensor[None, None]


def _image_encoder_transformers() -> tuple[Rule, ...]:
    layer, ours = "vision_model.encoder.layers.{n}", "transformer.{n}"
    embeddings = "vision_model.embeddings"
    fused = [
        Fuse(tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"), f"{ours}.attn.to_qkv.{kind}", 0)
        for kind in ("weight", "bias")
    ]
    names = {
        "self_attn.out_proj": "attn.proj",
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.2",
    }
    return (
        Drop("vision_model.encoder.layers.31.{*}", "Wan reads what comes out of layer 30"),
        Apply(_sequence_of_one, (f"{embeddings}.class_embedding",), "cls_embedding", lambda shape: (1, 1, *shape)),
        Apply(_batch_of_one, (f"{embeddings}.position_embedding.weight",), "pos_embedding", lambda shape: (1, *shape)),
        Rename(f"{embeddings}.patch_embedding.weight", "patch_embedding.weight"),
        Rename("vision_model.pre_layrnorm.{*}", "pre_norm.{*}"),
        *fused,
        *(Rename(f"{layer}.{theirs}.{{*}}", f"{ours}.{own}.{{*}}") for theirs, own in names.items()),
        Drop("vision_model.post_layernorm.{*}"),
        Drop("visual_projection.weight"),
        Drop("vision_model.embeddings.position_ids", "0, 1, 2, ..."),
    )


IMAGE_ENCODER_TRANSFORMERS = _image_encoder_transformers()
"""The names of transformers' `CLIPVisionModelWithProjection`, spelling included."""
