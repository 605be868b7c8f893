"""Two experts: one network for high noise levels, one for low ones (Wan 2.2)."""

from __future__ import annotations

from diffsynth.runtime.unit import unit


@unit("expert_boundary", requires=("dit2",))
def set_boundary(*, switch_DiT_boundary: float = 0.875) -> float:  # noqa: N803 - the published name
    """The noise level from which on `dit2` takes over: a step that starts below it is the second expert's.

    Raises:
        ValueError: not in [0, 1].
    """
    if isinstance(switch_DiT_boundary, bool) or not 0 <= switch_DiT_boundary <= 1:
        raise ValueError(f"switch_DiT_boundary={switch_DiT_boundary!r}: expected a noise level in [0, 1]")
    return float(switch_DiT_boundary)
