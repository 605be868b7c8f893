"""Conversion of HDR video and HDR images (ITU-R BT.2100, PQ and HLG) to SDR in sRGB."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8

from diffsynth.core.data.code_points import BT2020, matrix_between, srgb_encoded

_HDR_PEAK = 1000.0
"""Luminance in cd/m2 that becomes SDR white; brighter pixels are clipped to it."""

_SDR_PEAK = 100.0
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)

_REC2020_TO_REC709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349], [-0.018151, -0.100579, 1.118730]], np.float32
)
"""Linear BT.2020 to linear BT.709, ITU-R BT.2407."""


def sdr_from_hdr(
    signal: Float[np.ndarray, "h w 3"], transfer: Literal["pq", "hlg"], primaries: int = BT2020
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the pixels of an HDR frame as 8-bit sRGB, tone-mapped by method A of ITU-R BT.2446.

    Args:
        signal: non-linear R'G'B', float32 in [0, 1] at full range.
        transfer: "pq" (SMPTE ST 2084) or "hlg" (ARIB STD-B67).
        primaries: ColourPrimaries of ITU-T H.273, such as 9 (BT.2020) and 12 (Display P3); unspecified or unknown ones
            are taken as those of BT.2020.
    """
    light = pq_to_linear(signal) if transfer == "pq" else hlg_to_linear(signal)
    matrix = matrix_between(primaries, BT2020)
    light = light if matrix is None else (light @ matrix.T).clip(0)
    mapped = tone_mapped(np.minimum(light / _HDR_PEAK, 1))
    linear = (mapped.clip(0, 1) ** 2.4) @ _REC2020_TO_REC709.T
    return np.rint(srgb_encoded(linear.clip(0, 1)) * 255).astype(np.uint8)


def pq_to_linear(signal: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the luminance in cd/m2, 0 to 10000, of a PQ signal in [0, 1] (SMPTE ST 2084)."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def hlg_to_linear(signal: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Return the luminance in cd/m2 of an HLG signal R'G'B' in [0, 1] on a display of 1000 cd/m2 (ITU-R BT.2100)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    luminance = (scene @ _LUMA)[..., None]
    return _HDR_PEAK * scene * np.maximum(luminance, 1e-9) ** 0.2


def tone_mapped(light: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Return non-linear SDR R'G'B' of BT.2020 of HDR light, by method A of ITU-R BT.2446.

    Args:
        light: linear RGB of BT.2020; 1 is 1000 cd/m2.
    """
    red_green_blue = light ** (1 / 2.4)
    luma = (red_green_blue @ _LUMA)[..., None]
    hdr = 1 + 32 * (_HDR_PEAK / 10000) ** (1 / 2.4)
    sdr = 1 + 32 * (_SDR_PEAK / 10000) ** (1 / 2.4)
    perceived = np.log1p((hdr - 1) * luma) / np.log(hdr)
    bent = np.where(
        perceived <= 0.7399,
        1.0770 * perceived,
        np.where(perceived < 0.9909, -1.1510 * perceived**2 + 2.7811 * perceived - 0.6302, 0.5 * perceived + 0.5),
    )
    mapped = (sdr**bent - 1) / (sdr - 1)
    factor = mapped / np.maximum(1.1 * luma, 1e-9)
    blue = factor * (red_green_blue[..., 2:] - luma) / 1.8814
    red = factor * (red_green_blue[..., :1] - luma) / 1.4746
    level = mapped - np.maximum(0.1 * red, 0)
    green = level - (_LUMA[0] * 1.4746 * red + _LUMA[2] * 1.8814 * blue) / _LUMA[1]
    return np.concatenate([level + 1.4746 * red, green, level + 1.8814 * blue], axis=-1)
