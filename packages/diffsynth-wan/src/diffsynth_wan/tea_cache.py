"""TeaCache's coefficients for Wan 2.1, as its authors published them (Liu et al. 2024, arXiv:2411.19108)."""

from __future__ import annotations

from diffsynth.spec import TeaCacheSpec


def _fitted(*coefficients: float) -> TeaCacheSpec:
    # Those fitted to the time's projection, six modulations of a block, not to the time embedding before it.
    return TeaCacheSpec(coefficients=coefficients, signal="argument:modulation")


TEA_CACHE = {
    "wan2.1-t2v-1.3b": _fitted(-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "wan2.1-t2v-14b": _fitted(-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "wan2.1-i2v-14b-480p": _fitted(2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "wan2.1-i2v-14b-720p": _fitted(8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}
"""Model name -> coefficients. Nobody has published any for Wan 2.2."""
