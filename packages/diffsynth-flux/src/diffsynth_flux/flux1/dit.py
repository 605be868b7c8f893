"""FLUX.1 transformer: blocks with separate weights for image and text, then blocks over both (Black Forest Labs 2024;
MMDiT, Esser et al. 2024, arXiv:2403.03206; parallel attention and feed-forward, arXiv:2302.05442).

A variant that changes the forward pass is an extension (`diffsynth_flux.flux1.extension`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.models.residuals import check_blocks
from diffsynth.nn import LayerNorm, gated_residual, rms_norm_rotary, rotary_table, sinusoidal_embedding
from diffsynth.nn.rms_norm import rms_norm
from diffsynth_flux.flux1.config import PATCH_SIZE, FluxBlocksConfig, FluxDiTConfig
from diffsynth_flux.flux1.extension import (
    STACKS,
    BlockIndex,
    Extension,
    Inputs,
    QueryAttention,
    Residual,
    Rotary,
    Stream,
)

TIME_SCALE = 1000.0
"""Factor from a noise level, and from the guidance, to the input of the sinusoids."""

FREQUENCY_DIM = 256
"""Number of sinusoids of a noise level or of the guidance."""

NORM_EPS = 1e-6
"""Number that the norms of queries and keys add to the mean square."""


class FluxDiT(nn.Module):
    """Transformer of FLUX.1. Parameter names are those of the published `flux1-dev.safetensors`.

    `gradient_checkpointing` is a plain attribute: if True, blocks recompute their activations in the backward pass.
    """

    def __init__(self, config: FluxDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        add_embedders(self, config)
        add_blocks(self, config)
        self.final_layer = FinalLayer(config)

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b t e_text"],
        pooled_prompt_embeds: Float[Tensor, "b e_pooled"],
        guidance: Float[Tensor, "b"] | None = None,
        condition_latents: Float[Tensor, "b c_condition h w"] | None = None,
        *,
        extensions: Sequence[Extension] = (),
        step: Any = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the velocity `noise - x0`, a tensor with the axes `b c h w` and the dtype of `latents`.

        Args:
            latents: noised, scaled latents; height and width are even.
            sigma: noise levels in [0, 1], fp32; 1 is pure noise.
            prompt_embeds: hidden states of T5, including padding.
            pooled_prompt_embeds: pooled hidden state of CLIP.
            guidance: the guidance input, 3.5 for most images, fp32; only for a network with `config.guidance_embed`.
            condition_latents: channels after those of the latents, `config.condition_channels` of them, such as the
                latents of a control image.
            extensions: applied in this order after the embedding; see `diffsynth_flux.flux1.extension`.
            step: context of the sampling step, which extensions read as `Stream.step`.

        Raises:
            ValueError: an odd height or width, a guidance that is missing or not taken, condition latents of another
                number of channels, or an extension that names a block that the network does not have.
        """
        stream = self.embed(latents, sigma, prompt_embeds, pooled_prompt_embeds, guidance, condition_latents, step=step)
        for extension in extensions:
            stream = extension(self, stream)
        check_blocks(self, (*stream.residuals, *stream.query_attention, *stream.skip_blocks), STACKS)
        tokens = run_blocks(self, stream, self.gradient_checkpointing)
        height, width = stream.grid
        first = stream.text.shape[1]
        patches = self.final_layer(tokens[:, first : first + height * width], stream.modulation).to(latents.dtype)
        return unpatchify(patches, height)

    def embed(
        self,
        latents: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b t e_text"],
        pooled_prompt_embeds: Float[Tensor, "b e_pooled"],
        guidance: Float[Tensor, "b"] | None = None,
        condition_latents: Float[Tensor, "b c_condition h w"] | None = None,
        *,
        step: Any = None,
    ) -> Stream:
        """Return a `Stream` (the inputs of the transformer blocks) before extensions change it; arguments and errors
        are those of `FluxDiT.forward`.
        """
        self._check_channels(latents, condition_latents)
        patches = patchify(latents)
        inputs = Inputs(
            patches=patches,
            sigma=sigma,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            guidance=guidance,
        )
        if condition_latents is not None:
            patches = torch.cat((patches, patchify(condition_latents.to(latents.dtype))), dim=2)
        image, text, modulation = embed_inputs(self, self.config, replace(inputs, patches=patches))
        grid = (latents.shape[2] // PATCH_SIZE, latents.shape[3] // PATCH_SIZE)
        # Text tokens are all at the origin.
        origin = torch.zeros(text.shape[1], 3, dtype=torch.long)
        positions = torch.cat((origin, grid_positions(*grid)))[None]
        return Stream(
            image=image,
            text=text,
            grid=grid,
            positions=positions,
            rotary=rotary_embedding(positions, self.config, latents.device, step),
            modulation=modulation,
            inputs=inputs,
            step=step,
        )

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`, which are on the
        CPU.
        """
        rotary = rotary_embedding(positions, self.config, stream.image.device, stream.step)
        return replace(stream, positions=positions, rotary=rotary)

    def _check_channels(self, latents: Tensor, condition_latents: Tensor | None) -> None:
        expected = self.config.condition_channels
        found = 0 if condition_latents is None else condition_latents.shape[1]
        if latents.shape[1] != self.config.latent_channels or found != expected:
            raise ValueError(
                f"latents have {latents.shape[1]} channels and condition latents {found}; this network takes "
                f"{self.config.latent_channels} and {expected}"
            )


def add_embedders(network: Any, config: FluxBlocksConfig) -> None:
    """Add the embedders of FLUX.1 to a module: of image patches, text, noise level, pooled text and guidance."""
    network.img_in = nn.Linear(config.in_channels, config.dim)
    network.txt_in = nn.Linear(config.context_dim, config.dim)
    network.time_in = MLPEmbedder(FREQUENCY_DIM, config.dim)
    network.vector_in = MLPEmbedder(config.pooled_dim, config.dim)
    network.guidance_in = MLPEmbedder(FREQUENCY_DIM, config.dim) if config.guidance_embed else None


def add_blocks(network: Any, config: FluxBlocksConfig) -> None:
    """Add the blocks of FLUX.1 to a module, as `double_blocks` and `single_blocks`."""
    network.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.n_double_blocks))
    network.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.n_single_blocks))


def embed_inputs(
    network: Any, config: FluxBlocksConfig, inputs: Inputs
) -> tuple[Float[Tensor, "b i e"], Float[Tensor, "b t e"], Float[Tensor, "b e"]]:
    """Return (image tokens `b i e`, text tokens `b t e`, modulation `b e`) in the dtype of the patches; raise
    ValueError for a guidance that is missing or not taken.

    Args:
        network: module with the layers of `add_embedders`.
        config: its config.
        inputs: what it embeds.

    Raises:
        ValueError: the network takes a guidance and there is none, or the reverse.
    """
    if config.guidance_embed != (inputs.guidance is not None):
        given = "and none is given" if inputs.guidance is None else "but one is given"
        raise ValueError(f"this network takes {'a' if config.guidance_embed else 'no'} guidance, {given}")
    dtype = inputs.patches.dtype

    def sinusoids(levels: Tensor) -> Tensor:
        return sinusoidal_embedding(levels.float() * TIME_SCALE, FREQUENCY_DIM).to(dtype)

    modulation = network.time_in(sinusoids(inputs.sigma)) + network.vector_in(inputs.pooled_prompt_embeds.to(dtype))
    if inputs.guidance is not None:
        modulation = modulation + network.guidance_in(sinusoids(inputs.guidance))
    # Under autocast a linear layer returns bf16; the tokens stay in the dtype of the latents.
    image, text = network.img_in(inputs.patches), network.txt_in(inputs.prompt_embeds.to(dtype))
    return image.to(dtype), text.to(dtype), modulation.to(dtype)


def run_blocks(network: Any, stream: Stream, gradient_checkpointing: bool) -> Float[Tensor, "b s e"]:
    """Return the tokens of the text, then of the image, `b s e`, after all blocks of a network and the residuals that
    `stream` has for them.

    Args:
        network: module with `double_blocks` and `single_blocks`.
        stream: their inputs.
        gradient_checkpointing: whether blocks recompute their activations in the backward pass.
    """
    image, text, length = stream.image, stream.text, stream.text.shape[1]
    shared = (stream.modulation, stream.rotary, stream.mask)
    for index, block in enumerate(network.double_blocks):
        key: BlockIndex = ("double_blocks", index)
        if key in stream.skip_blocks:
            continue
        more = stream.query_attention.get(key, ())
        image, text = gradient_checkpoint_forward(block, gradient_checkpointing, False, image, text, *shared, more)
        image = _with_residuals(image, stream.residuals.get(key, ()))
    tokens = torch.cat((text, image), dim=1)
    for index, block in enumerate(network.single_blocks):
        key = ("single_blocks", index)
        if key in stream.skip_blocks:
            continue
        more = stream.query_attention.get(key, ())
        tokens = gradient_checkpoint_forward(block, gradient_checkpointing, False, tokens, *shared, more)
        if residuals := stream.residuals.get(key, ()):
            tokens = torch.cat((tokens[:, :length], _with_residuals(tokens[:, length:], residuals)), dim=1)
    return tokens


class MLPEmbedder(nn.Module):
    """Two linear layers with a SiLU between them."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """Return the embedding `b e` of each vector."""
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Projection of the modulation to the shifts, scales and gates of a block."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(dim, parts * dim)

    def forward(self, modulation: Float[Tensor, "b e"]) -> tuple[Float[Tensor, "b 1 e"], ...]:
        """Return a tuple of tensors `b 1 e`: shift, scale and gate, once or twice."""
        return self.lin(F.silu(modulation))[:, None].chunk(self.parts, dim=-1)


class HeadNorm(nn.Module):
    """RMS norm of each head, and RoPE."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(head_dim))

    def forward(self, x: Float[Tensor, "b s n d"], rotary: Rotary | None) -> Float[Tensor, "b s n d"]:
        """Return queries or keys `b s n d`, normalised, and rotated unless `rotary` is None."""
        if rotary is None:
            return rms_norm(x, self.scale, eps=NORM_EPS)
        return rms_norm_rotary(x, self.scale, *rotary, eps=NORM_EPS)


class QKNorm(nn.Module):
    """Norms of queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = HeadNorm(head_dim)
        self.key_norm = HeadNorm(head_dim)

    def forward(
        self, q: Float[Tensor, "b s n d"], k: Float[Tensor, "b s n d"], rotary: Rotary
    ) -> tuple[Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]]:
        """Return (queries, keys), both `b s n d`, normalised and rotated."""
        return self.query_norm(q, rotary), self.key_norm(k, rotary)


class StreamAttention(nn.Module):
    """Projections of image or text to queries, keys and values, and of the attention output."""

    def __init__(self, config: FluxBlocksConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm = QKNorm(config.head_dim)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Float[Tensor, "b s e"], rotary: Rotary) -> tuple[Float[Tensor, "b s n d"], ...]:
        """Return (queries, keys, values, queries before norm and RoPE), each `b s n d`; queries and keys are normalised
        and rotated.
        """
        q, k, v = rearrange(self.qkv(x), "b s (three n d) -> three b s n d", three=3, d=self.head_dim)
        return (*self.norm(q, k, rotary), v, q)


class DoubleBlock(nn.Module):
    """Block with separate weights for image and text, which attend to each other."""

    def __init__(self, config: FluxBlocksConfig) -> None:
        super().__init__()
        self.img_mod = Modulation(config.dim, 6)
        self.img_norm1 = _norm(config)
        self.img_attn = StreamAttention(config)
        self.img_norm2 = _norm(config)
        self.img_mlp = _mlp(config)
        self.txt_mod = Modulation(config.dim, 6)
        self.txt_norm1 = _norm(config)
        self.txt_attn = StreamAttention(config)
        self.txt_norm2 = _norm(config)
        self.txt_mlp = _mlp(config)

    def forward(
        self,
        image: Float[Tensor, "b i e"],
        text: Float[Tensor, "b t e"],
        modulation: Float[Tensor, "b e"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 s s"] | None = None,
        query_attention: tuple[QueryAttention, ...] = (),
    ) -> tuple[Float[Tensor, "b i e"], Float[Tensor, "b t e"]]:
        """Return (image tokens `b i e`, text tokens `b t e`) after this block."""
        length = text.shape[1]
        text_rotary, image_rotary = _split(rotary, length)
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = self.img_mod(modulation)
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(modulation)
        *of_image, queries = self.img_attn(self.img_norm1(image, scale=img_scale, shift=img_shift), image_rotary)
        *of_text, _ = self.txt_attn(self.txt_norm1(text, scale=txt_scale, shift=txt_shift), text_rotary)
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(of_text, of_image, strict=True))
        out = attention(q, k, v, mask=mask)
        out_image = _with_query_attention(out[:, length:], self.img_attn.norm, queries, query_attention)
        image = gated_residual(image, self.img_attn.proj(out_image.flatten(2)), img_gate)
        text = gated_residual(text, self.txt_attn.proj(out[:, :length].flatten(2)), txt_gate)
        image_mlp = self.img_mlp(self.img_norm2(image, scale=img_scale2, shift=img_shift2))
        text_mlp = self.txt_mlp(self.txt_norm2(text, scale=txt_scale2, shift=txt_shift2))
        return gated_residual(image, image_mlp, img_gate2), gated_residual(text, text_mlp, txt_gate2)


class SingleBlock(nn.Module):
    """Block over text and image tokens together, with attention and feed-forward in parallel."""

    def __init__(self, config: FluxBlocksConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.modulation = Modulation(config.dim, 3)
        self.pre_norm = _norm(config)
        self.norm = QKNorm(config.head_dim)
        self.linear1 = nn.Linear(config.dim, 3 * config.dim + config.ffn_dim)
        self.linear2 = nn.Linear(config.dim + config.ffn_dim, config.dim)

    def forward(
        self,
        tokens: Float[Tensor, "b s e"],
        modulation: Float[Tensor, "b e"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 s s"] | None = None,
        query_attention: tuple[QueryAttention, ...] = (),
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after this block."""
        width = tokens.shape[2]
        shift, scale, gate = self.modulation(modulation)
        h = self.linear1(self.pre_norm(tokens, scale=scale, shift=shift))
        qkv, hidden = h[..., : 3 * width], h[..., 3 * width :]
        q, k, v = rearrange(qkv, "b s (three n d) -> three b s n d", three=3, d=self.head_dim)
        out = attention(*self.norm(q, k, rotary), v, mask=mask)
        out = _with_query_attention(out, self.norm, q, query_attention).flatten(2)
        h = self.linear2(torch.cat((out, F.gelu(hidden, approximate="tanh")), dim=2))
        return gated_residual(tokens, h, gate)


class FinalLayer(nn.Module):
    """Modulated norm and projection from image tokens to patches."""

    def __init__(self, config: FluxDiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.dim, config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, x: Float[Tensor, "b i e"], modulation: Float[Tensor, "b e"]) -> Float[Tensor, "b i c4"]:
        """Return the patches `b i c4` of the velocity, one for each token."""
        shift, scale = self.adaLN_modulation(modulation)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x, scale=scale, shift=shift))


def patchify(latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b i c4"]:
    """Return latents as tokens `b i c4`, row by row, each with the channels of its four latent pixels; raise ValueError
    for an odd height or width.

    Raises:
        ValueError: height or width is odd.
    """
    height, width = latents.shape[-2:]
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(f"latents are {height}x{width}; expected multiples of the patch size {PATCH_SIZE}")
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH_SIZE, q=PATCH_SIZE)


def unpatchify(patches: Float[Tensor, "b i c4"], rows: int) -> Float[Tensor, "b c h w"]:
    """Return the latents `b c h w` of tokens in `rows` rows, a tensor: the inverse of `patchify`."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH_SIZE, q=PATCH_SIZE)


def grid_positions(rows: int, columns: int, *, index: int = 0) -> Int[Tensor, "i axes"]:
    """Return an int CPU tensor `i axes` of RoPE positions (reference index, row, column) of the tokens of an image, row
    by row.
    """
    positions = torch.full((rows, columns, 3), index, dtype=torch.long)
    positions[..., 1] = torch.arange(rows)[:, None]
    positions[..., 2] = torch.arange(columns)
    return positions.view(rows * columns, 3)


def rotary_embedding(
    positions: Int[Tensor, "#b s axes"], config: FluxBlocksConfig, device: torch.device, step: Any = None
) -> Rotary:
    """Return (cos, sin), fp32 tensors `#b s half_d` on `device`: cosines and sines of the RoPE angles of tokens at
    `positions`, which are on the CPU. `step` keeps them for later steps; see `rotary_table`.
    """
    return rotary_table(positions, axes_dims=config.axes_dims, theta=config.rope_theta, device=device, step=step)


def _split(rotary: Rotary, length: int) -> tuple[Rotary, Rotary]:
    cos, sin = rotary
    return (cos[:, :length], sin[:, :length]), (cos[:, length:], sin[:, length:])


def _with_residuals(image: Tensor, residuals: Sequence[Residual]) -> Tensor:
    for residual in residuals:
        image = image + residual(image)
    return image


def _with_query_attention(
    out: Tensor, norm: QKNorm, queries: Tensor, functions: Sequence[QueryAttention]
) -> Float[Tensor, "b s n d"]:
    """Return the attention output `out` with the results of `functions` of the normalised queries added."""
    if functions:
        queries = norm.query_norm(queries, None)
    for function in functions:
        out = out + function(queries)
    return out


def _norm(config: FluxBlocksConfig) -> LayerNorm:
    return LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)


def _mlp(config: FluxBlocksConfig) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, config.dim)
    )
