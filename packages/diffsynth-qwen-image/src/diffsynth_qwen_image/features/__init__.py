"""The conditionings of the Qwen-Image pipeline, a module each."""

from __future__ import annotations

from diffsynth.runtime.inpainting import INPAINT
from diffsynth.runtime.kv_cache import kv_cache_feature
from diffsynth_qwen_image.features.blockwise_controlnet import BLOCKWISE_CONTROLNET
from diffsynth_qwen_image.features.context import CONTEXT
from diffsynth_qwen_image.features.controlnet import CONTROLNET
from diffsynth_qwen_image.features.edit import EDIT
from diffsynth_qwen_image.features.eligen import ELIGEN
from diffsynth_qwen_image.features.image_to_lora import IMAGE_TO_LORA
from diffsynth_qwen_image.features.layers import LAYERS

KV_CACHE = kv_cache_feature({"block": ("transformer_blocks", "n_layers")})

FEATURES = (CONTEXT, EDIT, LAYERS, ELIGEN, KV_CACHE, INPAINT, CONTROLNET, BLOCKWISE_CONTROLNET, IMAGE_TO_LORA)
"""In the order in which their units run within a phase, and in which their extensions change the stream: the regions of
entities are in the tokens of all images, so those are appended before."""
