"""Door: metrics of generated images."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(
    __name__,
    {"ModelConfig": "diffsynth:ModelConfig"},
    dict.fromkeys(
        ("AestheticMetric", "FIDMetric", "PickScoreMetric", "QwenImageBenchMetric", "UnifiedRewardEditMetric"),
        later("metrics"),
    ),
)
