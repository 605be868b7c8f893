"""Wan video models for diffsynth. Installed and listed by `diffsynth plugins`, but empty so far."""
