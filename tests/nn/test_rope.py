from __future__ import annotations

import cmath

import torch

import parity
from diffsynth.nn.rope import apply_rotary, rotary_angles, rotary_table
from diffsynth.runtime.feature import StepContext

AXES = (4, 6, 6)


def test_angles_are_position_times_frequency() -> None:
    ids = torch.tensor([[[1000, 3, 0]]])
    angles = rotary_angles(ids, axes_dims=AXES, theta=256.0)[0, 0]
    truth = [1000, 1000 / 256**0.5, 3, 3 / 256 ** (1 / 3), 3 / 256 ** (2 / 3), 0, 0, 0]
    assert angles.dtype == torch.float32
    assert torch.equal(angles, torch.tensor(truth, dtype=torch.float64).float())


def test_neighbouring_channels_rotate_as_a_complex_number() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 16, generator=generator)
    ids = torch.randint(50, (2, 5, 3), generator=generator)
    angles = rotary_angles(ids, axes_dims=AXES, theta=10.0)
    got = apply_rotary(x, angles.cos(), angles.sin())
    for b, s, n, i in [(0, 0, 0, 0), (1, 4, 2, 7), (0, 3, 1, 2)]:
        number = complex(x[b, s, n, 2 * i], x[b, s, n, 2 * i + 1]) * cmath.exp(1j * float(angles[b, s, i]))
        assert abs(complex(got[b, s, n, 2 * i], got[b, s, n, 2 * i + 1]) - number) < 1e-5


def test_scores_depend_on_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def score(q_at: int, k_at: int) -> torch.Tensor:
        angles = rotary_angles(torch.tensor([[[q_at] * 3], [[k_at] * 3]]), axes_dims=AXES, theta=256.0)
        cos, sin = angles.cos(), angles.sin()
        return (apply_rotary(q, cos[:1], sin[:1]) * apply_rotary(k, cos[1:], sin[1:])).sum()

    assert parity.relative_error(score(7, 2)[None], score(105, 100)[None]) < 1e-4
    assert parity.relative_error(score(7, 2)[None], score(8, 2)[None]) > 1e-2


def test_one_table_serves_a_batch_and_keeps_bf16() -> None:
    x = torch.randn(3, 5, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    angles = rotary_angles(torch.arange(15).view(1, 5, 3), axes_dims=AXES, theta=256.0)
    got = apply_rotary(x, angles.cos(), angles.sin())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rotary(x.float(), angles.cos(), angles.sin()).bfloat16())


def test_a_table_is_kept_for_the_steps_of_a_call() -> None:
    positions = torch.arange(30).view(2, 5, 3)
    given = {"axes_dims": AXES, "theta": 256.0, "device": torch.device("cpu")}
    angles = rotary_angles(positions, axes_dims=AXES, theta=256.0)
    step = StepContext(0.5)
    first = rotary_table(positions, **given, step=step)
    assert torch.equal(first[0], angles.cos())
    assert torch.equal(first[1], angles.sin())
    later = StepContext(0.4).in_branch("cond", step.call_state)
    assert rotary_table(positions.clone(), **given, step=later) is first
    for changed in (rotary_table(positions + 1, **given, step=later), rotary_table(positions, **given)):
        assert changed is not first
    assert rotary_table(positions.to("meta"), **given | {"device": torch.device("meta")}, step=step)[0].is_meta


def test_parts_of_a_table_rotate_to_the_bit() -> None:
    """`apply_rotary` reads a table as complex numbers without a copy, and parts of it too; bits are the same."""
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_table(torch.arange(15).view(1, 5, 3), axes_dims=AXES, theta=256.0, device=torch.device("cpu"))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        expected = apply_rotary(x.to(dtype), cos.contiguous(), sin.contiguous())
        assert torch.equal(apply_rotary(x.to(dtype), cos, sin), expected)
        assert torch.equal(apply_rotary(x[:, 2:].to(dtype), cos[:, 2:], sin[:, 2:]), expected[:, 2:])
        swapped = apply_rotary(x.to(dtype), sin, cos)
        assert torch.equal(swapped, apply_rotary(x.to(dtype), sin.contiguous(), cos.contiguous()))
