"""Rotary position embedding over several axes (Su et al. 2021, arXiv:2104.09864).

The head is cut into one section per axis (time, height, width); within a section neighbouring channels `(2i, 2i + 1)`
are a complex number that is rotated by `position * theta ** (-2i / section)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffsynth.nn import fused, naive

Rotary: TypeAlias = tuple[Float[Tensor, "#b s half_d"], Float[Tensor, "#b s half_d"]]
"""Cosine and sine of the angles of `rotary_angles`."""


def rotary_angles(
    position_ids: Int[Tensor, "b s axes"], *, axes_dims: Sequence[int], theta: float
) -> Float[Tensor, "b s half_d"]:
    """Return the rotary angles of tokens, in radians, as an fp32 tensor `b s half_d` (half the head dim) on the device
    of `position_ids`.

    Products are computed in fp64: with fp32 frequencies, the angle at position 1000 has an error of 3e-5 rad. For a
    device without fp64, pass positions on the CPU.

    Args:
        position_ids: one integer position per axis.
        axes_dims: even section sizes, whose sum is the head dim.
        theta: base of the frequencies.
    """
    device = position_ids.device
    sections = []
    for axis, dim in enumerate(axes_dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
        sections.append(position_ids[..., axis, None].double() / theta**exponents)
    return torch.cat(sections, dim=-1).float()


def rotary_table(
    positions: Int[Tensor, "#b s axes"],
    *,
    axes_dims: Sequence[int],
    theta: float,
    device: torch.device,
    step: Any = None,
) -> Rotary:
    """Return (cos, sin), fp32 tensors `#b s half_d` on `device`: cosines and sines of the rotary angles of tokens.

    Args:
        positions: one integer position per axis, on the CPU.
        axes_dims, theta: see `rotary_angles`.
        device: of the result.
        step: context of the sampling step (`diffsynth.runtime.feature.StepContext`). Its `call_state` keeps the result
            for later steps with equal positions: the copy to a GPU would wait for the step before. Another object, or
            None, keeps nothing.
    """
    state = getattr(step, "call_state", None)
    if state is None or positions.is_meta or torch.compiler.is_compiling():
        return _rotary_table(positions, axes_dims, theta, device)
    tables: dict[Any, Rotary] = state.setdefault("rotary_tables", {})
    key = (positions.shape, positions.contiguous().numpy().tobytes(), tuple(axes_dims), theta, device)
    if key not in tables:
        tables[key] = _rotary_table(positions, axes_dims, theta, device)
    return tables[key]


def _rotary_table(positions: Tensor, axes_dims: Sequence[int], theta: float, device: torch.device) -> Rotary:
    angles = rotary_angles(positions, axes_dims=axes_dims, theta=theta).to(device)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return angles.cos(), angles.sin()
    # As parts of complex numbers, which `apply_rotary` multiplies by on the CPU.
    return torch.view_as_real(torch.complex(angles.cos(), angles.sin())).unbind(-1)


def apply_rotary(
    x: Float[Tensor, "b s n d"], cos: Float[Tensor, "#b s half_d"], sin: Float[Tensor, "#b s half_d"]
) -> Float[Tensor, "b s n d"]:
    """Return `x` (`b s n d`) with channels `(2i, 2i + 1)` of each head rotated by the angles of `cos` and `sin` (`#b s
    half_d`), in the dtype of `x`; computed in fp32 (fp64 for fp64).
    """
    out = fused.norm_rotary(x, None, cos, sin)
    return naive.apply_rotary(x, cos, sin) if out is None else out
