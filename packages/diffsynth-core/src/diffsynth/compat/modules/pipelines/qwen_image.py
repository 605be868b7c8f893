"""Door: Qwen-Image. A family that declares this door takes its place."""

from __future__ import annotations

from diffsynth.compat.doors import door, later, use

__getattr__ = door(
    __name__,
    {"ControlNetInput": "diffsynth.runtime.controlnet:ControlNetInput", "ModelConfig": "diffsynth:ModelConfig"},
    {
        "FlowMatchScheduler": use("diffsynth.sampling.schedule.qwen_image_sigmas"),
        "QwenImagePipeline": later("the Qwen-Image family"),
    },
)
