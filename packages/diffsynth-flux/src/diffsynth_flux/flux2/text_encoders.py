"""Text encoders of FLUX.2, and the texts that they encode.

FLUX.2-dev uses the language model of Mistral-Small-3.2, FLUX.2-klein uses Qwen3 (`diffsynth.models.qwen3`). Three
hidden states side by side are the prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel

from diffsynth.models.language_model import Rotary, hidden_states, init_weights
from diffsynth.models.transformers_attention import attn_implementation
from diffsynth_flux.flux2.config import MistralTextEncoderConfig

SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""Message before every prompt of FLUX.2-dev, as in training, with its line break."""

IMAGE_TOKEN = "[IMG]"
"""Token that Mistral replaces by an image; it is removed from prompts."""


class MistralTextEncoder(nn.Module):
    """Language model of Mistral-Small-3.2 without its head. Parameter names are those of FLUX.2-dev's files."""

    def __init__(self, config: MistralTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        model = MistralModel(
            MistralConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                num_key_value_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                intermediate_size=config.intermediate_size,
                vocab_size=config.vocab_size,
                rms_norm_eps=config.norm_eps,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                sliding_window=None,
                attn_implementation=attn_implementation(),
                use_cache=False,
            )
        )
        model.rotary_emb = Rotary(config.head_dim, config.rope_theta)
        self.language_model = nn.ModuleDict({"model": model})

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


def prompt_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the indices of the hidden states that FLUX.2 reads: after a quarter, a half and three quarters of the
    layers.

    These are 10, 20 and 30 of Mistral's 40 layers, and 9, 18 and 27 of Qwen3's 36.
    """
    return num_layers // 4, num_layers // 2, num_layers * 3 // 4


def chat_text(tokenizer: Any, prompt: str, *, mistral: bool) -> str:
    """Return a str: `prompt` in the chat template of the text encoder, as in training.

    Args:
        tokenizer: with the chat template.
        prompt: of the user.
        mistral: whether the text encoder is Mistral, with a system message before the prompt; else it is Qwen3, with
            an empty thinking block after it.
    """
    if not mistral:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    texts = {"system": SYSTEM_MESSAGE, "user": prompt.replace(IMAGE_TOKEN, "")}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
