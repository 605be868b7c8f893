"""Wan video models for diffsynth."""
