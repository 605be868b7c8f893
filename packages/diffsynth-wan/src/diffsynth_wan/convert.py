"""Key rules of published layouts whose names differ from our parameter names.

Our parameter names are those of the original files (`diffusion_pytorch_model*.safetensors`, `models_t5_*.pth`,
`Wan2.2_VAE.pth`), which need no rules.
"""

from __future__ import annotations

from typing import Any

from diffsynth.core.loader.convert import Apply, Drop, Fuse, Rename, Reshape, Rule
from diffsynth.models.convert import WAN_LATENT_CONVS, wan_ends, wan_resampling, wan_residual_blocks

NETWORK = (
    "patch_embedding.{*}",
    "text_embedding.{*}",
    "time_embedding.{*}",
    "time_projection.{*}",
    "blocks.{n}.{*}",
    "head.{*}",
    "img_emb.{*}",
)
VACE = ("vace_patch_embedding.{*}", "vace_blocks.{n}.{*}")
ANIMATE = ("pose_patch_embedding.{*}", "motion_encoder.{*}", "face_adapter.{*}", "face_encoder.{*}")
DIFFUSERS_NETWORK = (
    "patch_embedding.{*}",
    "condition_embedder.{*}",
    "blocks.{n}.{*}",
    "scale_shift_table",
    "proj_out.{*}",
)
"""Key patterns of each component in a file that holds several; the rules of one component drop those of the others."""

MOTION_BLOCKS = 7
"""Number of downsampling blocks of the published motion encoder; diffusers counts them from 0, the original from 1."""


def _without(names: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Drop(name, "another component") for name in names)


def _renamed(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rename(theirs, ours) for theirs, ours in names.items())


def _attention(theirs: str, ours: str) -> dict[str, str]:
    """Return a dict pattern of parameter names in diffusers -> pattern of ours, for an attention module with those for
    image tokens: `"{theirs}.to_q.{*}"` -> `"{ours}.q.{*}"`.
    """
    return {
        f"{theirs}.to_q.{{*}}": f"{ours}.q.{{*}}",
        f"{theirs}.to_k.{{*}}": f"{ours}.k.{{*}}",
        f"{theirs}.to_v.{{*}}": f"{ours}.v.{{*}}",
        f"{theirs}.to_out.0.{{*}}": f"{ours}.o.{{*}}",
        f"{theirs}.add_k_proj.{{*}}": f"{ours}.k_img.{{*}}",
        f"{theirs}.add_v_proj.{{*}}": f"{ours}.v_img.{{*}}",
        f"{theirs}.norm_added_k.{{*}}": f"{ours}.norm_k_img.{{*}}",
        f"{theirs}.norm_q.{{*}}": f"{ours}.norm_q.{{*}}",
        f"{theirs}.norm_k.{{*}}": f"{ours}.norm_k.{{*}}",
    }


def _diffusers_block(block: str) -> tuple[Rule, ...]:
    return (
        # Old files have a norm of image queries that no network uses.
        Drop(f"{block}.attn2.norm_added_q.{{*}}", "unused"),
        *_renamed(
            {
                f"{block}.scale_shift_table": f"{block}.modulation",
                **_attention(f"{block}.attn1", f"{block}.self_attn"),
                **_attention(f"{block}.attn2", f"{block}.cross_attn"),
                f"{block}.norm2.{{*}}": f"{block}.norm3.{{*}}",
                f"{block}.ffn.net.0.proj.{{*}}": f"{block}.ffn.0.{{*}}",
                f"{block}.ffn.net.2.{{*}}": f"{block}.ffn.2.{{*}}",
            }
        ),
    )


def _blur_kernel() -> Any:
    from diffsynth_wan.variants.motion_encoder import blur_kernel

    return blur_kernel()


def _diffusers_motion_block(number: int) -> tuple[Rule, ...]:
    theirs, ours = f"motion_encoder.res_blocks.{number}", f"motion_encoder.enc.net_app.convs.{number + 1}"
    return (
        Rename(f"{theirs}.conv1.weight", f"{ours}.conv1.0.weight"),
        Reshape(f"{theirs}.conv1.act_fn.bias", f"{ours}.conv1.1.bias", (1, -1, 1, 1)),
        Rename(f"{theirs}.conv2.weight", f"{ours}.conv2.1.weight"),
        Reshape(f"{theirs}.conv2.act_fn.bias", f"{ours}.conv2.2.bias", (1, -1, 1, 1)),
        Rename(f"{theirs}.conv_skip.weight", f"{ours}.skip.1.weight"),
        *(Apply(_blur_kernel, (), f"{ours}.{way}.0.kernel", lambda: (4, 4)) for way in ("conv2", "skip")),
    )


WITHOUT_VACE: tuple[Rule, ...] = _without(VACE)
"""Transformer in a file that also holds VACE."""

WITHOUT_ANIMATE: tuple[Rule, ...] = _without(ANIMATE)
"""Transformer in a file that also holds Animate's adapter."""

WITHOUT_NETWORK: tuple[Rule, ...] = _without(NETWORK)
"""VACE or Animate's adapter in a file that also holds the transformer."""

ANIMATE_2: tuple[Rule, ...] = (Rename("blocks.{n}.block.{*}", "blocks.{n}.{*}"),)
"""Transformer of Animate-2, whose blocks have the prefix `block.`."""

