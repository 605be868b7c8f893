"""A run without weights and without a device: what a pipeline's own code would allocate and compute.

`Rehearsal` runs code on the meta device. Tensors there have shapes and no memory; what they would take is counted, and
the values of small ones are known, so that code which reads a mask or a length in the middle goes on.
"""

from __future__ import annotations

from diffsynth.core.vram.rehearsal.mode import Rehearsal, Stage, Visit

__all__ = ["Rehearsal", "Stage", "Visit"]
