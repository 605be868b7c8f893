"""The table of kernel configurations is complete, and the defaults compile offline without register spills."""

import os
import subprocess
import sys
from pathlib import Path

COMPILE = Path(__file__).parents[2] / "benchmarks" / "kernels" / "compile.py"
DEFAULTS = (
    "flash_fwd, bf16, head dim 128, plain",
    "flash_dkdv, bf16, head dim 128, plain",
    "flash_dq, bf16, head dim 128, plain",
    "flash_delta, bf16, head dim 128",
    "mask_tiles, 128 x 64, window",
    "quantize, queries, bf16, head dim 128",
    "quantize, keys, bf16, head dim 128",
    "norm, rms, Z-Image",
    "norm of each head and rope, Z-Image",
    "gated silu, Z-Image",
    "sinusoids",
)


def test_the_table_is_complete_and_the_default_of_each_kernel_compiles(tmp_path):
    """It runs in its own process, because TRITON_INTERPRET is read when kernels are made.

    Triton, LLVM and ptxas without a cache take most of its 20 s, the import of torch the rest.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, COMPILE, "--default", "--complete", "--dry"]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert {line.partition(" @ 90: ")[0] for line in lines} == set(DEFAULTS)
    assert all(", 0 spilled, " in line for line in lines)