DIFFUSERS: tuple[Rule, ...] = (
    *_renamed(
        {
            "condition_embedder.time_embedder.linear_1.{*}": "time_embedding.0.{*}",
            "condition_embedder.time_embedder.linear_2.{*}": "time_embedding.2.{*}",
            "condition_embedder.time_proj.{*}": "time_projection.1.{*}",
            "condition_embedder.text_embedder.linear_1.{*}": "text_embedding.0.{*}",
            "condition_embedder.text_embedder.linear_2.{*}": "text_embedding.2.{*}",
            "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
            "condition_embedder.image_embedder.norm1.{*}": "img_emb.proj.0.{*}",
            "condition_embedder.image_embedder.ff.net.0.proj.{*}": "img_emb.proj.1.{*}",
            "condition_embedder.image_embedder.ff.net.2.{*}": "img_emb.proj.3.{*}",
            "condition_embedder.image_embedder.norm2.{*}": "img_emb.proj.4.{*}",
            "scale_shift_table": "head.modulation",
            "proj_out.{*}": "head.head.{*}",
        }
    ),
    *_diffusers_block("blocks.{n}"),
)
"""Transformer in diffusers' `transformer/`."""

DIFFUSERS_WITHOUT_VACE: tuple[Rule, ...] = (*WITHOUT_VACE, *DIFFUSERS)
DIFFUSERS_WITHOUT_ANIMATE: tuple[Rule, ...] = (*WITHOUT_ANIMATE, *DIFFUSERS)

DIFFUSERS_VACE: tuple[Rule, ...] = (
    *_without(DIFFUSERS_NETWORK),
    Rename("vace_blocks.{n}.proj_in.{*}", "vace_blocks.{n}.before_proj.{*}"),
    Rename("vace_blocks.{n}.proj_out.{*}", "vace_blocks.{n}.after_proj.{*}"),
    *_diffusers_block("vace_blocks.{n}"),
)
"""VACE in diffusers' `transformer/`."""

DIFFUSERS_ANIMATE: tuple[Rule, ...] = (
    *_without(DIFFUSERS_NETWORK),
    *(rule for number in range(MOTION_BLOCKS) for rule in _diffusers_motion_block(number)),
    Rename("motion_encoder.conv_in.weight", "motion_encoder.enc.net_app.convs.0.0.weight"),
    Reshape("motion_encoder.conv_in.act_fn.bias", "motion_encoder.enc.net_app.convs.0.1.bias", (1, -1, 1, 1)),
    Rename("motion_encoder.conv_out.weight", f"motion_encoder.enc.net_app.convs.{MOTION_BLOCKS + 1}.weight"),
    Rename("motion_encoder.motion_network.{*}", "motion_encoder.enc.fc.{*}"),
    Rename("motion_encoder.motion_synthesis_weight", "motion_encoder.dec.direction.weight"),
    *_renamed(
        {f"face_encoder.{name}.{{*}}": f"face_encoder.{name}.conv.{{*}}" for name in ("conv1_local", "conv2", "conv3")}
    ),
    *(
        Fuse(
            (f"face_adapter.{{n}}.to_k.{kind}", f"face_adapter.{{n}}.to_v.{kind}"),
            f"face_adapter.fuser_blocks.{{n}}.linear1_kv.{kind}",
        )
        for kind in ("weight", "bias")
    ),
    *_renamed(
        {
            "face_adapter.{n}.to_q.{*}": "face_adapter.fuser_blocks.{n}.linear1_q.{*}",
            "face_adapter.{n}.to_out.{*}": "face_adapter.fuser_blocks.{n}.linear2.{*}",
            "face_adapter.{n}.norm_q.{*}": "face_adapter.fuser_blocks.{n}.q_norm.{*}",
            "face_adapter.{n}.norm_k.{*}": "face_adapter.fuser_blocks.{n}.k_norm.{*}",
        }
    ),
)
"""Animate's adapter in diffusers' `transformer/`."""

DIFFUSERS_ANIMATE_2: tuple[Rule, ...] = _renamed(
    {
        **_attention("blocks.{n}.self_attn", "blocks.{n}.self_attn"),
        **_attention("blocks.{n}.cross_attn", "blocks.{n}.cross_attn"),
    }
)
"""Transformer of Animate-2 in diffusers' `transformer/`; only attention has other names."""


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
    Drop("encoder.embed_tokens.weight", "a copy of shared.weight"),
)
"""Text encoder as transformers' `UMT5EncoderModel`."""

TEXT_ENCODER_TRANSFORMERS_TIED = _text_encoder_transformers("encoder.embed_tokens.weight")
"""Text encoder as transformers' `UMT5EncoderModel`, saved without `shared.weight`, a copy of the embedding."""

IMAGE_ENCODER: tuple[Rule, ...] = (
    Drop("visual.transformer.31.{*}", "Wan uses the output of block 30"),
    Drop("visual.post_norm.{*}"),
    Drop("visual.head"),
    Rename("visual.{*}", "{*}"),
    Drop("textual.{*}", "the text tower"),
    Drop("log_scale"),
)
"""Image encoder in the published CLIP file, with or without the text tower."""


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
        Drop("vision_model.encoder.layers.31.{*}", "Wan uses the output of layer 30"),
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
"""Image encoder as transformers' `CLIPVisionModelWithProjection`; `pre_layrnorm` is their spelling."""

WAN22_AUTOENCODER_DIFFUSERS: tuple[Rule, ...] = (
    *wan_ends("encoder"),
    *wan_residual_blocks("encoder.down_blocks.{n}.resnets.{m}", "encoder.downsamples.{n}.downsamples.{m}"),
    *wan_resampling("encoder.down_blocks.{n}.downsampler", "encoder.downsamples.{n}.downsamples.2"),
    *WAN_LATENT_CONVS,
    *wan_ends("decoder"),
    *wan_residual_blocks("decoder.up_blocks.{n}.resnets.{m}", "decoder.upsamples.{n}.upsamples.{m}"),
    *wan_resampling("decoder.up_blocks.{n}.upsampler", "decoder.upsamples.{n}.upsamples.3"),
)
"""Autoencoder of Wan 2.2 in diffusers' `vae/`."""
