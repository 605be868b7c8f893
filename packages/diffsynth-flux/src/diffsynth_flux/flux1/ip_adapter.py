"""IP-Adapter of FLUX.1 by InstantX (Ye et al. 2023, arXiv:2308.06721): every block also attends to tokens of an image.

The pooled state of SigLIP's image encoder is projected to tokens, and these to keys and values for each block of the
transformer. A block's queries attend to them before RoPE, and the result is added to the output of its own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth_flux.flux1.config import IPAdapterConfig
from diffsynth_flux.flux1.extension import Network, StackName, Stream

KeysValues = tuple[Float[Tensor, "1 s n d"], Float[Tensor, "1 s n d"]]
"""Keys, after their norm, and values of the tokens of an image."""

NORM_EPS = 1e-5
"""Number that the norm of the keys adds to the mean square."""


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Extension whose blocks also attend to the tokens of an image.

    Args:
        blocks: keys and values for each block of the transformer: the double blocks, then the single blocks.
        scale: factor of the attention to the image; 0 changes nothing.
    """

    blocks: tuple[KeysValues, ...]
    scale: float = 1.0

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with an attention to the image in every block; see
        `diffsynth_flux.flux1.extension.Extension`.

        Raises:
            ValueError: the transformer has another number of blocks.
        """
        if self.scale == 0:
            return stream
        stacks: tuple[StackName, ...] = ("double_blocks", "single_blocks")
        indices = [(stack, index) for stack in stacks for index in range(len(getattr(dit, stack)))]
        if len(indices) != len(self.blocks):
            raise ValueError(
                f"the IP-Adapter has keys and values for {len(self.blocks)} blocks, the transformer has {len(indices)} "
                "blocks; load an IP-Adapter of this transformer"
            )
        for (stack, index), (keys, values) in zip(indices, self.blocks, strict=True):
            function = partial(attend_to_image, keys, values, self.scale)
            stream = stream.with_query_attention(stack, index, function)
        return stream


def attend_to_image(
    keys: Float[Tensor, "1 s n d"], values: Float[Tensor, "1 s n d"], scale: float, q: Float[Tensor, "b q n d"]
) -> Float[Tensor, "b q n d"]:
    """Return the attention output `b q n d` of queries over keys and values of an image, times `scale`."""
    keys, values = (x.to(q.dtype).expand(len(q), -1, -1, -1) for x in (keys, values))
    return attention(q, keys, values) * scale


class FluxIPAdapter(nn.Module):
    """IP-Adapter of FLUX.1. Parameter names are those of the published `ip-adapter.bin`, the names of its two dicts
    first.
    """

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = ImageProjection(config)
        self.ip_adapter = nn.ModuleList(BlockProjection(config) for _ in range(config.n_blocks))

    def forward(self, pooled: Float[Tensor, "i e"]) -> tuple[KeysValues, ...]:
        """Return a tuple (keys, values) for each block of the transformer, each `1 s n d` with the tokens of all images
        one after the other.

        Args:
            pooled: pooled states of the image encoder, one for each image.
        """
        tokens = rearrange(self.image_proj(pooled), "i t e -> 1 (i t) e")
        return tuple(block(tokens) for block in self.ip_adapter)


class ImageProjection(nn.Module):
    """Projection of the pooled state of an image to tokens."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        self.proj = nn.Sequential(
            nn.Linear(config.image_dim, 2 * config.image_dim),
            nn.GELU(),
            nn.Linear(2 * config.image_dim, config.num_tokens * config.context_dim),
        )
        self.norm = nn.LayerNorm(config.context_dim)

    def forward(self, pooled: Float[Tensor, "i e"]) -> Float[Tensor, "i t e_token"]:
        """Return the tokens `i t e_token` of each image, normalised."""
        return self.norm(rearrange(self.proj(pooled), "i (t e) -> i t e", t=self.num_tokens))


class BlockProjection(nn.Module):
    """Projections of the tokens of an image to keys and values for one block of the transformer."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.to_k_ip = nn.Linear(config.context_dim, config.dim, bias=False)
        self.to_v_ip = nn.Linear(config.context_dim, config.dim, bias=False)

    def forward(self, tokens: Float[Tensor, "1 s e"]) -> KeysValues:
        """Return (keys, values), each `1 s n d`; each head of a key is divided by its root mean square."""
        keys, values = (
            rearrange(project(tokens), "b s (n d) -> b s n d", d=self.head_dim)
            for project in (self.to_k_ip, self.to_v_ip)
        )
        return F.rms_norm(keys, (self.head_dim,), eps=NORM_EPS), values
