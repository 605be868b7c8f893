"""Loading of training data: manifests, data operators, `UnifiedDataset`, and reading and writing of video and sound."""

from __future__ import annotations

from diffsynth.core.data.unified_dataset import UnifiedDataset

__all__ = ["UnifiedDataset"]
