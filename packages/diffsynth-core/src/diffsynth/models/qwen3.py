"""Qwen3 as a text encoder (arXiv:2505.09388), of which only the layers up to the requested hidden state run."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.models.config import Qwen3TextEncoderConfig
from diffsynth.models.language_model import Decoder, hidden_states, init_weights


class Qwen3TextEncoder(nn.Module):
    """Qwen3 language model without its head. Parameter names are those of the published files."""

    def __init__(self, config: Qwen3TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, qk_norm=True)

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
        *,
        layers: Sequence[int] = (-2,),
    ) -> Float[Tensor, "b s e"]:
        """Return a tensor `b s e`, `e = len(layers) * hidden_size`: the hidden states at the indices `layers`, in this
        order, concatenated along the last axis, in the dtype of the weights.

        Args:
            input_ids, attention_mask, layers: see `diffsynth.models.language_model.hidden_states`. Z-Image uses the
                default of `layers`, -2; FLUX.2-klein 9, 18 and 27.

        Raises:
            ValueError: an index that the model does not have.
        """
        return hidden_states(self.model, input_ids, attention_mask, layers=layers)

    def init_weights(self) -> None:
        """Set weights for training from scratch; see `diffsynth.models.language_model.init_weights`."""
        init_weights(self)
