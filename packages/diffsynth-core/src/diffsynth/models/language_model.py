"""Hidden states of decoder-only language models of transformers, of which only the needed layers run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.models.config import LanguageModelConfig
from diffsynth.models.transformers_attention import attn_implementation


def transformers_options(config: LanguageModelConfig) -> dict[str, Any]:
    """Return a dict of the arguments of a config class of transformers, such as `Qwen3Config`."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attn_implementation": attn_implementation(),
        "use_cache": False,
    }


def hidden_states(
    model: Any,
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
        model: a decoder of transformers, with `embed_tokens`, `layers`, `norm` and `rotary_emb`.
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
    position_embeddings = model.rotary_emb(hidden, position_ids)
    mask = causal_mask(attention_mask)
    states = [hidden]
    for layer in model.layers[: max(wanted)]:
        hidden = layer(hidden, attention_mask=mask, position_ids=position_ids, position_embeddings=position_embeddings)
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
