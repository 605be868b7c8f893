"""Doors: utility modules under the names of DiffSynth-Studio's documentation."""
