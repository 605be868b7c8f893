"""Configs of FLUX.2's transformer, autoencoder and Mistral text encoder, and functions that infer them from the shapes
in a file.

Light: no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth.core.loader.shapes import Shapes, count_items
from diffsynth.models.config import FluxAutoencoderConfig, LanguageModelConfig

if TYPE_CHECKING:
    import torch

VAE_FACTOR = 16
"""Number of image pixels per side of a packed latent pixel, which is a token of the transformer."""

PROMPT_TOKENS = 512
"""Number of tokens that every prompt is padded or cut to; the padding takes part in attention."""


@dataclass(frozen=True, kw_only=True)
class Flux2DiTConfig:
    """Config of FLUX.2's transformer; the defaults are FLUX.2-dev.

    Args:
        dim: width of the tokens.
        n_heads: number of attention heads; `dim / n_heads` is the head dimension.
        n_layers: number of blocks with separate weights for image and text.
        n_single_layers: number of blocks over the tokens of both, after those.
        in_channels: channels of the packed latents.
        prompt_dim: width of the prompt embeddings, several hidden states of the text encoder side by side.
        ffn_dim: inner width of the gated feed-forwards.
        frequency_dim: number of sinusoids that embed the noise level, and the guidance.
        embeds_guidance: whether the network takes a guidance scale as input, as FLUX.2-dev does.
        axes_dims: channels of a head that RoPE rotates by time, row, column and position in the text; their sum is the
            head dimension.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of all norms.

    Raises:
        ValueError: heads that do not divide the width, or axes that do not fill a head.
    """

    dim: int = 6144
    n_heads: int = 48
    n_layers: int = 8
    n_single_layers: int = 48
    in_channels: int = 128
    prompt_dim: int = 15360
    ffn_dim: int = 18432
    frequency_dim: int = 256
    embeds_guidance: bool = True
    axes_dims: tuple[int, int, int, int] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "axes_dims", tuple(self.axes_dims))
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads={self.n_heads} must divide dim={self.dim}")
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(f"axes_dims={self.axes_dims} must be even and sum to dim / n_heads = {self.head_dim}")

    @property
    def head_dim(self) -> int:
        """Number of channels of each attention head."""
        return self.dim // self.n_heads

    @property
    def text_dim(self) -> int:
        """Width of the text encoder, in channels: its hidden states after three of its layers are side by side."""
        return self.prompt_dim // 3


TINY_DIT = Flux2DiTConfig(
    dim=64, n_heads=4, n_layers=2, n_single_layers=2, in_channels=128, prompt_dim=48, ffn_dim=96, axes_dims=(4, 4, 4, 4)
)


def tiny_dit_inputs(config: Flux2DiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `Flux2DiT.forward`: two images of 3 x 5 tokens, with prompts; fp32 on the CPU."""
    import torch

    return {
        "latents": torch.randn(2, config.in_channels, 3, 5, generator=generator),
        "sigma": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 7, config.prompt_dim, generator=generator),
        "guidance": torch.tensor([4.0, 2.5]) if config.embeds_guidance else None,
    }


