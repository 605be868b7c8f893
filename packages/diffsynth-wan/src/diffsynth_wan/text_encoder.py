"""Encoder of UMT5 (Chung et al. 2023, arXiv:2304.09151), Wan's text encoder."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.nn.rms_norm import RMSNorm
from diffsynth_wan.config import WanTextEncoderConfig


class WanTextEncoder(nn.Module):
    """Encoder of UMT5-XXL. Parameter names are those of the published `models_t5_umt5-xxl-enc-bf16.pth`."""

    def __init__(self, config: WanTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s e"]:
        """Return the normalised hidden states `b s e` in the dtype of the weights; those of padding are meaningless.

        Args:
            input_ids: token ids.
            attention_mask: 1 where a token is text, 0 where it is padding; None means all text.
        """
        buckets = relative_buckets(input_ids.shape[1], config=self.config, device=input_ids.device)
        is_text = None if attention_mask is None else rearrange(attention_mask.bool(), "b k -> b 1 1 k")
        hidden = self.token_embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, buckets, is_text)
        return self.norm(hidden)


class T5Block(nn.Module):
    """Pre-norm block: self-attention and gated feed-forward; each block of UMT5 has its own position bias."""

    def __init__(self, config: WanTextEncoderConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, eps=config.norm_eps)
        self.attn = T5Attention(config)
        self.norm2 = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn = T5FeedForward(config)
        self.pos_embedding = PositionBias(config)

    def forward(
        self, x: Float[Tensor, "b s e"], buckets: Int[Tensor, "s s"], is_text: Bool[Tensor, "b 1 1 s"] | None
    ) -> Float[Tensor, "b s e"]:
        """Return the hidden states `b s e` after this block; padding is masked as a key, not as a query."""
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets), is_text)
        return x + self.ffn(self.norm2(x))


class PositionBias(nn.Module):
    """Bias of attention scores by the relative position of key and query."""

    def __init__(self, config: WanTextEncoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, buckets: Int[Tensor, "q k"]) -> Float[Tensor, "1 n q k"]:
        """Return the bias `1 n q k` of the attention scores, by head, query and key."""
        return rearrange(self.embedding(buckets), "q k n -> 1 n q k")


class T5Attention(nn.Module):
    """Self-attention with a scale of 1: T5's initialisation accounts for it."""

    def __init__(self, config: WanTextEncoderConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.k = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.v = nn.Linear(config.dim, config.dim_attn, bias=False)
        self.o = nn.Linear(config.dim_attn, config.dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "b s e"],
        bias: Float[Tensor, "1 n s s"],
        is_text: Bool[Tensor, "b 1 1 s"] | None,
    ) -> Float[Tensor, "b s e"]:
        """Return the projected attention output `b s e`, one vector for each token."""
        q, k, v = (rearrange(to(x), "b s (n d) -> b s n d", n=self.num_heads) for to in (self.q, self.k, self.v))
        out = attention(q, k, v, mask=is_text, score_bias=bias.to(q.dtype), scale=1.0)
        return self.o(rearrange(out, "b s n d -> b s (n d)"))


class T5FeedForward(nn.Module):
    """GEGLU with the tanh approximation of GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: WanTextEncoderConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.dim_ffn, bias=False), nn.GELU(approximate="tanh"))
        self.fc1 = nn.Linear(config.dim, config.dim_ffn, bias=False)
        self.fc2 = nn.Linear(config.dim_ffn, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the feed-forward output `b s e`, one vector for each token."""
        return self.fc2(self.gate(x) * self.fc1(x))


def relative_buckets(
    length: int, *, config: WanTextEncoderConfig, device: torch.device | str | None = None
) -> Int[Tensor, "q k"]:
    """Return an int tensor `q k`: the bucket of each query's and key's relative position (T5, arXiv:1910.10683).

    The upper half of the buckets is for keys after the query. In each half, the first half of the buckets holds one
    distance each; the others grow logarithmically up to `config.max_distance`.
    """
    positions = torch.arange(length, device=device)
    ahead = positions[None, :] - positions[:, None]
    half = config.num_buckets // 2
    exact = half // 2
    distance = ahead.abs()
    # The logarithm of distance 0 is -inf, but short distances use their exact bucket.
    fraction = torch.log(distance.float() / exact) / math.log(config.max_distance / exact)
    far = (exact + (fraction * (half - exact)).long()).clamp(max=half - 1)
    return (ahead > 0).long() * half + torch.where(distance < exact, distance, far)
