"""Z-Image transformer: image and caption tokens in a single stream (Tongyi-MAI 2025, arXiv:2511.22699).

A variant that changes the forward pass is an extension (`diffsynth_zimage.extension`).
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
from diffsynth.nn import LayerNorm, RMSNorm, TimestepEmbedder, apply_rotary, rotary_table, swiglu
from diffsynth_zimage.config import ZImageBlockConfig, ZImageDiTConfig
from diffsynth_zimage.extension import STACKS, BlockIndex, Extension, Rotary, StackName, Stream, TimeEmbed
from diffsynth_zimage.tokens import (
    PromptMask,
    joint_positions,
    padded_length,
    padding_masks,
    segment_lengths,
    text_first,
)


class ZImageDiT(nn.Module):
    """Transformer of Z-Image. Parameter names are those of the published `transformer/*.safetensors`.

    `gradient_checkpointing` is a plain attribute: if True, layers recompute their activations in the backward pass.
    """

    def __init__(self, config: ZImageDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        patch = f"{config.patch_size}-1"
        patch_dim = config.in_channels * config.patch_size**2
        self.all_x_embedder = nn.ModuleDict({patch: nn.Linear(patch_dim, config.dim)})
        self.all_final_layer = nn.ModuleDict({patch: FinalLayer(config, patch_dim)})
        self.t_embedder = TimestepEmbedder(config.time_dim, hidden_dim=config.time_hidden_dim)
        self.cap_embedder = nn.Sequential(
            RMSNorm(config.cap_feat_dim, eps=config.norm_eps), nn.Linear(config.cap_feat_dim, config.dim)
        )
        self.x_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, config.dim))
        self.noise_refiner = nn.ModuleList(ZImageBlock(config) for _ in range(config.n_refiner_layers))
        self.context_refiner = nn.ModuleList(ContextBlock(config) for _ in range(config.n_refiner_layers))
        self.layers = nn.ModuleList(ZImageBlock(config) for _ in range(config.n_layers))

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        time: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b s e"],
        prompt_mask: PromptMask | None = None,
        *,
        extensions: Sequence[Extension] = (),
        step: Any = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the negated velocity `x0 - noise`, a tensor with the axes `b c h w` and the dtype of `latents`.

        Args:
            latents: noised, scaled latents; height and width are multiples of `config.patch_size`.
            time: `1 - sigma` in [0, 1], fp32; 0 is pure noise.
            prompt_embeds: hidden states of the text encoder.
            prompt_mask: True for text and False for padding, on either side; None means that all tokens are text.
            extensions: applied in this order after the embedding; see `diffsynth_zimage.extension`.
            step: context of the sampling step, which extensions read as `Stream.step`.

        Raises:
            ValueError: height or width is no multiple of the patch size, or an extension names a block that the
                network does not have or that has already run.
        """
        stream = self.embed(latents, time, prompt_embeds, prompt_mask, step=step)
        for extension in extensions:
            stream = extension(self, stream)
        check_blocks(self, (*stream.residuals, *stream.skip_blocks), STACKS)
        image = self._run("noise_refiner", stream.image, stream.image_rotary, stream.image_mask, stream)
        caption = self._run("context_refiner", stream.caption, stream.caption_rotary, stream.caption_mask, stream)
        stream = self._extend_layers(replace(stream, image=image, caption=caption))
        tokens = self._run("layers", stream.joint_tokens(), stream.rotary, stream.joint_mask, stream)

        patch, (height, width) = self.config.patch_size, stream.grid
        final, count = self.all_final_layer[f"{patch}-1"], height * width
        time_embed = stream.time_embed if stream.time_embed.dim() == 2 else stream.time_embed[:, :count]
        pixels = final(tokens[:, :count], time_embed)
        pixels = pixels.to(latents.dtype)
        return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=patch, q=patch)

    def embed(
        self,
        latents: Float[Tensor, "b c h w"],
        time: Float[Tensor, "b"],
        prompt_embeds: Float[Tensor, "b s e"],
        prompt_mask: PromptMask | None = None,
        *,
        step: Any = None,
    ) -> Stream:
        """Return a `Stream` (the inputs of the transformer blocks) before extensions change it; arguments and errors
        are those of `ZImageDiT.forward`.
        """
        grid = self._grid(latents)
        segments = segment_lengths(prompt_embeds, prompt_mask)
        if prompt_mask is not None:
            prompt_embeds = text_first(prompt_embeds, prompt_mask, max(map(sum, segments)))
        padded = [self._caption_length(each) for each in segments]
        image_len, caption_len = padded_length(grid[0] * grid[1]), max(padded)
        positions = self._positions(segments, grid)
        caption_mask, joint_mask = padding_masks(padded, image_len, latents.device)
        return Stream(
            image=self._embed_image(latents, image_len),
            caption=self._embed_caption(prompt_embeds, segments, caption_len, latents.dtype),
            grid=grid,
            positions=positions,
            rotary=rotary_embedding(positions, self.config, latents.device, step),
            time_embed=self.t_embedder(time * self.config.t_scale, dtype=latents.dtype),
            caption_mask=caption_mask,
            joint_mask=joint_mask,
            caption_segments=tuple(segments),
            step=step,
        )

    def set_positions(self, stream: Stream, positions: Int[Tensor, "#b s axes"]) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`, which are on the
        CPU.
        """
        rotary = rotary_embedding(positions, self.config, stream.image.device, stream.step)
        return replace(stream, positions=positions, rotary=rotary)

    def init_weights(self) -> None:
        """Set the module's weights for training from scratch: modulated layers become the identity, the output becomes
        zero.

        As in DiT (arXiv:2212.09748). The layers over the caption alone have no modulation and are not the identity.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.x_pad_token, self.cap_pad_token):
            nn.init.normal_(token, std=0.02)
        zeroed = [block.adaLN_modulation[0] for block in (*self.noise_refiner, *self.layers)]
        for final in self.all_final_layer.values():
            zeroed += [final.linear, final.adaLN_modulation[1]]
        for linear in zeroed:
            nn.init.zeros_(linear.weight)

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        height, width = latents.shape[-2:]
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latents are {height}x{width}; expected multiples of the patch size {patch}")
        return height // patch, width // patch

    def _embed_image(self, latents: Tensor, image_len: int) -> Float[Tensor, "b i e"]:
        patch = self.config.patch_size
        pixels = rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        # Under autocast a linear layer returns bf16; the tokens stay in the dtype of the latents.
        image = self.all_x_embedder[f"{patch}-1"](pixels).to(latents.dtype)
        padding = self.x_pad_token.to(image.dtype).expand(image.shape[0], image_len - image.shape[1], -1)
        return torch.cat((image, padding), dim=1)

    def _caption_length(self, segments: tuple[int, ...]) -> int:
        """Return the number of tokens of a caption with padding, from the numbers of tokens of its segments."""
        return padded_length(sum(segments))

    def _positions(self, segments: list[tuple[int, ...]], grid: tuple[int, int]) -> Int[Tensor, "#b s axes"]:
        """Return an int CPU tensor `#b s axes`: RoPE positions of the tokens of the image, then of the captions."""
        return joint_positions([self._caption_length(each) for each in segments], grid)

    def _embed_caption(
        self, prompt_embeds: Tensor, segments: list[tuple[int, ...]], caption_len: int, dtype: torch.dtype
    ) -> Float[Tensor, "b c e"]:
        caption = self.cap_embedder(prompt_embeds).to(dtype)
        caption = F.pad(caption, (0, 0, 0, caption_len - caption.shape[1]))
        index = torch.arange(caption_len, device=caption.device)
        is_text = index < torch.tensor([sum(each) for each in segments], device=caption.device)[:, None]
        return torch.where(is_text[:, :, None], caption, self.cap_pad_token.to(caption.dtype))

    def _run(
        self, stack: StackName, tokens: Tensor, rotary: Rotary, mask: Bool[Tensor, "b 1 1 s"] | None, stream: Stream
    ) -> Float[Tensor, "b s e"]:
        """Return a tensor: the tokens `b s e` after all blocks of `stack`, with the residuals that `stream` has for
        them.
        """
        arguments: tuple[Any, ...] = (rotary, mask)
        if stack != "context_refiner":
            arguments += (stream.image_time_embed if stack == "noise_refiner" else stream.time_embed,)
        for index, block in enumerate(getattr(self, stack)):
            if (stack, index) in stream.skip_blocks:
                continue
            tokens = gradient_checkpoint_forward(block, self.gradient_checkpointing, False, tokens, *arguments)
            for residual in stream.residuals.get((stack, index), ()):
                tokens = tokens + residual(tokens)
        return tokens

    def _extend_layers(self, stream: Stream) -> Stream:
        """Return a `Stream`: `stream` after the extensions that it has for the layers; raise ValueError if they change
        what happens in a refiner.
        """
        if not stream.layers_extensions:
            return stream
        before = _refiner_changes(stream)
        while stream.layers_extensions:
            first, *others = stream.layers_extensions
            stream = first(self, replace(stream, layers_extensions=tuple(others)))
        check_blocks(self, (*stream.residuals, *stream.skip_blocks), STACKS)
        if late := {block for block, _ in _refiner_changes(stream) ^ before}:
            stack, index = min(late)
            raise ValueError(
                f"block {index} of {stack} has run before the extensions of the layers are applied, and one of them "
                "changes its residuals or skips it; do that in an extension that is passed to forward()"
            )
        return stream


