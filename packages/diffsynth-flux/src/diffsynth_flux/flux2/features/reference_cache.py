"""Keys and values of reference images that are computed once, for FLUX.2-klein-9b-kv.

References then attend to themselves only, at noise level 0, so that no step and no prompt changes their keys and
values. A network that was not trained in this way gives other images with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.attention import attention
from diffsynth.models.keys_values import MoreKeysValues
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.images import Images
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux2.extension import BlockIndex, Extension, Network, Stream
from diffsynth_flux.flux2.features.edit import References


class ReferenceCacheArguments(TypedDict, total=False):
    """Cache of the reference images.

    Args:
        edit_image_kv_cache: Whether the keys and values of reference images are computed once for all steps. The
            references then attend to themselves only; for FLUX.2-klein-9b-kv, which was trained in this way.
    """

    edit_image_kv_cache: bool


@dataclass(frozen=True, eq=False)
class RecordReferences:
    """Extension for a forward pass over reference images alone, which records their keys and values.

    The latents of the pass are the first image; its velocity is not used, and neither is its text.

    Args:
        placed: position on the time axis -> latents, of all images.
        recorded: block -> a list of keys and values, after norm and RoPE; filled by the pass.
    """

    placed: Mapping[int, Float[Tensor, "1 c h w"]]
    recorded: dict[BlockIndex, list[Tensor]] = field(default_factory=dict)

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with all images at their times; see `diffsynth_flux.flux2.extension.Extension`."""
        (first, *others), text_len = self.placed, stream.text.shape[1]
        positions = stream.positions.clone()
        positions[:, text_len:, 0] = first
        stream = dit.set_positions(stream, positions)
        if others:
            stream = dit.append_images(stream, {time: self.placed[time] for time in others})
        return replace(
            stream, attend=lambda block: partial(_attend_apart, self.recorded.setdefault(block, []), text_len)
        )


@unit("references", phase=Phase.NETWORK, requires=("vae",), only_with="edit_image")
def cache_references(
    dit: Any,
    *,
    edit_image: Images,
    references: References,
    edit_image_kv_cache: bool = False,
    network_guidance: Float[Tensor, "b"] | None,
    device: torch.device,
) -> Extension:
    """Return `MoreKeysValues` with the keys and values of the reference images; without a cache `references`."""
    if not edit_image_kv_cache:
        return references
    record, first = RecordReferences(references.placed()), references.images[0]
    dit(
        first,
        torch.zeros(1, device=device),
        first.new_zeros(1, 1, dit.config.prompt_dim),
        None if network_guidance is None else network_guidance[:1],
        extensions=(record,),
    )
    return MoreKeysValues(record.recorded)


# It takes tensors and a list, and looks up nothing by block: a compiled block is then compiled once for all blocks.
def _attend_apart(recorded: list[Tensor], text_len: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention output of text and references, which each attend to themselves; record keys and values of
    the references.
    """
    recorded += [k[:, text_len:], v[:, text_len:]]
    parts = (attention(*(x[:, rows] for x in (q, k, v))) for rows in (slice(text_len), slice(text_len, None)))
    return torch.cat(tuple(parts), dim=1)


REFERENCE_CACHE = Feature("reference_cache", arguments=ReferenceCacheArguments, units=(cache_references,))
