"""Qwen-Image for diffsynth."""
