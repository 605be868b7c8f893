"""Compile a Triton kernel without a GPU, and read registers, spills and shared memory from the binary.

    report = compile_report(kernel, {"x": "*bf16:16", "count": "i32"}, {"BLOCK": 1024}, target=90)
    report.problems()   # () or reasons why it must not be launched on such a GPU

Needs ptxas and cuobjdump, which are part of Triton's wheel, and kernels that were imported without TRITON_INTERPRET.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory that one block may have (CUDA programming guide, table of compute capabilities)."""

REGISTER_LIMIT = 255
"""Registers of a thread; a kernel that uses all of them is close to spilling."""

_MMA = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class Case:
    """One kernel in one configuration, as a module `*_cases.py` beside this one lists it in `cases()`.

    Args:
        name: kernel, dtype, sizes and variant; unique for each `target`.
        kernel, signature, constexprs, target, num_warps, num_stages: as for `compile_report`.
        tuned: whether this configuration was timed on such a device.
        is_default: whether CI compiles it.
    """

    name: str
    kernel: Callable[..., None]
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    target: int
    num_warps: int
    num_stages: int
    tuned: bool = False
    is_default: bool = False

    def report(self) -> Report:
        """Compile the case, and return its resources."""
        return compile_report(
            self.kernel, self.signature, self.constexprs, self.target, self.num_warps, self.num_stages
        )


@dataclass(frozen=True)
class Report:
    """Resources of one kernel in one configuration on one kind of GPU.

    Args:
        kernel: name of the function.
        arch: compute capability, 90 for sm_90.
        num_warps, num_stages: launch options.
        registers: registers per thread.
        spilled: bytes per thread that are spilled to local memory.
        shared: bytes of shared memory per block.
        mma: name -> number of matrix instructions in the code.
        seconds: compile time; near 0 if the kernel was in Triton's cache.
    """

    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    spilled: int
    shared: int
    mma: dict[str, int]
    seconds: float

    def problems(self) -> tuple[str, ...]:
        """Return why this must not be launched: spills, or more shared memory than a block can have."""
        found = []
        if self.spilled:
            found.append(f"{self.kernel} on sm_{self.arch} spills {self.spilled} bytes per thread")
        if self.shared > SHARED_LIMIT[self.arch]:
            limit = SHARED_LIMIT[self.arch]
            found.append(f"{self.kernel} on sm_{self.arch} wants {self.shared} bytes of shared memory, limit {limit}")
        return tuple(found)


def compile_report(
    kernel: Callable[..., None],
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    target: int,
    num_warps: int = 4,
    num_stages: int = 2,
) -> Report:
    """Compile `kernel` for `sm_<target>` on the CPU, and return its resources.

    Args:
        kernel: a `triton.jit` function.
        signature: type of each parameter that is not in `constexprs`: "*bf16" a pointer, "i32", "fp32"; with ":16" its
            value or address is a multiple of 16, which Triton detects at a launch.
        constexprs: value of each constexpr; None for a pointer that is not given.
        target: compute capability, a key of SHARED_LIMIT.
        num_warps, num_stages: launch options.

    Raises:
        ValueError: an interpreted kernel, or a parameter that has neither type nor value.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise ValueError(f"{kernel!r} is interpreted and has no binary; unset TRITON_INTERPRET before importing it")
    missing = [name for name in kernel.arg_names if name not in signature and name not in constexprs]
    if missing:
        raise ValueError(f"{kernel.__name__}: no type or value for {', '.join(missing)}")
    types, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        types[name], _, multiple = ("constexpr" if name in constexprs else signature[name]).partition(":")
        if multiple:
            attributes[(position,)] = [["tt.divisibility", int(multiple)]]
    source = ASTSource(kernel, types, dict(constexprs), attributes)
    started = time.perf_counter()
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    seconds = time.perf_counter() - started
    usage = _resource_usage(compiled.asm["cubin"])
    return Report(
        kernel=kernel.__name__,
        arch=target,
        num_warps=num_warps,
        num_stages=num_stages,
        registers=usage["REG"],
        spilled=usage["STACK"],  # the kernels have no local arrays, so everything on the stack is spilled
        shared=compiled.metadata.shared,
        mma={name: count for name in _MMA if (count := compiled.asm["ptx"].count(name))},
        seconds=round(seconds, 2),
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(count) for name, _, count in (word.partition(":") for word in line.split()) if count.isdigit()}