class ContextBlock(nn.Module):
    """Layer without modulation, with norms before and after attention and feed-forward."""

    def __init__(self, config: ZImageBlockConfig) -> None:
        super().__init__()
        self.attention = SelfAttention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.attention_norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm2 = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self, x: Float[Tensor, "b s e"], rotary: Rotary, mask: Bool[Tensor, "b 1 1 s"] | None
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after this layer."""
        x = x + self.attention_norm2(self.attention(self.attention_norm1(x), rotary, mask))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class ZImageBlock(ContextBlock):
    """Layer whose inputs are scaled and whose outputs are gated by the time embedding."""

    def __init__(self, config: ZImageBlockConfig) -> None:
        super().__init__(config)
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.time_dim, 4 * config.dim))

    def forward(
        self,
        x: Float[Tensor, "b s e"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 1 s"] | None,
        time_embed: TimeEmbed,
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after this layer."""
        modulation = _of_tokens(self.adaLN_modulation(time_embed))
        scale_attn, gate_attn, scale_ffn, gate_ffn = modulation.chunk(4, dim=-1)
        h = self.attention(self.attention_norm1(x, scale=scale_attn), rotary, mask)
        x = self.attention_norm2(h, residual=x, gate=gate_attn.tanh())
        h = self.feed_forward(self.ffn_norm1(x, scale=scale_ffn))
        return self.ffn_norm2(h, residual=x, gate=gate_ffn.tanh())


