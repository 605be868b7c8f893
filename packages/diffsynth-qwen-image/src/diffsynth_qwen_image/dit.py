"""Qwen-Image's transformer: blocks in which image and text attend to each other and have weights of their own.

Qwen-Image team 2025, arXiv:2508.02324. A variant that changes the forward pass is an extension
(`diffsynth_qwen_image.extension`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.models.residuals import check_blocks
from diffsynth.nn import LayerNorm, RMSNorm, gated_residual, rotary_table, sinusoidal_embedding
from diffsynth_qwen_image.config import QwenImageDiTConfig
from diffsynth_qwen_image.extension import (
    STACKS,
    Attend,
    Extension,
    Inputs,
    Mask,
    Rotary,
    Stream,
    image_positions,
    insert_tokens,
    text_positions,
    text_start,
)

TIME_SCALE = 1000.0
"""Factor from a noise level to the number that is embedded."""


class QwenImageBlocks(nn.Module):
    """Embedders and blocks of Qwen-Image's transformer, which the ControlNets that copy it have, too.

    `gradient_checkpointing` is a plain attribute: if True, blocks recompute their activations in the backward pass.
    """

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.time_text_embed = TimeEmbedder(config)
        self.txt_norm = RMSNorm(config.prompt_dim, eps=config.norm_eps)
        self.img_in = nn.Linear(config.patch_dim, config.dim)
        self.txt_in = nn.Linear(config.prompt_dim, config.dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def embed(
        self,
        latents: Float[Tensor, "b c *t h w"],
        sigma: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b s e"],
        prompt_mask: Bool[Tensor, "b s"] | None = None,
        *,
        step: Any = None,
    ) -> Stream:
        """Return a `Stream` (the inputs of the blocks) before extensions change it; arguments and errors are those of
        `QwenImageDiT.forward`.
        """
        images = latents.unsqueeze(2) if latents.ndim == 4 else latents
        grids = (self._grid(latents),) * images.shape[2]
        start = text_start(grids, layered=self.config.layered)
        positions = [text_positions(prompt_embeds.shape[1], start=start)]
        positions += [image_positions(grid, index=index) for index, grid in enumerate(grids)]
        joined = torch.cat(positions)[None]
        padded = prompt_mask is not None and not bool(prompt_mask.all())
        return Stream(
            image=torch.cat([self._tokens(image) for image in images.unbind(2)], dim=1),
            text=self._text_tokens(prompt_embeds).to(latents.dtype),
            grids=grids,
            num_computed=len(grids),
            positions=joined,
            rotary=rotary_embedding(joined, self.config, latents.device, step),
            time_embed=self.time_text_embed(sigma, dtype=latents.dtype),
            text_mask=prompt_mask if padded else None,
            inputs=Inputs(latents, sigma, prompt_embeds, prompt_mask),
            step=step,
        )

    def run_block(self, index: int, image: Tensor, text: Tensor, stream: Stream, mask: Mask) -> tuple[Tensor, Tensor]:
        """Return (tokens `b i e` of the images, tokens `b t e` of the text) after a block.

        Args:
            index: of the block.
            image, text: tokens before it.
            stream: the other inputs of the blocks.
            mask: `stream.mask()`, which all blocks share.
        """
        return gradient_checkpoint_forward(
            self.transformer_blocks[index],
            self.gradient_checkpointing,
            False,
            image,
            text,
            stream.time_embed,
            stream.rotary,
            mask,
            stream.attend(("transformer_blocks", index)),
            stream.clean_time_embed,
            stream.num_computed_tokens,
        )

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        height, width = latents.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents are {height}x{width}; expected multiples of the patch size {patch}")
        return height // patch, width // patch

    def _text_tokens(self, states: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        return self.txt_in(self.txt_norm(states))

    def _tokens(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b s e"]:
        patches = patchify(latents, self.config.patch_size)
        # Under autocast a linear layer returns bf16; the tokens stay in the dtype of the latents.
        return self.img_in(patches).to(latents.dtype)


class QwenImageDiT(QwenImageBlocks):
    """Transformer of Qwen-Image. Parameter names are those of the published `transformer/*.safetensors`."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__(config)
        self.norm_out = FinalNorm(config)
        self.proj_out = nn.Linear(config.dim, config.patch_dim)

    def forward(
        self,
        latents: Float[Tensor, "b c *t h w"],
        sigma: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b s e"],
        prompt_mask: Bool[Tensor, "b s"] | None = None,
        *,
        extensions: Sequence[Extension] = (),
        step: Any = None,
    ) -> Float[Tensor, "b c *t h w"]:
        """Return the velocity `noise - x0`, a tensor with the axes and the dtype of `latents`.

        Args:
            latents: noised, scaled latents of an image, or of the `t` layers of one; height and width are multiples of
                `config.patch_size`.
            sigma: noise levels in [0, 1], fp32; 1 is pure noise.
            prompt_embeds: hidden states of the text encoder.
            prompt_mask: True for text and False for padding; None means that all tokens are text.
            extensions: applied in this order after the embedding; see `diffsynth_qwen_image.extension`.
            step: context of the sampling step, which extensions read as `Stream.step`.

        Raises:
            ValueError: height or width is no multiple of the patch size, or an extension names a block that the
                network does not have.
        """
        stream = self.embed(latents, sigma, prompt_embeds, prompt_mask, step=step)
        for extension in extensions:
            stream = extension(self, stream)
        check_blocks(self, stream.residuals, STACKS)
        image = self._run_blocks(stream)[:, : stream.num_computed_tokens]
        velocity = self.proj_out(self.norm_out(image, stream.time_embed)).to(latents.dtype)
        patch, (rows, columns) = self.config.patch_size, stream.grids[0]
        layers = rearrange(velocity, "b (t h w) (c p q) -> b c t (h p) (w q)", h=rows, w=columns, p=patch, q=patch)
        return layers.reshape(latents.shape)

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`, which are on the
        CPU.
        """
        rotary = rotary_embedding(positions, self.config, stream.image.device, stream.step)
        return replace(stream, positions=positions, rotary=rotary)

    def append_images(
        self,
        stream: Stream,
        images: Sequence[Float[Tensor, "b c h w"]],
        *,
        clean_time: bool = False,
        spread: bool = False,
        index: int | None = None,
    ) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the tokens of further latents after its images' tokens, and the
        text's tokens moved behind the rows and columns of all images.

        Args:
            stream: the stream.
            images: latents of each image, of one item or one for each of the batch; sizes may differ.
            clean_time: whether the tokens of all appended images are modulated by the embedding of noise level 0, as
                Qwen-Image-Edit-2511 is trained.
            spread: whether each gets positions that are spread over the rows and columns of the first image.
            index: position of all of them on the first axis; None counts on from the images that the stream has.

        Raises:
            ValueError: height or width of an image is no multiple of the patch size.
        """
        layered, batch, length = self.config.layered, len(stream.image), stream.text.shape[1]
        new = tuple(self._grid(image) for image in images)
        grids = (*stream.grids, *new)
        moved = text_start(grids, layered=layered) - text_start(stream.grids, layered=layered)
        of_text, of_images = stream.positions[:, :length] + moved, stream.positions[:, length:]
        over = stream.grids[0] if spread else None
        places = range(len(stream.grids), len(grids)) if index is None else [index] * len(new)
        added = torch.cat(
            [image_positions(grid, index=place, spread_over=over) for place, grid in zip(places, new, strict=True)]
        )
        positions = torch.cat((of_text, of_images, added[None].expand(len(stream.positions), -1, -1)), dim=1)
        tokens = [self._tokens(image.to(stream.image)).expand(batch, -1, -1) for image in images]
        clean = stream.clean_time_embed
        if clean_time and clean is None:
            zero = torch.zeros(batch, device=stream.image.device)
            clean = self.time_text_embed(zero, dtype=stream.image.dtype)
        image = torch.cat((stream.image, *tokens), dim=1)
        count = image.shape[1] - stream.image.shape[1]
        allowed = insert_tokens(stream.allowed, stream.positions.shape[1], count)
        stream = replace(stream, image=image, grids=grids, clean_time_embed=clean, allowed=allowed)
        return self.set_positions(stream, positions)

    def append_texts(
        self, stream: Stream, texts: Sequence[Float[Tensor, "#b s e"]], masks: Sequence[Bool[Tensor, "#b s"] | None]
    ) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the tokens of further texts after its text's tokens. Each text
        has the positions that it would have as the prompt.

        Args:
            stream: the stream.
            texts: hidden states of the text encoder for each text, of one item or one for each of the batch.
            masks: for each text, True for text and False for padding; None means that all its tokens are text.
        """
        batch, device, length = len(stream.image), stream.image.device, stream.text.shape[1]
        start = text_start(stream.grids, layered=self.config.layered)
        added = torch.cat([text_positions(text.shape[1], start=start) for text in texts])
        first, last = stream.positions.tensor_split((length,), dim=1)
        positions = torch.cat((first, added[None].expand(len(first), -1, -1), last), dim=1)
        tokens = [self._text_tokens(text).to(stream.text.dtype).expand(batch, -1, -1) for text in texts]
        kept = stream.text_mask
        if kept is not None or any(mask is not None for mask in masks):
            sizes = (length, *(text.shape[1] for text in texts))
            parts = zip((kept, *masks), sizes, strict=True)
            whole = (torch.ones(1, size, dtype=torch.bool) if mask is None else mask for mask, size in parts)
            kept = torch.cat([mask.to(device).expand(batch, -1) for mask in whole], dim=1)
        allowed = insert_tokens(stream.allowed, length, added.shape[0])
        stream = replace(stream, text=torch.cat((stream.text, *tokens), dim=1), text_mask=kept, allowed=allowed)
        return self.set_positions(stream, positions)

    def _run_blocks(self, stream: Stream) -> Float[Tensor, "b i e"]:
        """Return the tokens `b i e` of the images after all blocks, with the residuals that `stream` has for them."""
        image, text, mask = stream.image, stream.text, stream.mask()
        for index in range(len(self.transformer_blocks)):
            image, text = self.run_block(index, image, text, stream, mask)
            for residual in stream.residuals.get(("transformer_blocks", index), ()):
                image = image + residual(image)
        return image


class TimeEmbedder(nn.Module):
    """Embedding of the noise level and, in a layered network, of the kind of image."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        self.frequency_dim = config.frequency_dim
        self.timestep_embedder = SinusoidEmbedder(config)
        self.addition_t_embedding = nn.Embedding(2, config.dim) if config.layered else None

    def forward(self, sigma: Float[Tensor, "b"], *, dtype: torch.dtype) -> Float[Tensor, "b e"]:
        """Return the embedding `b e` in `dtype`: fp32 sinusoids, cast, then an MLP; in a layered network, plus the
        embedding of an image with transparency.
        """
        sinusoids = sinusoidal_embedding(sigma * TIME_SCALE, self.frequency_dim).to(dtype)
        embed = self.timestep_embedder(sinusoids)
        if self.addition_t_embedding is not None:
            # Index 1 is an opaque image, which Qwen-Image-Layered never computes.
            embed = embed + self.addition_t_embedding(torch.zeros_like(sigma, dtype=torch.long))
        return embed.to(dtype)


class SinusoidEmbedder(nn.Module):
    """MLP from the sinusoids of a noise level to its embedding."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.frequency_dim, config.dim)
        self.linear_2 = nn.Linear(config.dim, config.dim)

    def forward(self, sinusoids: Float[Tensor, "b f"]) -> Float[Tensor, "b e"]:
        """Return the embedding `b e` of each noise level."""
        return self.linear_2(F.silu(self.linear_1(sinusoids)))


class Block(nn.Module):
    """Block in which images and text attend to each other and have weights of their own."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        self.img_mod = _modulation(config)
        self.img_norm1 = _norm(config)
        self.attn = JointAttention(config)
        self.img_norm2 = _norm(config)
        self.img_mlp = FeedForward(config)
        self.txt_mod = _modulation(config)
        self.txt_norm1 = _norm(config)
        self.txt_norm2 = _norm(config)
        self.txt_mlp = FeedForward(config)

    def forward(
        self,
        image: Float[Tensor, "b i e"],
        text: Float[Tensor, "b t e"],
        time_embed: Float[Tensor, "b e"],
        rotary: Rotary,
        mask: Mask,
        attend: Attend,
        clean_time_embed: Float[Tensor, "b e"] | None = None,
        num_computed_tokens: int = 0,
    ) -> tuple[Float[Tensor, "b i e"], Float[Tensor, "b t e"]]:
        """Return a tuple: the tokens of the images, and those of the text, after this block.

        Args:
            image, text, time_embed, rotary, mask, attend, clean_time_embed: see `Stream`.
            num_computed_tokens: number of image tokens, from the first, that `time_embed` modulates, if
                `clean_time_embed` is given; it modulates the others.
        """
        modulation = Modulation(
            self.img_mod(time_embed),
            None if clean_time_embed is None else self.img_mod(clean_time_embed),
            num_computed_tokens,
        )
        of_text = Modulation(self.txt_mod(time_embed))
        image_out, text_out = self.attn(
            modulation.normed(self.img_norm1, image, 0), of_text.normed(self.txt_norm1, text, 0), rotary, mask, attend
        )
        image, text = modulation.gated(image, image_out, 0), of_text.gated(text, text_out, 0)
        image = modulation.gated(image, self.img_mlp(modulation.normed(self.img_norm2, image, 1)), 1)
        text = of_text.gated(text, self.txt_mlp(of_text.normed(self.txt_norm2, text, 1)), 1)
        return image, text


class Modulation:
    """Shifts, scales and gates of a block, for attention and feed-forward; those of later tokens may be others.

    Args:
        parts: of the first tokens, six vectors side by side: shift, scale and gate of the attention, then those of the
            feed-forward.
        later: of the tokens from `split` on; None for those of the first.
        split: number of first tokens.
    """

    def __init__(self, parts: Float[Tensor, "b m"], later: Float[Tensor, "b m"] | None = None, split: int = 0) -> None:
        self.parts = parts[:, None].chunk(6, dim=-1)
        self.later = None if later is None else later[:, None].chunk(6, dim=-1)
        self.split = split

    def normed(self, norm: nn.Module, tokens: Float[Tensor, "b s e"], layer: int) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after `norm`, scale and shift, for attention (`layer` 0) or feed-forward (1)."""
        return self._each(lambda parts, x: norm(x, shift=parts[3 * layer], scale=parts[3 * layer + 1]), tokens)

    def gated(self, tokens: Float[Tensor, "b s e"], out: Float[Tensor, "b s e"], layer: int) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` plus the gated output of attention (`layer` 0) or feed-forward (1)."""
        return self._each(lambda parts, x, h: gated_residual(x, h, parts[3 * layer + 2]), tokens, out)

    def _each(self, run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if self.later is None:
            return run(self.parts, *tensors)
        first = run(self.parts, *(tensor[:, : self.split] for tensor in tensors))
        return torch.cat((first, run(self.later, *(tensor[:, self.split :] for tensor in tensors))), dim=1)


class JointAttention(nn.Module):
    """Attention over the tokens of text and images, with projections and norms of their own."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            self.add_module(name, nn.Linear(config.dim, config.dim))
        self.to_out = nn.Sequential(nn.Linear(config.dim, config.dim))
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            self.add_module(name, RMSNorm(config.head_dim, eps=config.norm_eps))

    def forward(
        self, image: Float[Tensor, "b i e"], text: Float[Tensor, "b t e"], rotary: Rotary, mask: Mask, attend: Attend
    ) -> tuple[Float[Tensor, "b i e"], Float[Tensor, "b t e"]]:
        """Return a tuple: the projected attention output of the images' tokens, and that of the text's."""
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
        out = rearrange(attend(q, k, v, mask), "b s n d -> b s (n d)")
        return self.to_out(out[:, length:]), self.to_add_out(out[:, :length])

    def _heads(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s n d"]:
        return rearrange(x, "b s (n d) -> b s n d", d=self.head_dim)

    @staticmethod
    def _joined(text: Float[Tensor, "b t n d"], image: Float[Tensor, "b i n d"]) -> Float[Tensor, "b s n d"]:
        return torch.cat((text, image), dim=1)


class FeedForward(nn.Module):
    """Feed-forward with the tanh approximation of GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        # The published file counts an activation and a dropout layer, which have no parameters.
        into = nn.ModuleDict({"proj": nn.Linear(config.dim, config.ffn_dim)})
        self.net = nn.ModuleList([into, nn.Identity(), nn.Linear(config.ffn_dim, config.dim)])

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the feed-forward output `b s e`, one vector for each token."""
        return self.net[2](F.gelu(self.net[0]["proj"](x), approximate="tanh"))


class FinalNorm(nn.Module):
    """Layer norm of the images' tokens before the output, modulated by the time embedding."""

    def __init__(self, config: QwenImageDiTConfig) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.linear = nn.Linear(config.dim, 2 * config.dim)

    def forward(self, x: Float[Tensor, "b s e"], time_embed: Float[Tensor, "b e"]) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after norm and modulation."""
        # Here the scale comes before the shift; in the blocks it comes after it.
        scale, shift = self.linear(F.silu(time_embed))[:, None].chunk(2, dim=-1)
        return self.norm(x, scale=scale, shift=shift)


def patchify(latents: Float[Tensor, "b c h w"], patch_size: int) -> Float[Tensor, "b s v"]:
    """Return latents as tokens, a tensor `b s v`: row by row, each with the values of its latent pixels, channel by
    channel.

    Args:
        latents: height and width are multiples of `patch_size`.
        patch_size: side of a token in latent pixels.
    """
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=patch_size, q=patch_size)


def rotary_embedding(
    positions: Int[Tensor, "#b s axes"], config: QwenImageDiTConfig, device: torch.device, step: Any = None
) -> Rotary:
    """Return (cos, sin), fp32 tensors `#b s half_d` on `device`: cosines and sines of the RoPE angles of tokens at
    `positions` (image, row, column), which are on the CPU. `step` keeps them for later steps; see `rotary_table`.
    """
    return rotary_table(positions, axes_dims=config.axes_dims, theta=config.rope_theta, device=device, step=step)


def _modulation(config: QwenImageDiTConfig) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))


def _norm(config: QwenImageDiTConfig) -> LayerNorm:
    return LayerNorm(config.dim, elementwise_affine=False, eps=config.norm_eps)
