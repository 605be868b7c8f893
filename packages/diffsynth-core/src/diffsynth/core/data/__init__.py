"""From files to training samples: manifests, data operators, the unified data set, video and sound."""

from __future__ import annotations

from diffsynth.core.data.unified_dataset import UnifiedDataset

__all__ = ["UnifiedDataset"]