class SelfAttention(nn.Module):
    """Self-attention with norms and RoPE of queries and keys."""

    def __init__(self, config: ZImageBlockConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.to_q = nn.Linear(config.dim, config.dim, bias=False)
        self.to_k = nn.Linear(config.dim, kv_dim, bias=False)
        self.to_v = nn.Linear(config.dim, kv_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(config.dim, config.dim, bias=False))
        # The published code uses 1e-5 here for every value of `norm_eps`.
        self.norm_q = RMSNorm(config.head_dim, eps=1e-5) if config.qk_norm else None
        self.norm_k = RMSNorm(config.head_dim, eps=1e-5) if config.qk_norm else None

    def forward(
        self, x: Float[Tensor, "b s e"], rotary: Rotary, mask: Bool[Tensor, "b 1 1 s"] | None
    ) -> Float[Tensor, "b s e"]:
        """Return the projected attention output `b s e`, one vector for each token."""
        q, k, v = (
            rearrange(to(x), "b s (n d) -> b s n d", d=self.head_dim) for to in (self.to_q, self.to_k, self.to_v)
        )
        q = apply_rotary(q, *rotary) if self.norm_q is None else self.norm_q(q, rotary=rotary)
        k = apply_rotary(k, *rotary) if self.norm_k is None else self.norm_k(k, rotary=rotary)
        return self.to_out(rearrange(attention(q, k, v, mask=mask), "b s n d -> b s (n d)"))


class FeedForward(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ZImageBlockConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the feed-forward output `b s e`, one vector for each token."""
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class FinalLayer(nn.Module):
    """Modulated norm and projection from tokens to latent patches."""

    def __init__(self, config: ZImageDiTConfig, patch_dim: int) -> None:
        super().__init__()
        self.norm_final = LayerNorm(config.dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(config.dim, patch_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.time_dim, config.dim))

    def forward(self, x: Float[Tensor, "b s e"], time_embed: TimeEmbed) -> Float[Tensor, "b s p"]:
        """Return the latent values `b s p` of each token's patch, flattened with channels last."""
        scale = _of_tokens(self.adaLN_modulation(time_embed))
        return self.linear(self.norm_final(x, scale=scale))


def _of_tokens(modulation: Float[Tensor, "b m"] | Float[Tensor, "b s m"]) -> Float[Tensor, "b #s m"]:
    """Return a modulation of all tokens, or of each, with an axis of tokens."""
    return modulation[:, None] if modulation.dim() == 2 else modulation


def rotary_embedding(
    positions: Int[Tensor, "#b s axes"], config: ZImageDiTConfig, device: torch.device, step: Any = None
) -> Rotary:
    """Return (cos, sin), fp32 tensors `#b s half_d` on `device`: cosines and sines of the RoPE angles of tokens at
    `positions` (time, height, width), which are on the CPU. `step` keeps them for later steps; see `rotary_table`.
    """
    return rotary_table(positions, axes_dims=config.axes_dims, theta=config.rope_theta, device=device, step=step)


def _refiner_changes(stream: Stream) -> set[tuple[BlockIndex, object]]:
    """Return a set of (block, residuals of the block, or None if it is skipped) for the blocks of the refiners."""
    changes = {*stream.residuals.items(), *((block, None) for block in stream.skip_blocks)}
    return {change for change in changes if change[0][0] != "layers"}
