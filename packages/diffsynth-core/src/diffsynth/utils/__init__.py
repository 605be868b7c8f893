"""Utility modules under the names of DiffSynth-Studio's documentation."""

from diffsynth.compat.doors import with_doors

__path__ = with_doors(__path__, "utils")
