"""Qwen-Image for diffsynth. Installed and listed by `diffsynth plugins`, but empty so far."""
