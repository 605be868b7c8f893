"""Decoder-only language models as text encoders, of which only the layers that are read run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.models.config import LanguageModelConfig
from diffsynth.nn import RMSNorm, swiglu


class Decoder(nn.Module):
    """Decoder-only language model without its head: Qwen3, Mistral and the text part of Qwen2.5-VL differ in two
    options. Parameter names are those of the published files.

    The layers are written here, and not taken from transformers, because importing any of its models imports its
    quantizers, kernels and generation loops, and PyTorch's compiler: four times what `import torch` takes.

    Args:
        config: sizes.
        qk_norm: whether queries and keys are normalised for each head, as in Qwen3.
        qkv_bias: whether the projections to queries, keys and values have a bias, as in Qwen2.5.
        rotary: rotary embedding of positions; `Rotary` of the config by default.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, qk_norm=qk_norm, qkv_bias=qkv_bias) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.rotary_emb = Rotary(config.head_dim, config.rope_theta) if rotary is None else rotary


class DecoderLayer(nn.Module):
    """Layer of a `Decoder`: causal self-attention, then a gated feed-forward, each after an RMS norm."""

    def __init__(self, config: LanguageModelConfig, *, qk_norm: bool, qkv_bias: bool) -> None:
        super().__init__()
        self.self_attn = DecoderAttention(config, qk_norm=qk_norm, qkv_bias=qkv_bias)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(
        self,
        hidden: Float[Tensor, "b s e"],
        mask: Bool[Tensor, "b 1 s s"] | None,
        rotary: tuple[Float[Tensor, "#b s d"], Float[Tensor, "#b s d"]],
    ) -> Float[Tensor, "b s e"]:
        """Return the hidden states `b s e` after this layer; for the arguments see `DecoderAttention.forward`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), mask, rotary)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary positions, in which several query heads share one head of keys and values."""

    def __init__(self, config: LanguageModelConfig, *, qk_norm: bool, qkv_bias: bool) -> None:
        super().__init__()
        width, queries, keys = config.hidden_size, config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(width, queries * self.head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(width, keys * self.head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(width, keys * self.head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(queries * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if qk_norm else nn.Identity()

    def forward(
        self,
        hidden: Float[Tensor, "b s e"],
        mask: Bool[Tensor, "b 1 s s"] | None,
        rotary: tuple[Float[Tensor, "#b s d"], Float[Tensor, "#b s d"]],
    ) -> Float[Tensor, "b s e"]:
        """Return the output of attention, a tensor `b s e`.

        Args:
            hidden: hidden states of tokens.
            mask: True = may attend, causal; None if nothing but causality limits attention.
            rotary: cosine and sine of the rotary angles, see `Rotary.forward`.
        """
        q, k, v = (
            project(hidden).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(self.q_norm(q), *rotary), _rotate(self.k_norm(k), *rotary)
        causal = mask is None and hidden.shape[1] > 1
        return self.o_proj(attention(q, k, v, mask=mask, causal=causal).flatten(2))


class GatedMLP(nn.Module):
    """Feed-forward `down(silu(gate(x)) * up(x))` without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Float[Tensor, "b s e"]) -> Float[Tensor, "b s e"]:
        """Return the output of the feed-forward, a tensor `b s e`."""
        return self.down_proj(swiglu(self.gate_proj(hidden), self.up_proj(hidden)))


def hidden_states(
    model: Decoder,
    input_ids: Int[Tensor, "b s"],
    attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
    *,
    layers: Sequence[int],
    embeds: Float[Tensor, "b s e"] | None = None,
    position_ids: Int[Tensor, "axes b s"] | None = None,
) -> Float[Tensor, "b s e"]:
    """Return a tensor `b s e`, `e = len(layers) * hidden_size`: the hidden states at the indices `layers`, in this
    order, concatenated along the last axis, in the dtype of the weights.

    Args:
        model: the language model.
        input_ids: token ids.
        attention_mask: 1 for text and 0 for padding, on either side; None means that all tokens are text. Padding
            attends to the text before it, as in transformers.
        layers: indices of hidden states: 0 is the embedding, `i` the output of layer `i`, -1 the last one, which is
            normalised.
        embeds: embeddings in place of those of `input_ids`, for texts with images; None embeds the tokens.
        position_ids: position of each token on the axes of the model's rotary embedding; None counts the tokens.

    Raises:
        ValueError: an index that the model does not have.
    """
    depth = len(model.layers)
    if not layers or not all(-depth - 1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers={tuple(layers)}; expected indices from {-depth - 1} to {depth}")
    wanted = [layer % (depth + 1) for layer in layers]
    hidden = model.embed_tokens(input_ids) if embeds is None else embeds
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    rotary = model.rotary_emb(hidden, position_ids)
    mask = causal_mask(attention_mask)
    states = [hidden]
    for layer in model.layers[: max(wanted)]:
        hidden = layer(hidden, mask, rotary)
        states.append(hidden)
    if depth in wanted:
        states[depth] = model.norm(states[depth])
    return torch.cat([states[index] for index in wanted], dim=-1)


class Rotary(nn.Module):
    """Rotary embedding without a buffer, so that neither the meta device nor `.to(bfloat16)` affects it."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta

    @torch.no_grad()
    def forward(
        self, hidden: Float[Tensor, "b s e"], position_ids: Int[Tensor, "#b s"]
    ) -> tuple[Float[Tensor, "#b s d"], Float[Tensor, "#b s d"]]:
        """Return two tensors `b s d`, with `b` of `position_ids`: cosine and sine of the rotary angles in the dtype of
        `hidden`; both halves of a head have the same angles.
        """
        return self._of_angles(self._angles(position_ids, hidden.device), hidden.dtype)

    def _angles(self, position_ids: Tensor, device: torch.device) -> Tensor:
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
        return position_ids[..., None].float() * (1.0 / self.theta**exponents)

    @staticmethod
    def _of_angles(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class MultiAxisRotary(Rotary):
    """Rotary embedding whose frequencies are shared among several axes, such as time, row and column."""

    def __init__(self, head_dim: int, theta: float, sections: Sequence[int]) -> None:
        super().__init__(head_dim, theta)
        self.sections = tuple(sections)

    @torch.no_grad()
    def forward(
        self, hidden: Float[Tensor, "b s e"], position_ids: Int[Tensor, "*axes #b s"]
    ) -> tuple[Float[Tensor, "#b s d"], Float[Tensor, "#b s d"]]:
        """Return two tensors `b s d`, as `Rotary.forward`; the frequencies of section `i` rotate by the position on
        axis `i`. Positions without that axis are those on all axes.
        """
        angles = self._angles(position_ids, hidden.device)
        if angles.ndim == 4:
            parts = angles.split(self.sections, dim=-1)
            angles = torch.cat([part[axis] for axis, part in enumerate(parts)], dim=-1)
        return self._of_angles(angles, hidden.dtype)


def _rotate(x: Float[Tensor, "b s n d"], cos: Float[Tensor, "#b s d"], sin: Float[Tensor, "#b s d"]) -> Tensor:
    """Return `x` (`b s n d`) with channels `(i, i + d / 2)` of each head rotated by the angle of channel `i`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, :, None] + torch.cat((-second, first), dim=-1) * sin[:, :, None]


def init_weights(model: nn.Module) -> None:
    """Set weights for training from scratch: layers preserve the scale of their input, embeddings have std 1.

    The usual std of 0.02 fits widths of thousands: at a width of 128, layers would hardly change the hidden states.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


def causal_mask(attention_mask: Tensor | None) -> Bool[Tensor, "b 1 s s"] | None:
    """Return a bool mask `b 1 s s` (True = may attend) that is causal and hides padding tokens from all tokens; None if
    nothing is padded, because `causal=True` is faster.

    A query of padding on the left has no key, and attention gives zeros for it.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    is_text = attention_mask.bool()
    size = is_text.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=is_text.device).tril()
    return causal & rearrange(is_text, "b k -> b 1 1 k")
