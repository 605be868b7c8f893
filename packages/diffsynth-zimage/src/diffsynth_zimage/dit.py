"""Z-Image transformer: image and caption tokens in a single stream (Tongyi-MAI 2025, arXiv:2511.22699)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.nn import LayerNorm, RMSNorm, TimestepEmbedder, apply_rotary, rotary_angles, swiglu
from diffsynth_zimage.config import TOKEN_MULTIPLE, ZImageDiTConfig


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
        prompt_mask: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Return the negated velocity `x0 - noise`, a tensor with the axes `b c h w` and the dtype of `latents`.

        Args:
            latents: noised, scaled latents; height and width are multiples of `config.patch_size`.
            time: `1 - sigma` in [0, 1], fp32; 0 is pure noise.
            prompt_embeds: hidden states of the text encoder.
            prompt_mask: True for text and False for padding, on either side; None means that all tokens are text.

        Raises:
            ValueError: height or width is no multiple of the patch size.
        """
        config = self.config
        patch = f"{config.patch_size}-1"
        height, width = self._grid(latents)
        lengths = _lengths(prompt_embeds, prompt_mask)
        if prompt_mask is not None:
            prompt_embeds = _text_first(prompt_embeds, prompt_mask, max(lengths))
        time_embed = self.t_embedder(time * config.t_scale, dtype=latents.dtype)
        layout = _layout(lengths, (height, width), config, latents.device)

        pixels = rearrange(latents, "b c (h p) (w q) -> b (h w) (p q c)", p=config.patch_size, q=config.patch_size)
        # Under autocast a linear layer returns bf16; the tokens stay in the dtype of the latents.
        image = self.all_x_embedder[patch](pixels).to(latents.dtype)
        padding = self.x_pad_token.to(image.dtype).expand(image.shape[0], layout.image_len - image.shape[1], -1)
        image = torch.cat((image, padding), dim=1)
        for block in self.noise_refiner:
            image = self._run(block, image, layout.image_rotary, None, time_embed)

        caption = self.cap_embedder(prompt_embeds).to(latents.dtype)
        caption = F.pad(caption, (0, 0, 0, layout.caption_len - caption.shape[1]))
        caption = torch.where(layout.is_text, caption, self.cap_pad_token.to(caption.dtype))
        for block in self.context_refiner:
            caption = self._run(block, caption, layout.caption_rotary, layout.caption_mask)

        stream = torch.cat((image, caption), dim=1)
        for block in self.layers:
            stream = self._run(block, stream, layout.joint_rotary, layout.joint_mask, time_embed)

        pixels = self.all_final_layer[patch](stream[:, : height * width], time_embed)
        pixels = pixels.to(latents.dtype)
        return rearrange(
            pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=height, p=config.patch_size, q=config.patch_size
        )

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

    def _run(self, block: nn.Module, *arguments: object) -> Tensor:
        return gradient_checkpoint_forward(block, self.gradient_checkpointing, False, *arguments)


Rotary = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the rotary angles of the tokens."""


class ContextBlock(nn.Module):
    """Layer without modulation, with norms before and after attention and feed-forward."""

    def __init__(self, config: ZImageDiTConfig) -> None:
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

    def __init__(self, config: ZImageDiTConfig) -> None:
        super().__init__(config)
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.time_dim, 4 * config.dim))

    def forward(
        self,
        x: Float[Tensor, "b s e"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 1 s"] | None,
        time_embed: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after this layer."""
        scale_attn, gate_attn, scale_ffn, gate_ffn = self.adaLN_modulation(time_embed)[:, None].chunk(4, dim=-1)
        h = self.attention(self.attention_norm1(x, scale=scale_attn), rotary, mask)
        x = self.attention_norm2(h, residual=x, gate=gate_attn.tanh())
        h = self.feed_forward(self.ffn_norm1(x, scale=scale_ffn))
        return self.ffn_norm2(h, residual=x, gate=gate_ffn.tanh())


