"""Key rules of Wan layouts whose names are not our own (those are of the original `diffusion_pytorch_model` files)."""

from __future__ import annotations

from typing import Any

from diffsynth.core.loader.convert import Apply, Drop, Fuse, Rename, Reshape, Rule

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
"""Names of one part of a file, by which the rules of another part leave it out."""

FACE_HALVINGS = 7
"""Blocks of the motion encoder in the published size; their numbers differ by one between layouts."""


def _without(names: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Drop(name, "of another component") for name in names)


def _renamed(names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rename(theirs, ours) for theirs, ours in names.items())


def _attention(theirs: str, ours: str) -> dict[str, str]:
    """Of diffusers, with the keys of an image, and with the output projection in a list."""
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
        # Old files have a norm of queries for the image that no network reads.
        Drop(f"{block}.attn2.norm_added_q.{{*}}", "never read"),
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


def _diffusers_halving(number: int) -> tuple[Rule, ...]:
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
"""The network in a file that also holds VACE."""

WITHOUT_ANIMATE: tuple[Rule, ...] = _without(ANIMATE)
"""The network in a file that also holds Animate's adapter."""

WITHOUT_NETWORK: tuple[Rule, ...] = _without(NETWORK)
"""VACE or Animate's adapter in a file that also holds the network."""

ANIMATE_2: tuple[Rule, ...] = (Rename("blocks.{n}.block.{*}", "blocks.{n}.{*}"),)
"""Animate-2, whose blocks are wrapped."""

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
"""The network in diffusers' `transformer/`."""

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
    *(rule for number in range(FACE_HALVINGS) for rule in _diffusers_halving(number)),
    Rename("motion_encoder.conv_in.weight", "motion_encoder.enc.net_app.convs.0.0.weight"),
    Reshape("motion_encoder.conv_in.act_fn.bias", "motion_encoder.enc.net_app.convs.0.1.bias", (1, -1, 1, 1)),
    Rename("motion_encoder.conv_out.weight", f"motion_encoder.enc.net_app.convs.{FACE_HALVINGS + 1}.weight"),
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
"""Animate-2 in diffusers' `transformer/`, whose attention alone has other names."""
