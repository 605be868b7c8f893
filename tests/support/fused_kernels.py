"""What the kernels of `diffsynth.nn` promise, as far as Triton's interpreter can show it."""

import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""Of the largest value. A GPU rounds bf16 to nearest, within 2^-8; the interpreter cuts it off."""
