"""Door: template models."""

from __future__ import annotations

from diffsynth.compat.doors import door, later

__getattr__ = door(
    __name__,
    {"load_state_dict": "diffsynth.core:load_state_dict"},
    dict.fromkeys(("TemplatePipeline", "load_template_model"), later("template models")),
)
