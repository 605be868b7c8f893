"""Captions that vary from step to step, drawn from the run's seed."""

from __future__ import annotations

import random
import string

from diffsynth.errors import TrainingError, did_you_mean
from diffsynth_train.config import CaptionRecipe

_FIELDS = ("caption", "article")


def check_templates(recipe: CaptionRecipe) -> None:
    """Refuse templates that could not be filled in.

    Raises:
        TrainingError: no template, a field that is unknown, or a template without `{caption}`.
    """
    if not recipe.templates:
        raise TrainingError("[data.captions] templates is empty; leave it out to use captions as they are")
    for template in recipe.templates:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for name in fields:
            if name not in _FIELDS:
                raise TrainingError(f"template {template!r} has unknown field {name!r}{did_you_mean(name, _FIELDS)}")
        if "caption" not in fields:
            raise TrainingError(f"template {template!r} lacks {{caption}}")
    if not 0 <= recipe.drop < 1:
        raise TrainingError(f"[data.captions] drop = {recipe.drop}: expected a share in [0, 1)")


def vary_caption(caption: str, recipe: CaptionRecipe, draw: random.Random) -> str:
    """The caption in a drawn template, or the empty prompt."""
    if draw.random() < recipe.drop:
        return ""
    return fill_template(draw.choice(recipe.templates), caption)


def fill_template(template: str, caption: str) -> str:
    """The template with the caption, and the article that goes before it."""
    article = "an" if caption[:1].lower() in "aeiou" and caption else "a"
    return template.format(caption=caption, article=article)
