"""Door: training and pipeline parts of DiffSynth-Studio."""

from __future__ import annotations

from diffsynth.compat.doors import door, use

__getattr__ = door(
    __name__,
    absent={
        **dict.fromkeys(
            ("DiffusionTrainingModule", "FlowMatchSFTLoss", "ModelLogger", "launch_training_task"),
            use("a recipe and `diffsynth train recipe.toml` (docs/training.md)"),
        ),
        "FlowMatchScheduler": use("diffsynth.sampling.schedule, whose functions return the sigmas of each family"),
    },
)
