"""Plugin of diffsynth-qwen-image; it registers no models and no architectures yet."""

from __future__ import annotations

DIFFSYNTH_API = 2