class SelfAttention(nn.Module):
    """Self-attention with norms and RoPE of queries and keys."""

    def __init__(self, config: ZImageDiTConfig) -> None:
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

    def __init__(self, config: ZImageDiTConfig) -> None:
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

    def forward(self, x: Float[Tensor, "b s e"], time_embed: Float[Tensor, "b t"]) -> Float[Tensor, "b s p"]:
        """Return the latent values `b s p` of each token's patch, flattened with channels last."""
        scale = self.adaLN_modulation(time_embed)[:, None]
        return self.linear(self.norm_final(x, scale=scale))


@dataclass(frozen=True)
class _Layout:
    """Token counts, rotary angles and masks, which depend only on the sizes of images and captions."""

    image_len: int
    caption_len: int
    is_text: Bool[Tensor, "b s 1"]
    image_rotary: Rotary
    caption_rotary: Rotary
    joint_rotary: Rotary
    caption_mask: Bool[Tensor, "b 1 1 s"] | None
    joint_mask: Bool[Tensor, "b 1 1 s"] | None


def _layout(lengths: list[int], grid: tuple[int, int], config: ZImageDiTConfig, device: torch.device) -> _Layout:
    image_tokens = grid[0] * grid[1]
    image_len = _padded(image_tokens)
    padded = [_padded(length) for length in lengths]
    caption_len = max(padded)
    # Positions depend on the padded length of the caption only: compute them once per padded length.
    ids = torch.stack([_position_ids(length, caption_len, grid, image_len) for length in sorted(set(padded))])
    if len(ids) > 1:
        ids = ids[[sorted(set(padded)).index(length) for length in padded]]
    angles = rotary_angles(ids, axes_dims=config.axes_dims, theta=config.rope_theta).to(device)
    cos, sin = angles.cos(), angles.sin()
    index = torch.arange(caption_len, device=device)
    is_text = index < torch.tensor(lengths, device=device)[:, None]
    caption_mask = joint_mask = None
    if min(padded) < caption_len:
        attended = index < torch.tensor(padded, device=device)[:, None]
        caption_mask = attended[:, None, None]
        joint_mask = F.pad(attended, (image_len, 0), value=True)[:, None, None]
    return _Layout(
        image_len=image_len,
        caption_len=caption_len,
        is_text=is_text[:, :, None],
        image_rotary=(cos[:, :image_len], sin[:, :image_len]),
        caption_rotary=(cos[:, image_len:], sin[:, image_len:]),
        joint_rotary=(cos, sin),
        caption_mask=caption_mask,
        joint_mask=joint_mask,
    )


def _position_ids(padded: int, caption_len: int, grid: tuple[int, int], image_len: int) -> Int[Tensor, "s axes"]:
    """Return an int CPU tensor `s axes` of RoPE positions (time, height, width) for the image's tokens, then the
    caption's.

    Caption tokens have times 1, 2, ..., padding included; the image has the next time. Padding of the image is at the
    origin.
    """
    ids = torch.zeros(image_len + caption_len, 3, dtype=torch.long)
    image = ids[: grid[0] * grid[1]].view(*grid, 3)
    image[..., 0] = padded + 1
    image[..., 1] = torch.arange(grid[0])[:, None]
    image[..., 2] = torch.arange(grid[1])
    ids[image_len:, 0] = torch.arange(1, caption_len + 1)
    return ids


def _padded(length: int) -> int:
    return -(-length // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def _lengths(prompt_embeds: Tensor, prompt_mask: Tensor | None) -> list[int]:
    if prompt_mask is None:
        return [prompt_embeds.shape[1]] * prompt_embeds.shape[0]
    return prompt_mask.sum(1).tolist()


def _text_first(
    prompt_embeds: Float[Tensor, "b s e"], prompt_mask: Bool[Tensor, "b s"], longest: int
) -> Float[Tensor, "b longest e"]:
    """Return a tensor `b longest e`: the prompt embeddings with each text's tokens moved to the front; later entries
    are not used.
    """
    order = (~prompt_mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return prompt_embeds.take_along_dim(order[:, :, None], dim=1)
