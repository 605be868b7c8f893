"""Configs of the shared networks, and functions that infer them from the shapes in a file. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from diffsynth.core.loader.shapes import Shapes, count_items

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class FluxAutoencoderConfig:
    """Config of the autoencoder of FLUX.1 and Z-Image.

    Args:
        in_channels: channels of the image.
        latent_channels: channels of the latents.
        block_out_channels: channels at each resolution, full resolution first; each further one halves the side.
        layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
        norm_groups: number of groups of every group norm.
        scaling_factor, shift_factor: scaled latents are `(z - shift_factor) * scaling_factor`.
    """

    in_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        if any(channels % self.norm_groups for channels in self.block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels} must be multiples of norm_groups={self.norm_groups}"
            )

    @property
    def factor(self) -> int:
        """Number of image pixels per latent pixel along one side, an int (8 by default)."""
        return 1 << (len(self.block_out_channels) - 1)


TINY_FLUX_AUTOENCODER = FluxAutoencoderConfig(block_out_channels=(64, 64, 128, 128), layers_per_block=1)


def tiny_flux_autoencoder_inputs(config: FluxAutoencoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict argument name -> value for `FluxAutoencoder.forward`: two random images, not square, fp32 on the
    CPU.
    """
    import torch

    size = (3 * config.factor, 2 * config.factor)
    return {"image": torch.rand(2, config.in_channels, *size, generator=generator) * 2 - 1}


def infer_flux_autoencoder_config(shapes: Shapes) -> FluxAutoencoderConfig:
    """Return the `FluxAutoencoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: the file is of another autoencoder with similar names.
    """
    foreign = [name for name in shapes if name.startswith(("quant_conv", "post_quant_conv", "bn."))]
    if foreign:
        raise ValueError(f"it has {foreign[0]}, which the autoencoder of FLUX.1 does not have")
    levels = count_items(shapes, "encoder.down_blocks")
    latent_channels = shapes["decoder.conv_in.weight"][1]
    if shapes["encoder.conv_out.weight"][0] != 2 * latent_channels:
        raise ValueError(
            f"the encoder gives {shapes['encoder.conv_out.weight'][0]} channels; "
            f"expected mean and variance of {latent_channels} latent channels"
        )
    return FluxAutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=latent_channels,
        block_out_channels=tuple(
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)
        ),
        layers_per_block=count_items(shapes, "encoder.down_blocks.0.resnets"),
    )


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Config of a decoder-only language model without its head; see `diffsynth.models.language_model`.

    Args:
        hidden_size: width of the hidden states.
        num_layers: number of layers in the file; forward() runs only those that it needs.
        num_heads: number of query heads.
        num_kv_heads: number of key and value heads.
        head_dim: channels of a head; all heads together may be wider or narrower than `hidden_size`.
        intermediate_size: inner width of the gated feed-forward.
        vocab_size: number of token embeddings.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of all RMS norms.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rope_theta: float
    norm_eps: float


@dataclass(frozen=True, kw_only=True)
class Qwen3TextEncoderConfig(LanguageModelConfig):
    """Config of a Qwen3 language model without its head (arXiv:2505.09388); the defaults are Qwen3-4B.

    Args:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size, rope_theta, norm_eps:
            see `LanguageModelConfig`.
    """

    hidden_size: int = 2560
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    vocab_size: int = 151936
    rope_theta: float = 1e6
    norm_eps: float = 1e-6


TINY_QWEN3_TEXT_ENCODER = Qwen3TextEncoderConfig(
    hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96, vocab_size=120
)


