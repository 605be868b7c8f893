"""Accuracy of the kernels of `diffsynth.nn` under Triton's interpreter."""

import torch

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""dtype -> largest error relative to the largest value. A GPU rounds bf16 to nearest, within 2^-8; the interpreter
truncates."""
