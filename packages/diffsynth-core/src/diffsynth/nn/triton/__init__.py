"""The fused kernels of `diffsynth.nn`, one file each. They import Triton, so `diffsynth.nn` imports them at first use.

Kernels compute in fp32 and round once, so in bf16 and fp16 they are more accurate than the reference implementations,
which round after every operation. Names: `i_*` program indices, `o_*` offsets, `m_*` masks, `b_*` loaded blocks.
"""
