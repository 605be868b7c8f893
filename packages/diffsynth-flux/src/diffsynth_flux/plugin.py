"""The FLUX.1 and FLUX.2 plugin. It declares nothing yet: no model, no architecture; the family follows."""

from __future__ import annotations

DIFFSYNTH_API = 1