def infer_dit_config(shapes: Shapes) -> Flux2DiTConfig:
    """Return the `Flux2DiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: sizes that no network of FLUX.2 has.
    """
    dim, in_channels = shapes["x_embedder.weight"]
    (head_dim,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    if head_dim % 8 or dim % head_dim:
        raise ValueError(f"head dimension {head_dim}: expected a multiple of 8 that divides the width {dim}")
    ffn_dim = shapes["transformer_blocks.0.ff.linear_out.weight"][1]
    fused = shapes["single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"][0]
    if fused != 3 * dim + 2 * ffn_dim:
        raise ValueError(f"the first layer of a single block has {fused} outputs; expected {3 * dim + 2 * ffn_dim}")
    return Flux2DiTConfig(
        dim=dim,
        n_heads=dim // head_dim,
        n_layers=count_items(shapes, "transformer_blocks"),
        n_single_layers=count_items(shapes, "single_transformer_blocks"),
        in_channels=in_channels,
        prompt_dim=shapes["context_embedder.weight"][1],
        ffn_dim=ffn_dim,
        frequency_dim=shapes["time_guidance_embed.timestep_embedder.linear_1.weight"][1],
        embeds_guidance="time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
        axes_dims=(head_dim // 4,) * 4,
    )


@dataclass(frozen=True, kw_only=True)
class Flux2AutoencoderConfig:
    """Config of FLUX.2's autoencoder.

    Args:
        in_channels: channels of the image.
        latent_channels: channels of the latents before packing.
        block_out_channels: channels at each resolution of the encoder, full resolution first; each further one halves
            the side.
        decoder_block_out_channels: those of the decoder, in the same order; the published small decoder has fewer.
        layers_per_block: residual blocks at each resolution of the encoder; the decoder has one more.
        norm_groups: number of groups of every group norm.
        patch_size: side, in latent pixels, of the squares that are packed into channels.
        norm_eps: added to the variance of the packed latents.
    """

    in_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    patch_size: int = 2
    norm_eps: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "decoder_block_out_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.block_out_channels) != len(self.decoder_block_out_channels):
            raise ValueError(
                f"block_out_channels={self.block_out_channels} and decoder_block_out_channels="
                f"{self.decoder_block_out_channels}: expected as many resolutions in both"
            )

    @property
    def packed_channels(self) -> int:
        """Number of channels of the packed latents, an int (128 by default)."""
        return self.latent_channels * self.patch_size**2

    @property
    def factor(self) -> int:
        """Number of image pixels per packed latent pixel along one side, an int (16 by default)."""
        return self.patch_size * self.encoder.factor

    @property
    def encoder(self) -> FluxAutoencoderConfig:
        """The `FluxAutoencoderConfig` of the encoder, whose blocks are those of FLUX.1's."""
        return self._half(self.block_out_channels)

    @property
    def decoder(self) -> FluxAutoencoderConfig:
        """The `FluxAutoencoderConfig` of the decoder, whose blocks are those of FLUX.1's."""
        return self._half(self.decoder_block_out_channels)

    def _half(self, channels: tuple[int, ...]) -> FluxAutoencoderConfig:
        return FluxAutoencoderConfig(
            in_channels=self.in_channels,
            latent_channels=self.latent_channels,
            block_out_channels=channels,
            layers_per_block=self.layers_per_block,
            norm_groups=self.norm_groups,
        )


TINY_AUTOENCODER = Flux2AutoencoderConfig(
    latent_channels=32,
    block_out_channels=(32, 32, 64, 64),
    decoder_block_out_channels=(32, 32, 64, 64),
    layers_per_block=1,
)


def tiny_autoencoder_inputs(config: Flux2AutoencoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `Flux2Autoencoder.forward`: two images, not square, fp32 on the CPU."""
    import torch

    size = (3 * config.factor, 2 * config.factor)
    return {"image": torch.rand(2, config.in_channels, *size, generator=generator) * 2 - 1}


def infer_autoencoder_config(shapes: Shapes) -> Flux2AutoencoderConfig:
    """Return the `Flux2AutoencoderConfig` of an autoencoder file, inferred from the shapes of its tensors.

    Raises:
        ValueError: sizes that do not fit together.
    """
    levels = count_items(shapes, "encoder.down_blocks")
    latent_channels = shapes["decoder.conv_in.weight"][1]
    (packed,) = shapes["bn.running_mean"]
    if packed != 4 * latent_channels:
        raise ValueError(f"statistics of {packed} channels; expected {4 * latent_channels}, 2 x 2 latent pixels")
    return Flux2AutoencoderConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        latent_channels=latent_channels,
        block_out_channels=tuple(
            shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.weight"][0] for level in range(levels)
        ),
        decoder_block_out_channels=tuple(
            shapes[f"decoder.up_blocks.{levels - 1 - level}.resnets.0.conv1.weight"][0] for level in range(levels)
        ),
        layers_per_block=count_items(shapes, "encoder.down_blocks.0.resnets"),
    )


@dataclass(frozen=True, kw_only=True)
class MistralTextEncoderConfig(LanguageModelConfig):
    """Config of the language model of Mistral-Small-3.2 without its head; the defaults are FLUX.2-dev's text encoder.

    Args:
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size, rope_theta, norm_eps:
            see `LanguageModelConfig`.
    """

    hidden_size: int = 5120
    num_layers: int = 40
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 32768
    vocab_size: int = 131072
    rope_theta: float = 1e9
    norm_eps: float = 1e-5


TINY_MISTRAL = MistralTextEncoderConfig(
    hidden_size=48, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=128, intermediate_size=96, vocab_size=120
)


def tiny_mistral_inputs(config: MistralTextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `MistralTextEncoder.forward`: token ids and mask of two random prompts, one padded
    on the left; `layers` of two hidden states.
    """
    import torch

    return {
        "input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator),
        "attention_mask": (torch.arange(11)[None, :] >= torch.tensor([[0], [5]])).long(),
        "layers": (1, 2),
    }


def infer_mistral_config(shapes: Shapes) -> MistralTextEncoderConfig:
    """Return the `MistralTextEncoderConfig` of a text encoder file, inferred from the shapes of its tensors.

    Raises:
        ValueError: sizes that do not fit heads of 128 channels, which shapes do not show.
    """
    layer, head_dim = "language_model.model.layers.0.self_attn", MistralTextEncoderConfig.head_dim
    q_dim, kv_dim = shapes[f"{layer}.q_proj.weight"][0], shapes[f"{layer}.k_proj.weight"][0]
    if q_dim % head_dim or kv_dim % head_dim:
        raise ValueError(f"queries of {q_dim} and keys of {kv_dim} channels: expected multiples of {head_dim}")
    vocab_size, hidden_size = shapes["language_model.model.embed_tokens.weight"]
    return MistralTextEncoderConfig(
        hidden_size=hidden_size,
        num_layers=count_items(shapes, "language_model.model.layers"),
        num_heads=q_dim // head_dim,
        num_kv_heads=kv_dim // head_dim,
        intermediate_size=shapes["language_model.model.layers.0.mlp.gate_proj.weight"][0],
        vocab_size=vocab_size,
    )
