"""FlashAttention-2 in Triton, tested against the reference implementation in `core.attention.naive`.

`backend` has the backends, `op` the PyTorch operators, `forward`, `backward` and `int8` the kernels. `addressing` and
`tiles` compute which blocks a kernel visits; `configs` has the block sizes.
"""
