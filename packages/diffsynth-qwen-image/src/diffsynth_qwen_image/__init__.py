"""Qwen-Image for diffsynth: no models yet; the package is listed by `diffsynth plugins`."""
