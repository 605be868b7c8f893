"""The Wan video models plugin. It declares nothing yet: no model, no architecture; the family follows."""

from __future__ import annotations

DIFFSYNTH_API = 1
