"""The fused kernels of `diffsynth.nn`, one file each. Importing one imports triton; `diffsynth.nn` waits for first use.

Kernels compute in fp32 and round once, so in bf16 and fp16 they are nearer to the truth than their naive twins, which
round after every step. Names are a language: `i_*` program indices, `o_*` offsets, `m_*` masks, `b_*` loaded blocks.
"""
