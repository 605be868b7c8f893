"""Flash attention in Triton.

`backend` says what it refuses, `op` shows it to PyTorch, `forward` and `backward` hold the kernels, `places` and
`tiles` say which blocks they visit, `configs` how they are cut; `int8` is the one whose scores are products of 8 bits.
The truth that they are tested against is `naive`.
"""
