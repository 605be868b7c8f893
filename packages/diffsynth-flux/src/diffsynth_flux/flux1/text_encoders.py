"""Text encoders of FLUX.1: CLIP for a pooled vector, T5 for a sequence; the layers are those of transformers."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextConfig, T5Config
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

from diffsynth.models.transformers_attention import attn_implementation
from diffsynth_flux.flux1.config import ClipTextEncoderConfig, T5TextEncoderConfig


class ClipTextEncoder(nn.Module):
    """Text encoder of CLIP (Radford et al. 2021, arXiv:2103.00020). Parameter names are those of the published
    `text_encoder/model.safetensors`.
    """

    def __init__(self, config: ClipTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = ClipTextModel(config)

    def forward(self, input_ids: Int[Tensor, "b s"]) -> Float[Tensor, "b e"]:
        """Return the pooled hidden states `b e`, in the dtype of the weights: the last layer's, normalised, at the
        first token that ends the text.

        Args:
            input_ids: token ids, at most `config.max_tokens` of a text; the token that ends a text has the highest id.
        """
        hidden = self.text_model(input_ids)
        end = input_ids.argmax(dim=1)
        return hidden[torch.arange(len(hidden), device=hidden.device), end]


class ClipTextModel(nn.Module):
    """Embeddings, layers and last norm of CLIP's text encoder."""

    def __init__(self, config: ClipTextEncoderConfig) -> None:
        super().__init__()
        settings = CLIPTextConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            hidden_act="quick_gelu",
            attention_dropout=0.0,
            attn_implementation=attn_implementation(),
        )
        self.embeddings = ClipTextEmbeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(CLIPEncoderLayer(settings) for _ in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=settings.layer_norm_eps)

    def forward(self, input_ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s e"]:
        """Return the normalised hidden states `b s e` of the last layer; a token attends to those before it."""
        hidden = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            hidden = layer(hidden, attention_mask=None, is_causal=True)
        return self.final_layer_norm(hidden)


class ClipTextEmbeddings(nn.Module):
    """Embeddings of tokens and of their positions."""

    def __init__(self, config: ClipTextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_tokens, config.hidden_size)

    def forward(self, input_ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s e"]:
        """Return the sum of both embeddings, a tensor `b s e`."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class T5TextEncoder(nn.Module):
    """Encoder of T5 1.1 (Raffel et al. 2019, arXiv:1910.10683). Parameter names are those of the published
    `text_encoder_2/*.safetensors`.
    """

    def __init__(self, config: T5TextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        settings = T5Config(
            d_model=config.hidden_size,
            d_kv=config.head_dim,
            d_ff=config.intermediate_size,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            use_cache=False,
            is_encoder_decoder=False,
            attn_implementation=attn_implementation(),
        )
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList(
            T5Block(settings, has_relative_attention_bias=index == 0) for index in range(config.num_layers)
        )
        self.encoder.final_layer_norm = T5LayerNorm(config.hidden_size, eps=settings.layer_norm_epsilon)

    def forward(self, input_ids: Int[Tensor, "b s"]) -> Float[Tensor, "b s e"]:
        """Return the normalised hidden states `b s e` of the last layer, in the dtype of the weights.

        Every token attends to every other, padding included, as in the training of FLUX.1.

        Args:
            input_ids: token ids, with padding.
        """
        hidden, position_bias = self.shared(input_ids), None
        for block in self.encoder.block:
            # The first block computes the bias of relative positions; all others use it.
            hidden, position_bias, *_ = block(hidden, position_bias=position_bias)
        return self.encoder.final_layer_norm(hidden)
