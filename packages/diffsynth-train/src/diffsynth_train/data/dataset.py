"""Samples of a manifest as a pipeline's call arguments, drawn in an order that the seed and the step alone decide."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from diffsynth.errors import TrainingError, did_you_mean
from diffsynth.runtime.images import image_to_tensor
from diffsynth_train.config import CaptionRecipe, DataRecipe
from diffsynth_train.data.manifest import Manifest, read_manifest

_MEMORY_LIMIT = 2 << 30
_FIELDS = ("caption", "article")


class Dataset:
    """Rows as call arguments: text as lists, images as tensors in [-1, 1].

    Args:
        recipe: the `[data]` section.
        columns: manifest column -> call argument, as the pipeline's `TrainingSpec` states it.

    Raises:
        TrainingError: the manifest or the caption templates are unfit.
    """

    def __init__(self, recipe: DataRecipe, columns: Mapping[str, str]) -> None:
        check_templates(recipe.captions)
        self.recipe = recipe
        self.columns = dict(columns)
        self.file_columns = [column for column in columns if column != "prompt"]
        self.manifest: Manifest = read_manifest(Path(recipe.manifest), columns=columns, files=self.file_columns)
        self._pixels: dict[tuple[int, str], UInt8[Tensor, "3 h w"]] = {}
        self._held = 0

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def varied(self) -> frozenset[str]:
        """Arguments that differ from step to step, so that nothing which reads them may be cached."""
        captions = self.recipe.captions
        fixed = captions.templates == ("{caption}",) and captions.drop == 0
        return frozenset() if fixed else frozenset({"prompt"})

    def batch(self, indices: Sequence[int], draw: random.Random | None = None) -> dict[str, Any]:
        """Call arguments for some rows; captions vary if `draw` is given. Tensors are fp32 on the CPU."""
        values: dict[str, Any] = {"height": self.recipe.height, "width": self.recipe.width}
        for column, argument in self.columns.items():
            if column in self.file_columns:
                values[argument] = torch.stack([self._image(index, column) for index in indices]).float() / 127.5 - 1
            else:
                texts = [str(self.manifest.rows[index][column]) for index in indices]
                values[argument] = texts if draw is None else self._vary(texts, draw)
        return values

    def fingerprint(self, index: int) -> bytes:
        """What makes a row's fixed values what they are: its files' bytes, its texts, the size asked for."""
        parts = [f"{self.recipe.height}x{self.recipe.width}".encode()]
        for column in self.columns:
            if column in self.file_columns:
                parts.append(self.manifest.file(index, column).read_bytes())
            else:
                parts.append(str(self.manifest.rows[index][column]).encode())
        return b"\0".join(parts)

    def _vary(self, texts: Sequence[str], draw: random.Random) -> list[str]:
        return [vary_caption(text, self.recipe.captions, draw) for text in texts]

    def _image(self, index: int, column: str) -> UInt8[Tensor, "3 h w"]:
        key = (index, column)
        if key not in self._pixels:
            with Image.open(self.manifest.file(index, column)) as image:
                pixels = image_to_tensor(image, self.recipe.height, self.recipe.width)[0]
            levels = ((pixels + 1) * 127.5).round().to(torch.uint8)
            if self._held + levels.numel() > _MEMORY_LIMIT:
                return levels
            self._pixels[key] = levels
            self._held += levels.numel()
        return self._pixels[key]


def batch_indices(length: int, batch_size: int, *, step: int, seed: int) -> list[int]:
    """Rows of a step (0 is the first): each epoch visits every row once, in an order of its own.

    A batch may end one epoch and begin the next. Depends on nothing but its arguments, so that a resumed run goes on
    exactly where it stopped.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, length)
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(length, generator=generator)
        taken = order[offset : offset + batch_size - len(indices)].tolist()
        indices += taken
        position += len(taken)
    return indices


def step_random(seed: int, step: int, rank: int = 0) -> random.Random:
    """The source of a step's captions."""
    return random.Random(_mix(seed, step, rank))


def step_generator(seed: int, step: int, device: torch.device, rank: int = 0) -> torch.Generator:
    """The source of a step's noise."""
    return torch.Generator(device).manual_seed(_mix(seed, step, rank))


def _mix(*numbers: int) -> int:
    return random.Random(",".join(map(str, numbers))).getrandbits(62)


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
