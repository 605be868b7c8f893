"""FLUX.2's transformer: blocks with weights for image and text each, then blocks over both (Black Forest Labs 2025).

Blocks of one stack share their modulation. A variant that changes the forward pass is an extension
(`diffsynth_flux.flux2.extension`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.models.residuals import check_blocks
from diffsynth.nn import LayerNorm, RMSNorm, gated_residual, rotary_table, sinusoidal_embedding, swiglu
from diffsynth_flux.flux2.config import Flux2DiTConfig
from diffsynth_flux.flux2.extension import (
    STACKS,
    Attend,
    BlockIndex,
    Extension,
    Rotary,
    Stream,
    image_positions,
    text_positions,
)

TIME_SCALE = 1000.0
"""Factor from a noise level, and from a guidance scale, to the number that is embedded."""


class Flux2DiT(nn.Module):
    """Transformer of FLUX.2. Parameter names are those of the published `transformer/*.safetensors`.

    `gradient_checkpointing` is a plain attribute: if True, blocks recompute their activations in the backward pass.
    """

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.time_guidance_embed = TimeGuidanceEmbedder(config)
        self.double_stream_modulation_img = Modulation(config.dim, 6)
        self.double_stream_modulation_txt = Modulation(config.dim, 6)
        self.single_stream_modulation = Modulation(config.dim, 3)
        self.x_embedder = nn.Linear(config.in_channels, config.dim, bias=False)
        self.context_embedder = nn.Linear(config.prompt_dim, config.dim, bias=False)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.n_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.n_single_layers))
        self.norm_out = FinalNorm(config)
        self.proj_out = nn.Linear(config.dim, config.in_channels, bias=False)

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b s e"],
        guidance: Float[Tensor, "b"] | None = None,
        *,
        extensions: Sequence[Extension] = (),
        step: Any = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity `noise - x0`, a tensor with the axes `b c h w` and the dtype of `latents`.

        Args:
            latents: noised packed latents, one token per latent pixel.
            sigma: noise levels in [0, 1], fp32; 1 is pure noise.
            prompt_embeds: hidden states of the text encoder, padding included.
            guidance: guidance scale of the distilled network, fp32; None for a network that takes none.
            extensions: applied in this order after the embedding; see `diffsynth_flux.flux2.extension`.
            step: context of the sampling step, which extensions read as `Stream.step`.

        Raises:
            ValueError: guidance for a network that takes none, or the reverse, or an extension names a block that the
                network does not have.
        """
        stream = self.embed(latents, sigma, prompt_embeds, guidance, step=step)
        for extension in extensions:
            stream = extension(self, stream)
        check_blocks(self, stream.residuals, STACKS)
        tokens = self._run_single_blocks(self._run_double_blocks(stream), stream)
        (rows, columns), start = stream.grid, stream.text.shape[1]
        image = tokens[:, start : start + rows * columns]
        velocity = self.proj_out(self.norm_out(image, stream.time_embed)).to(latents.dtype)
        return rearrange(velocity, "b (h w) c -> b c h w", h=rows)

    def embed(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b s e"],
        guidance: Float[Tensor, "b"] | None = None,
        *,
        step: Any = None,
    ) -> Stream:
        """Return a `Stream` (the inputs of the blocks) before extensions change it; arguments and errors are those of
        `Flux2DiT.forward`.
        """
        grid = (latents.shape[2], latents.shape[3])
        positions = torch.cat((text_positions(prompt_embeds.shape[1]), image_positions(grid)))[None]
        return Stream(
            image=self._tokens(latents),
            text=self.context_embedder(prompt_embeds).to(latents.dtype),
            grid=grid,
            positions=positions,
            rotary=rotary_embedding(positions, self.config, latents.device, step),
            time_embed=self.time_guidance_embed(sigma, guidance, dtype=latents.dtype),
            step=step,
        )

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`, which are on the
        CPU.
        """
        rotary = rotary_embedding(positions, self.config, stream.image.device, stream.step)
        return replace(stream, positions=positions, rotary=rotary)

    def append_images(self, stream: Stream, images: Mapping[int, Float[Tensor, "b c h w"]]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the tokens of further latents after its image tokens.

        Args:
            stream: the stream.
            images: position on the time axis -> packed latents, of one item or one for each of the batch.
        """
        batch = len(stream.image)
        tokens = [self._tokens(image.to(stream.image)).expand(batch, -1, -1) for image in images.values()]
        places = [image_positions((image.shape[2], image.shape[3]), time=time) for time, image in images.items()]
        positions = torch.cat((stream.positions, torch.cat(places)[None].expand(len(stream.positions), -1, -1)), dim=1)
        return self.set_positions(replace(stream, image=torch.cat((stream.image, *tokens), dim=1)), positions)

    def _tokens(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b s e"]:
        # Under autocast a linear layer returns bf16; the tokens stay in the dtype of the latents.
        return self.x_embedder(rearrange(latents, "b c h w -> b (h w) c")).to(latents.dtype)

    def _run_double_blocks(self, stream: Stream) -> Float[Tensor, "b s e"]:
        """Return a tensor: the tokens `b s e` of text and image after the blocks with separate weights."""
        image, text = stream.image, stream.text
        image_modulation = self.double_stream_modulation_img(stream.time_embed)
        text_modulation = self.double_stream_modulation_txt(stream.time_embed)
        for index, block in enumerate(self.transformer_blocks):
            key: BlockIndex = ("transformer_blocks", index)
            image, text = gradient_checkpoint_forward(
                block,
                self.gradient_checkpointing,
                False,
                image,
                text,
                image_modulation,
                text_modulation,
                stream.rotary,
                stream.attend(key),
            )
            for residual in stream.residuals.get(key, ()):
                image = image + residual(image)
        return torch.cat((text, image), dim=1)

    def _run_single_blocks(self, tokens: Float[Tensor, "b s e"], stream: Stream) -> Float[Tensor, "b s e"]:
        """Return a tensor: the tokens `b s e` of text and image after the blocks over both."""
        modulation = self.single_stream_modulation(stream.time_embed)
        for index, block in enumerate(self.single_transformer_blocks):
            key: BlockIndex = ("single_transformer_blocks", index)
            tokens = gradient_checkpoint_forward(
                block, self.gradient_checkpointing, False, tokens, modulation, stream.rotary, stream.attend(key)
            )
            for residual in stream.residuals.get(key, ()):
                tokens = tokens + residual(tokens)
        return tokens


class TimeGuidanceEmbedder(nn.Module):
    """Embedding of the noise level and, in a distilled network, of the guidance scale."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.frequency_dim = config.frequency_dim
        self.timestep_embedder = ScalarEmbedder(config)
        self.guidance_embedder = ScalarEmbedder(config) if config.embeds_guidance else None

    def forward(
        self, sigma: Float[Tensor, "b"], guidance: Float[Tensor, "b"] | None, *, dtype: torch.dtype
    ) -> Float[Tensor, "b e"]:
        """Return the embedding `b e` in `dtype`, the sum over its inputs: fp32 sinusoids, cast, then an MLP.

        Raises:
            ValueError: guidance for a network that takes none, or the reverse.
        """
        if (guidance is None) != (self.guidance_embedder is None):
            raise ValueError(
                f"guidance={guidance}: this network takes "
                f"{'no guidance scale; pass None' if self.guidance_embedder is None else 'a guidance scale, such as 4'}"
            )
        embed = self.timestep_embedder(self._sinusoids(sigma, dtype))
        if self.guidance_embedder is not None and guidance is not None:
            embed = embed + self.guidance_embedder(self._sinusoids(guidance, dtype))
        return embed.to(dtype)

    def _sinusoids(self, value: Float[Tensor, "b"], dtype: torch.dtype) -> Float[Tensor, "b f"]:
        return sinusoidal_embedding(value * TIME_SCALE, self.frequency_dim).to(dtype)


class ScalarEmbedder(nn.Module):
    """MLP from the sinusoids of a number to its embedding."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.frequency_dim, config.dim, bias=False)
        self.linear_2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, sinusoids: Float[Tensor, "b f"]) -> Float[Tensor, "b e"]:
        """Return the embedding `b e` of each number."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class Modulation(nn.Module):
    """Projection of the time embedding to the shifts, scales and gates of all blocks of a stack."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, parts * dim, bias=False)

    def forward(self, time_embed: Float[Tensor, "b e"]) -> Float[Tensor, "b 1 m"]:
        """Return the shifts, scales and gates, `b 1 m`, side by side."""
        return self.linear(F.silu(time_embed))[:, None]


class DoubleBlock(nn.Module):
    """Block in which image and text attend to each other and have weights of their own."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.norm1_context = _norm(config)
        self.attn = JointAttention(config)
        self.norm2 = _norm(config)
        self.ff = FeedForward(config)
        self.norm2_context = _norm(config)
        self.ff_context = FeedForward(config)

    def forward(
        self,
        image: Float[Tensor, "b i e"],
        text: Float[Tensor, "b t e"],
        image_modulation: Float[Tensor, "b 1 m"],
        text_modulation: Float[Tensor, "b 1 m"],
        rotary: Rotary,
        attend: Attend,
    ) -> tuple[Float[Tensor, "b i e"], Float[Tensor, "b t e"]]:
        """Return a tuple: the tokens of the image, and those of the text, after this block."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = image_modulation.chunk(6, dim=-1)
        t_shift, t_scale, t_gate, t_ffn_shift, t_ffn_scale, t_ffn_gate = text_modulation.chunk(6, dim=-1)
        image_out, text_out = self.attn(
            self.norm1(image, scale=scale, shift=shift),
            self.norm1_context(text, scale=t_scale, shift=t_shift),
            rotary,
            attend,
        )
        image, text = gated_residual(image, image_out, gate), gated_residual(text, text_out, t_gate)
        image = gated_residual(image, self.ff(self.norm2(image, scale=ffn_scale, shift=ffn_shift)), ffn_gate)
        text_out = self.ff_context(self.norm2_context(text, scale=t_ffn_scale, shift=t_ffn_shift))
        return image, gated_residual(text, text_out, t_ffn_gate)


class JointAttention(nn.Module):
    """Attention over the tokens of text and image, with projections and norms of their own."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            self.add_module(name, nn.Linear(config.dim, config.dim, bias=False))
        self.to_out = nn.Sequential(nn.Linear(config.dim, config.dim, bias=False))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            self.add_module(name, RMSNorm(config.head_dim, eps=config.norm_eps))

    def forward(
        self, image: Float[Tensor, "b i e"], text: Float[Tensor, "b t e"], rotary: Rotary, attend: Attend
    ) -> tuple[Float[Tensor, "b i e"], Float[Tensor, "b t e"]]:
        """Return a tuple: the projected attention output of the image's tokens, and that of the text's."""
        (cos, sin), length = rotary, text.shape[1]
        of_text, of_image = (cos[:, :length], sin[:, :length]), (cos[:, length:], sin[:, length:])
        q = self._joined(
            self.norm_added_q(self._heads(self.add_q_proj(text)), rotary=of_text),
            self.norm_q(self._heads(self.to_q(image)), rotary=of_image),
        )
        k = self._joined(
            self.norm_added_k(self._heads(self.add_k_proj(text)), rotary=of_text),
            self.norm_k(self._heads(self.to_k(image)), rotary=of_image),
        )
        v = self._joined(self._heads(self.add_v_proj(text)), self._heads(self.to_v(image)))
        out = rearrange(attend(q, k, v), "b s n d -> b s (n d)")
        return self.to_out(out[:, length:]), self.to_add_out(out[:, :length])

    def _heads(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s n d"]:
        return rearrange(x, "b s (n d) -> b s n d", d=self.head_dim)

    @staticmethod
    def _joined(text: Float[Tensor, "b t n d"], image: Float[Tensor, "b i n d"]) -> Float[Tensor, "b s n d"]:
        return torch.cat((text, image), dim=1)


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202); gate and input are one matrix."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.linear_in = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.linear_out = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the feed-forward output `b s e`, one vector for each token."""
        return self.linear_out(swiglu(*self.linear_in(x).chunk(2, dim=-1)))


class SingleBlock(nn.Module):
    """Block over the tokens of text and image with attention and feed-forward in parallel (arXiv:2302.05442)."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.attn = ParallelAttention(config)

    def forward(
        self, tokens: Float[Tensor, "b s e"], modulation: Float[Tensor, "b 1 m"], rotary: Rotary, attend: Attend
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after this block."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        return gated_residual(tokens, self.attn(self.norm(tokens, scale=scale, shift=shift), rotary, attend), gate)


class ParallelAttention(nn.Module):
    """Self-attention and SwiGLU feed-forward with one matrix before and one after both."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.sizes = (3 * config.dim, 2 * config.ffn_dim)
        self.to_qkv_mlp_proj = nn.Linear(config.dim, sum(self.sizes), bias=False)
        self.norm_q = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.norm_k = RMSNorm(config.head_dim, eps=config.norm_eps)
        self.to_out = nn.Linear(config.dim + config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "b s e"], rotary: Rotary, attend: Attend) -> Float[Tensor, "b s e"]:
        """Return the projected output `b s e` of attention and feed-forward, one vector for each token."""
        qkv, gate_up = self.to_qkv_mlp_proj(x).split(self.sizes, dim=-1)
        q, k, v = rearrange(qkv, "b s (three n d) -> three b s n d", three=3, d=self.head_dim)
        out = attend(self.norm_q(q, rotary=rotary), self.norm_k(k, rotary=rotary), v)
        hidden = swiglu(*gate_up.chunk(2, dim=-1))
        return self.to_out(torch.cat((rearrange(out, "b s n d -> b s (n d)"), hidden), dim=-1))


class FinalNorm(nn.Module):
    """Layer norm of the image's tokens before the output, modulated by the time embedding."""

    def __init__(self, config: Flux2DiTConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.linear = nn.Linear(config.dim, 2 * config.dim, bias=False)

    def forward(self, x: Float[Tensor, "b s e"], time_embed: Float[Tensor, "b e"]) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after norm and modulation."""
        # Here the scale comes before the shift; in the blocks it comes after it.
        scale, shift = self.linear(F.silu(time_embed))[:, None].chunk(2, dim=-1)
        return self.norm(x, scale=scale, shift=shift)


def rotary_embedding(
    positions: Int[Tensor, "#b s axes"], config: Flux2DiTConfig, device: torch.device, step: Any = None
) -> Rotary:
    """Return (cos, sin), fp32 tensors `#b s half_d` on `device`: cosines and sines of the RoPE angles of tokens at
    `positions` (time, row, column, position in the text), which are on the CPU. `step` keeps them for later steps; see
    `rotary_table`.
    """
    return rotary_table(positions, axes_dims=config.axes_dims, theta=config.rope_theta, device=device, step=step)


def _norm(config: Flux2DiTConfig) -> LayerNorm:
    return LayerNorm(config.dim, elementwise_affine=False, eps=config.norm_eps)
