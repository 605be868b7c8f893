"""Upscaler after the loop, a feature that diffsynth's Z-Image pipelines get."""
