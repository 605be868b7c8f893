"""Key rules of published layouts of the shared networks whose names differ from our parameter names."""

from __future__ import annotations

from diffsynth.core.loader.convert import Drop, Rename, Reshape, Rule

_LEVELS = 4


def _residual_blocks(source: str, target: str) -> tuple[Rule, ...]:
    names = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
    return tuple(Rename(f"{source}.{theirs}.{{*}}", f"{target}.{ours}.{{*}}") for theirs, ours in names.items())


def _middle(side: str) -> tuple[Rule, ...]:
    source, target = f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0"
    rules = [
        *_residual_blocks(f"{side}.mid.block_1", f"{side}.mid_block.resnets.0"),
        *_residual_blocks(f"{side}.mid.block_2", f"{side}.mid_block.resnets.1"),
        Rename(f"{source}.norm.{{*}}", f"{target}.group_norm.{{*}}"),
    ]
    for theirs, ours in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}.items():
        # The original has 1x1 convolutions, this package linear layers.
        weight = Reshape(f"{source}.{theirs}.weight", f"{target}.{ours}.weight", (0, 0))
        rules += [weight, Rename(f"{source}.{theirs}.bias", f"{target}.{ours}.bias")]
    return tuple(rules)


def _up(level: int) -> tuple[Rule, ...]:
    # The original numbers the decoder's levels from full resolution on, this package in the order they run.
    source, target = f"decoder.up.{level}", f"decoder.up_blocks.{_LEVELS - 1 - level}"
    return (
        *_residual_blocks(f"{source}.block.{{n}}", f"{target}.resnets.{{n}}"),
        Rename(f"{source}.upsample.conv.{{*}}", f"{target}.upsamplers.0.conv.{{*}}"),
    )


def _ends(side: str) -> tuple[Rule, ...]:
    names = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    return tuple(Rename(f"{side}.{theirs}.{{*}}", f"{side}.{ours}.{{*}}") for theirs, ours in names.items())


FLUX_AUTOENCODER_ORIGINAL: tuple[Rule, ...] = (
    *_ends("encoder"),
    *_residual_blocks("encoder.down.{n}.block.{m}", "encoder.down_blocks.{n}.resnets.{m}"),
    Rename("encoder.down.{n}.downsample.conv.{*}", "encoder.down_blocks.{n}.downsamplers.0.conv.{*}"),
    *_middle("encoder"),
    *_ends("decoder"),
    *_middle("decoder"),
    *(rule for level in range(_LEVELS) for rule in _up(level)),
)
"""Autoencoder in `ae.safetensors` of FLUX.1."""

QWEN3_WITH_HEAD: tuple[Rule, ...] = (Rename("model.{*}", "model.{*}"), Drop("lm_head.weight"))
"""Text encoder in a file of the whole language model; its head is dropped."""

QWEN25_VL: tuple[Rule, ...] = (
    Rename("model.{*}", "model.{*}"),
    Rename("visual.{*}", "visual.{*}"),
    Drop("lm_head.weight", "only hidden states are read"),
)
"""Qwen2.5-VL as published, with its head, which is dropped."""

QWEN25_VL_NESTED: tuple[Rule, ...] = (
    Rename("model.language_model.{*}", "model.{*}"),
    Rename("model.visual.{*}", "visual.{*}"),
    Drop("lm_head.weight", "only hidden states are read"),
)
"""Qwen2.5-VL as newer versions of transformers save it."""

_WAN_RESIDUAL = {"norm1": "0", "conv1": "2", "norm2": "3", "conv2": "6"}


def wan_residual_blocks(source: str, target: str) -> tuple[Rule, ...]:
    """Return a tuple of `Rename` rules for a causal residual block, from diffusers' parameter names below `source` to
    ours below `target`.
    """
    return (
        *(
            Rename(f"{source}.{theirs}.{{*}}", f"{target}.residual.{ours}.{{*}}")
            for theirs, ours in _WAN_RESIDUAL.items()
        ),
        Rename(f"{source}.conv_shortcut.{{*}}", f"{target}.shortcut.{{*}}"),
    )


def wan_resampling(source: str, target: str) -> tuple[Rule, ...]:
    """Return a tuple of `Rename` rules for a down- or upsampling layer, from diffusers' parameter names below `source`
    to ours below `target`.
    """
    return tuple(Rename(f"{source}.{name}.{{*}}", f"{target}.{name}.{{*}}") for name in ("resample", "time_conv"))


def wan_ends(side: str) -> tuple[Rule, ...]:
    """Return a tuple of `Rename` rules, from diffusers' parameter names to ours, for the first and last layers and
    middle block of `side` ("encoder" or "decoder").
    """
    names = {"conv_in": "conv1", "mid_block.attentions.0": "middle.1", "norm_out": "head.0", "conv_out": "head.2"}
    return (
        *(Rename(f"{side}.{theirs}.{{*}}", f"{side}.{ours}.{{*}}") for theirs, ours in names.items()),
        *wan_residual_blocks(f"{side}.mid_block.resnets.0", f"{side}.middle.0"),
        *wan_residual_blocks(f"{side}.mid_block.resnets.1", f"{side}.middle.2"),
    )


WAN_LATENT_CONVS: tuple[Rule, ...] = (
    Rename("quant_conv.{*}", "conv1.{*}"),
    Rename("post_quant_conv.{*}", "conv2.{*}"),
)
"""Rules for the convolutions before and after the latents in diffusers' layout."""


def _wan_up_blocks() -> tuple[Rule, ...]:
    # diffusers groups by resolution (three residual blocks and one upsampling layer); this package has one flat list.
    rules: list[Rule] = []
    for level in range(_LEVELS):
        source = f"decoder.up_blocks.{level}"
        for index in range(3):
            rules += wan_residual_blocks(f"{source}.resnets.{index}", f"decoder.upsamples.{4 * level + index}")
        rules += wan_resampling(f"{source}.upsamplers.0", f"decoder.upsamples.{4 * level + 3}")
    return tuple(rules)


WAN_AUTOENCODER_DIFFUSERS: tuple[Rule, ...] = (
    *wan_ends("encoder"),
    *wan_residual_blocks("encoder.down_blocks.{n}", "encoder.downsamples.{n}"),
    *wan_resampling("encoder.down_blocks.{n}", "encoder.downsamples.{n}"),
    *WAN_LATENT_CONVS,
    *wan_ends("decoder"),
    *_wan_up_blocks(),
)
"""Autoencoder of Qwen-Image and of Wan 2.1 in diffusers' `vae/`."""

SIGLIP: tuple[Rule, ...] = (Drop("text_model.{*}"), Drop("logit_scale"), Drop("logit_bias"))
"""SigLIP's image encoder in a file of the whole model; the text encoder is dropped."""

SIGLIP_VISION_ONLY: tuple[Rule, ...] = tuple(
    Rename(f"{part}.{{*}}", f"vision_model.{part}.{{*}}")
    for part in ("embeddings", "encoder", "post_layernorm", "head")
)
"""SigLIP's image encoder in a file of its own, without the prefix that it has in the whole model."""

DINOV3: tuple[Rule, ...] = (Drop("embeddings.mask_token", "only pre-training masks patches"),)
"""DINOv3's image encoder under its published names."""