def tiny_qwen3_text_encoder_inputs(config: Qwen3TextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict argument name -> value for `Qwen3TextEncoder.forward`: token ids and mask of two random prompts,
    one padded on the right.
    """
    import torch

    return {
        "input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator),
        "attention_mask": (torch.arange(11)[None, :] < torch.tensor([[11], [6]])).long(),
    }


def infer_qwen3_text_encoder_config(shapes: Shapes) -> Qwen3TextEncoderConfig:
    """Return the `Qwen3TextEncoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: the file has no norm of queries per head, so it is not a Qwen3.
    """
    norm = "model.layers.0.self_attn.q_norm.weight"
    if norm not in shapes:
        raise ValueError(f"{norm} is missing: not a Qwen3")
    (head_dim,) = shapes[norm]
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    return Qwen3TextEncoderConfig(
        hidden_size=hidden_size,
        num_layers=count_items(shapes, "model.layers"),
        num_heads=shapes["model.layers.0.self_attn.q_proj.weight"][0] // head_dim,
        num_kv_heads=shapes["model.layers.0.self_attn.k_proj.weight"][0] // head_dim,
        head_dim=head_dim,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        vocab_size=vocab_size,
    )


@dataclass(frozen=True, kw_only=True)
class Qwen25VLTextEncoderConfig(LanguageModelConfig):
    """Config of Qwen2.5-VL without its head (arXiv:2502.13923); the defaults are Qwen2.5-VL-7B.

    Args:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size, rope_theta, norm_eps:
            see `LanguageModelConfig`.
        vision_hidden_size: width of the vision encoder.
        vision_layers: number of its blocks.
        vision_heads: number of its attention heads.
        vision_intermediate_size: inner width of its gated feed-forwards.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames of a patch; an image is repeated as often.
        merge_size: side, in patches, of the square that becomes one token of the language model.
        window_size: side, in pixels, of the windows in which most blocks attend.
        full_attention_layers: indices of the blocks that attend to the whole image.

    Raises:
        ValueError: a head dimension that does not split into the parts of the rotary embedding.
    """

    hidden_size: int = 3584
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    intermediate_size: int = 18944
    vocab_size: int = 152064
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    vision_hidden_size: int = 1280
    vision_layers: int = 32
    vision_heads: int = 16
    vision_intermediate_size: int = 3420
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window_size: int = 112
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)

    def __post_init__(self) -> None:
        object.__setattr__(self, "full_attention_layers", tuple(self.full_attention_layers))
        if self.head_dim % 16 or self.hidden_size != self.num_heads * self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} must be a multiple of 16, and hidden_size={self.hidden_size} must be "
                f"num_heads={self.num_heads} times as much"
            )

    @property
    def rope_sections(self) -> tuple[int, int, int]:
        """Tuple of the numbers of rotary frequencies of a head for time, row and column; a quarter of them is for time
        and the rest in equal parts for the others.
        """
        return self.head_dim // 8, self.head_dim * 3 // 16, self.head_dim * 3 // 16

    @property
    def patch_dim(self) -> int:
        """Number of values of a patch of an RGB image."""
        return 3 * self.temporal_patch_size * self.patch_size**2


TINY_QWEN25_VL_TEXT_ENCODER = Qwen25VLTextEncoderConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=96,
    vocab_size=120,
    vision_hidden_size=32,
    vision_layers=2,
    vision_heads=2,
    vision_intermediate_size=48,
    full_attention_layers=(1,),
)


def tiny_qwen25_vl_text_encoder_inputs(config: Qwen25VLTextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict argument name -> value for `Qwen25VLTextEncoder.forward`: token ids of two texts, one padded on the
    right, with an image of 4 x 6 patches in the first.
    """
    import torch

    image_mask = torch.zeros(2, 11, dtype=torch.bool)
    image_mask[0, 3:9] = True
    return {
        "input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator),
        "attention_mask": (torch.arange(11)[None, :] < torch.tensor([[11], [6]])).long(),
        "patches": torch.randn(24, config.patch_dim, generator=generator),
        "grids": ((4, 6),),
        "image_mask": image_mask,
    }


def infer_qwen25_vl_text_encoder_config(shapes: Shapes) -> Qwen25VLTextEncoderConfig:
    """Return the `Qwen25VLTextEncoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    The numbers of heads are not in the shapes: a head of the language model has 128 channels in every published
    Qwen2.5-VL, and one of the vision encoder 80. A network without heads of these sizes has heads of 16 channels.

    Raises:
        ValueError: sizes that no Qwen2.5-VL has.
    """
    layer = "model.layers.0.self_attn"
    if f"{layer}.q_norm.weight" in shapes:
        raise ValueError(f"it has {layer}.q_norm.weight, which Qwen2.5-VL does not have")
    vocab_size, hidden_size = shapes["model.embed_tokens.weight"]
    kv_dim = shapes[f"{layer}.k_proj.weight"][0]
    vision_size, _, temporal, patch_size, _ = shapes["visual.patch_embed.proj.weight"]
    merged = shapes["visual.merger.mlp.0.weight"][0]
    layers = count_items(shapes, "visual.blocks")
    known = hidden_size % 128 == 0 and kv_dim % 128 == 0
    head_dim, vision_head_dim = (128 if known else 16), (80 if vision_size % 80 == 0 else 16)
    if hidden_size % head_dim or kv_dim % head_dim or vision_size % vision_head_dim or merged % vision_size:
        raise ValueError(
            f"a width of {hidden_size} with keys of {kv_dim} channels, and a vision encoder of width {vision_size} "
            f"that is merged to {merged}: expected multiples of the heads' {head_dim} and {vision_head_dim} channels"
        )
    step = max(layers // 4, 2)
    return Qwen25VLTextEncoderConfig(
        hidden_size=hidden_size,
        num_layers=count_items(shapes, "model.layers"),
        num_heads=hidden_size // head_dim,
        num_kv_heads=kv_dim // head_dim,
        head_dim=head_dim,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
        vocab_size=vocab_size,
        vision_hidden_size=vision_size,
        vision_layers=layers,
        vision_heads=vision_size // vision_head_dim,
        vision_intermediate_size=shapes["visual.blocks.0.mlp.gate_proj.weight"][0],
        patch_size=patch_size,
        temporal_patch_size=temporal,
        merge_size=round((merged // vision_size) ** 0.5),
        # Every fourth part of the encoder ends with a block that attends to the whole image.
        full_attention_layers=tuple(range(step - 1, layers, step)),
    )


@dataclass(frozen=True, kw_only=True)
class WanAutoencoderConfig:
    """Config of the causal video autoencoder of Wan 2.1 and Qwen-Image (arXiv:2503.20314).

    Args:
        in_channels: channels of a frame: 3, or 4 with transparency.
        latent_channels: channels of the latents.
        dim: channels at full resolution.
        dim_mult: multiples of `dim` at each resolution, full resolution first; each further one halves the sides.
        num_res_blocks: residual blocks at each resolution of the encoder; the decoder has one more.
        temporal_downsample: for each downsampling step, whether it also halves the number of frames.
        latents_mean, latents_std: for each latent channel; scaled latents are `(z - latents_mean) / latents_std`.
    """

    in_channels: int = 3
    latent_channels: int = 16
    dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample={self.temporal_downsample}: expected one value for each step between the "
                f"{len(self.dim_mult)} resolutions of dim_mult"
            )
        if not len(self.latents_mean) == len(self.latents_std) == self.latent_channels:
            raise ValueError(
                f"latents_mean and latents_std have {len(self.latents_mean)} and {len(self.latents_std)} values; "
                f"expected one for each of {self.latent_channels} latent channels"
            )

    @property
    def factor(self) -> int:
        """Number of video pixels per latent pixel along one side, an int (8 by default)."""
        return 1 << len(self.temporal_downsample)

    @property
    def pixel_mode(self) -> Literal["RGB", "RGBA"]:
        """The mode of the images that it encodes: "RGBA" if a frame has four channels, the last of them alpha."""
        return "RGBA" if self.in_channels == 4 else "RGB"

    @property
    def time_factor(self) -> int:
        """Number of video frames per latent frame, an int (4 by default); the first video frame has a latent frame to
        itself.
        """
        return 1 << sum(self.temporal_downsample)


TINY_WAN_AUTOENCODER = WanAutoencoderConfig(dim=8)


def tiny_wan_autoencoder_inputs(config: WanAutoencoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict argument name -> value for `WanAutoencoder.forward`: a random video of two latent frames, fp32 on
    the CPU.
    """
    import torch

    size = (config.time_factor + 1, 3 * config.factor, 2 * config.factor)
    return {"video": torch.rand(1, config.in_channels, *size, generator=generator) * 2 - 1}


def infer_wan_autoencoder_config(shapes: Shapes) -> WanAutoencoderConfig:
    """Return the `WanAutoencoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: the file has another number of latent channels, or no downsampling layer.
    """
    latent_channels = shapes["conv2.weight"][0]
    known = WanAutoencoderConfig().latent_channels
    if latent_channels != known:
        raise ValueError(
            f"it has {latent_channels} latent channels; latents_mean and latents_std are known for {known} only"
        )
    dim, in_channels = shapes["encoder.conv1.weight"][:2]
    blocks = range(count_items(shapes, "encoder.downsamples"))
    steps = [index for index in blocks if f"encoder.downsamples.{index}.resample.1.weight" in shapes]
    if not steps or steps[0] == 0:
        raise ValueError("its encoder has no block at full resolution, or one resolution only")
    # The last residual block of each resolution comes right before a downsampling layer, or at the end.
    widths = [
        shapes[f"encoder.downsamples.{last}.residual.6.weight"][0] for last in (*(i - 1 for i in steps), blocks[-1])
    ]
    return WanAutoencoderConfig(
        in_channels=in_channels,
        dim=dim,
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=steps[0],
        temporal_downsample=tuple(f"encoder.downsamples.{step}.time_conv.weight" in shapes for step in steps),
    )
