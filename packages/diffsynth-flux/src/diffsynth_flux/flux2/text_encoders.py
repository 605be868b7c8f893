"""Text encoder of FLUX.2-dev, the language model of Mistral-Small-3.2; FLUX.2-klein's is `diffsynth.models.qwen3`."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.models.language_model import Decoder, hidden_states, init_weights
from diffsynth_flux.flux2.config import MistralTextEncoderConfig


class MistralTextEncoder(nn.Module):
    """Language model of Mistral-Small-3.2 without its head. Parameter names are those of FLUX.2-dev's files."""

    def __init__(self, config: MistralTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.language_model = nn.ModuleDict({"model": Decoder(config)})

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
        *,
        layers: Sequence[int],
    ) -> Float[Tensor, "b s e"]:
        """Return a tensor `b s e`, `e = len(layers) * hidden_size`: the hidden states at the indices `layers`, in this
        order, concatenated along the last axis, in the dtype of the weights.

        Args:
            input_ids, attention_mask, layers: see `diffsynth.models.language_model.hidden_states`.

        Raises:
            ValueError: an index that the model does not have.
        """
        return hidden_states(self.language_model["model"], input_ids, attention_mask, layers=layers)

    def init_weights(self) -> None:
        """Set weights for training from scratch; see `diffsynth.models.language_model.init_weights`."""
        init_weights(self)
