"""Doors: the module names that DiffSynth-Studio's documentation teaches, re-exported."""
