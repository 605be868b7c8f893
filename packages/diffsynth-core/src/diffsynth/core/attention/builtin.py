"""Our backends, in the order in which `auto` tries those of one priority."""

from __future__ import annotations

from diffsynth.core.attention.flex import FlexAttention
from diffsynth.core.attention.libraries.flash_attention import FLASH_ATTENTION_2, FLASH_ATTENTION_3, FLASH_ATTENTION_4
from diffsynth.core.attention.libraries.sage import SageAttention
from diffsynth.core.attention.libraries.xformers import XformersAttention
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.sdpa import SdpaAttention
from diffsynth.core.attention.select import register_backend
from diffsynth.core.attention.triton.backend import TritonAttention, TritonInt8Attention


def register_builtin_backends() -> None:
    """Make them known, once. Whether a library is installed is looked up when it is first needed."""
    register_backend("flash_attention_4", FLASH_ATTENTION_4)
    register_backend("flash_attention_3", FLASH_ATTENTION_3)
    register_backend("sdpa", SdpaAttention())
    register_backend("triton", TritonAttention(), priority=-5)
    register_backend("flash_attention_2", FLASH_ATTENTION_2, priority=-10)
    register_backend("xformers", XformersAttention(), priority=-20)
    register_backend("sage_attention", SageAttention(), priority=-30)
    register_backend("triton_int8", TritonInt8Attention(), priority=-40)
    register_backend("flex", FlexAttention(), priority=-80)
    for kernel in ("flash", "cudnn", "efficient", "math"):
        register_backend(f"sdpa_{kernel}", SdpaAttention(kernel), priority=-90)
    register_backend("naive", NaiveAttention(), priority=-100)
