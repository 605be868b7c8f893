"""HDR becomes SDR by the published functions, computed here once more number by number."""

import math

import numpy as np
import pytest

from diffsynth.core.data.hdr import hlg_to_linear, pq_to_linear, sdr_from_hdr, tone_mapped


@pytest.mark.parametrize(
    ("signal", "luminance"), [(0, 0), (0.508078, 100), (0.580689, 203), (0.751827, 1000), (1, 10000)]
)
def test_pq(signal, luminance):
    """Values of ITU-R BT.2408."""
    assert float(pq_to_linear(np.array(signal))) == pytest.approx(luminance, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(("signal", "luminance"), [(0, 0), (0.38, 26.2), (0.75, 203), (1, 1000)])
def test_hlg(signal, luminance):
    """Reference white of HLG is 75% and, as 18% grey at 38%, in table 1 of ITU-R BT.2408."""
    assert hlg_to_linear(np.full((1, 3), signal)) == pytest.approx(luminance, rel=5e-3, abs=1e-3)


def mapped_grey(light: float) -> float:
    """Method A of ITU-R BT.2446 for a grey, 1 at 1000 cd/m2."""
    hdr, sdr = 1 + 32 * 0.1 ** (1 / 2.4), 1 + 32 * 0.01 ** (1 / 2.4)
    level = math.log(1 + (hdr - 1) * light ** (1 / 2.4)) / math.log(hdr)
    if level <= 0.7399:
        level *= 1.0770
    else:
        level = -1.1510 * level**2 + 2.7811 * level - 0.6302 if level < 0.9909 else 0.5 * level + 0.5
    return (sdr**level - 1) / (sdr - 1)


@pytest.mark.parametrize("light", [0, 0.001, 0.05, 0.203, 0.5, 0.99, 1])
def test_grey_stays_grey(light):
    assert tone_mapped(np.full((1, 3), light)) == pytest.approx(mapped_grey(light), abs=1e-5)


def test_levels_of_srgb():
    code = np.array([0.0, 0.3, 0.508, 0.58, 0.751827, 1.0], np.float32)
    levels = sdr_from_hdr(np.repeat(code[None, :, None], 3, axis=2), "pq")
    assert levels.dtype == np.uint8
    assert (levels.max(axis=2) - levels.min(axis=2) <= 1).all()
    greys = levels[0, :, 0].tolist()
    assert greys == sorted(greys)
    assert (greys[0], greys[-2], greys[-1]) == (0, 255, 255)
    red = sdr_from_hdr(np.array([[[0.58, 0.1, 0.1]]], np.float32), "pq")[0, 0]
    assert red[0] > 150
    assert red[1:].max() < 40
