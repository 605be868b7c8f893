"""The conditionings of the FLUX.2 pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT
from diffsynth.runtime.kv_cache import kv_cache_feature
from diffsynth_flux.flux2.features.edit import EDIT
from diffsynth_flux.flux2.features.reference_cache import REFERENCE_CACHE
from diffsynth_flux.flux2.features.template import TEMPLATE

KV_CACHE = kv_cache_feature(
    {"double": ("transformer_blocks", "n_layers"), "single": ("single_transformer_blocks", "n_single_layers")}
)

FEATURES = (EDIT, REFERENCE_CACHE, KV_CACHE, TEMPLATE, INPAINT)
"""In the order in which their units run within a phase, and in which their extensions change the stream."""
