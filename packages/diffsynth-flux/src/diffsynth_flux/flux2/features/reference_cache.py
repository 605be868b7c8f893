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
from diffsynth.runtime.feature import Configs, Feature
from diffsynth.runtime.unit import Phase, unit
from diffsynth_flux.flux2.extension import Attend, BlockIndex, Extension, Network, Stream
from diffsynth_flux.flux2.features.edit import EditImages, References

KeysValues = tuple[Float[Tensor, "b s n d"], Float[Tensor, "b s n d"]]
"""Keys, after norm and RoPE, and values of the tokens of reference images in a block."""


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
        recorded: block -> keys and values; filled by the pass.
    """

    placed: Mapping[int, Float[Tensor, "1 c h w"]]
    recorded: dict[BlockIndex, KeysValues] = field(default_factory=dict)

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with all images at their times; see `diffsynth_flux.flux2.extension.Extension`."""
        (first, *others), text_len = self.placed, stream.text.shape[1]
        positions = stream.positions.clone()
        positions[:, text_len:, 0] = first
        stream = dit.set_positions(stream, positions)
        if others:
            stream = dit.append_images(stream, {time: self.placed[time] for time in others})
        return replace(stream, attend=lambda block: partial(self._attend, block, text_len))

    def _attend(self, block: BlockIndex, text_len: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention output: text and references each attend to themselves; record those of references."""
        self.recorded[block] = (k[:, text_len:], v[:, text_len:])
        parts = (attention(*(x[:, rows] for x in (q, k, v))) for rows in (slice(text_len), slice(text_len, None)))
        return torch.cat(tuple(parts), dim=1)


@dataclass(frozen=True, eq=False)
class CachedReferences:
    """Extension in which every block attends also to recorded keys and values.

    Args:
        recorded: block -> keys and values.
    """

    recorded: Mapping[BlockIndex, KeysValues]

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream whose blocks attend to more; see `diffsynth_flux.flux2.extension.Extension`."""
        attend = stream.attend
        return replace(stream, attend=lambda block: partial(self._attend, block, attend(block)))

    def _attend(self, block: BlockIndex, attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.expand(len(q), -1, -1, -1) for x in self.recorded[block])
        return attend(q, torch.cat((k, keys), dim=1), torch.cat((v, values), dim=1))


@unit("references", phase=Phase.NETWORK, requires=("vae",), only_with="edit_image")
def cache_references(
    dit: Any,
    *,
    edit_image: EditImages,
    references: References,
    edit_image_kv_cache: bool = False,
    network_guidance: Float[Tensor, "b"] | None,
    device: torch.device,
) -> Extension:
    """Return `CachedReferences` with the keys and values of the reference images; without a cache `references`."""
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
    return CachedReferences(record.recorded)


def check(configs: Configs, values: Mapping[str, Any]) -> None:
    """Raise an error for a cache without reference images.

    Raises:
        ValueError: `edit_image_kv_cache` is True, and there are no reference images.
    """
    if values["edit_image_kv_cache"] and values["edit_image"] is None:
        raise ValueError("edit_image_kv_cache=True: expected edit_image, whose keys and values are stored")


REFERENCE_CACHE = Feature("reference_cache", arguments=ReferenceCacheArguments, units=(cache_references,), check=check)
