"""Dataset: manifest rows as call arguments of a pipeline, in an order that depends on seed and step only."""

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

from diffsynth.core.data.color import rgb_of
from diffsynth.core.data.image import read_image
from diffsynth.errors import CheckpointError, TrainingError, did_you_mean
from diffsynth.runtime.images import image_to_tensor
from diffsynth_train.config import CaptionRecipe, DataRecipe
from diffsynth_train.data.manifest import Manifest, read_manifest

_MEMORY_LIMIT = 2 << 30
"""Largest size of the decoded images kept in memory, in bytes."""

_READER = 2
"""Version of how files become pixels, in the keys of the cache: 1 ignored orientation, colour profiles and alpha."""

_TEMPLATE_FIELDS = ("caption", "article")


class Dataset:
    """Rows of a manifest as call arguments: captions as lists of str, images as tensors in [-1, 1].

    Args:
        recipe: the `[data]` section.
        columns: manifest column -> call argument, as in the pipeline's `TrainingSpec`.

    Raises:
        TrainingError: the manifest, the caption templates or the background colour are invalid.
    """

    def __init__(self, recipe: DataRecipe, columns: Mapping[str, str]) -> None:
        check_templates(recipe.captions)
        try:
            rgb_of(recipe.background)
        except ValueError as error:
            raise TrainingError(f"[data] {error}") from error
        self.recipe = recipe
        self.columns = dict(columns)
        self.file_columns = [column for column in columns if column != "prompt"]
        self.manifest: Manifest = read_manifest(Path(recipe.manifest), columns=columns, files=self.file_columns)
        self._pixels: dict[tuple[int, str], UInt8[Tensor, "3 h w"]] = {}
        self._pixel_bytes = 0

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def varied(self) -> frozenset[str]:
        """Frozenset of the names of arguments that vary from step to step: `{"prompt"}`, or empty if captions are
        unchanged.
        """
        captions = self.recipe.captions
        fixed = captions.templates == ("{caption}",) and captions.drop == 0
        return frozenset() if fixed else frozenset({"prompt"})

    def batch(self, indices: Sequence[int], random_source: random.Random | None = None) -> dict[str, Any]:
        """Return a dict argument -> value for some rows (samples): for each column a list of texts, or its images as an
        fp32 tensor `b 3 h w` in [-1, 1] on the CPU; and the ints `height` and `width` in pixels.

        Args:
            indices: rows.
            random_source: source of random caption variation; None for the captions of the manifest.

        Raises:
            TrainingError: an image cannot be read; the message names manifest, row, column and file.
        """
        values: dict[str, Any] = {"height": self.recipe.height, "width": self.recipe.width}
        for column, argument in self.columns.items():
            if column in self.file_columns:
                values[argument] = torch.stack([self._image(index, column) for index in indices]).float() / 127.5 - 1
            else:
                texts = [str(self.manifest.rows[index][column]) for index in indices]
                values[argument] = texts if random_source is None else self._vary(texts, random_source)
        return values

    def fingerprint(self, index: int) -> bytes:
        """Return bytes that identify a row (sample) for caching: the image size, the background and the version of the
        reader, then, for each column, the file's contents or the text, joined by zero bytes.
        """
        recipe = self.recipe
        parts = [f"{recipe.height}x{recipe.width} over {recipe.background}, reader {_READER}".encode()]
        for column in self.columns:
            if column in self.file_columns:
                parts.append(self.manifest.file(index, column).read_bytes())
            else:
                parts.append(str(self.manifest.rows[index][column]).encode())
        return b"\0".join(parts)

    def _vary(self, texts: Sequence[str], random_source: random.Random) -> list[str]:
        return [vary_caption(text, self.recipe.captions, random_source) for text in texts]

    def _image(self, index: int, column: str) -> UInt8[Tensor, "3 h w"]:
        key = (index, column)
        if key not in self._pixels:
            image = self._read(index, column)
            pixels = image_to_tensor(image, self.recipe.height, self.recipe.width, resize_mode="crop")[0]
            levels = ((pixels + 1) * 127.5).round().to(torch.uint8)
            if self._pixel_bytes + levels.numel() > _MEMORY_LIMIT:
                return levels
            self._pixels[key] = levels
            self._pixel_bytes += levels.numel()
        return self._pixels[key]

    def _read(self, index: int, column: str) -> Image.Image:
        try:
            return read_image(self.manifest.file(index, column), background=self.recipe.background)
        except (CheckpointError, ValueError) as error:
            raise TrainingError(
                f"manifest {self.manifest.path}, row {index + 1}, column {column!r}: {error}"
            ) from error


def batch_indices(length: int, batch_size: int, *, step: int, seed: int) -> list[int]:
    """Return a list of `batch_size` row indices for step `step`, counted from 0; each epoch has every row once, in a
    new random order, and a batch may reach into the next epoch.

    A batch may extend over the end of an epoch. The result depends on the arguments only, so that a resumed run
    continues exactly.
    """
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, length)
        generator = torch.Generator().manual_seed(_mix(seed, epoch))
        order = torch.randperm(length, generator=generator)
        chosen = order[offset : offset + batch_size - len(indices)].tolist()
        indices += chosen
        position += len(chosen)
    return indices


def step_random(seed: int, step: int, rank: int = 0) -> random.Random:
    """Return a `random.Random` for the caption variation of a step, seeded by `seed`, `step` and `rank` (process
    index).
    """
    return random.Random(_mix(seed, step, rank))


def step_generator(seed: int, step: int, device: torch.device, rank: int = 0) -> torch.Generator:
    """Return a `torch.Generator` on `device` for the noise of a step, seeded by `seed`, `step` and `rank` (process
    index).
    """
    return torch.Generator(device).manual_seed(_mix(seed, step, rank))


def _mix(*numbers: int) -> int:
    return random.Random(",".join(map(str, numbers))).getrandbits(62)


def check_templates(recipe: CaptionRecipe) -> None:
    """Raise TrainingError unless there is a caption template, each contains `{caption}` and no field but this and
    `{article}`, and the probability of an empty prompt is in [0, 1).

    Raises:
        TrainingError: there is no template, a template has an unknown field or lacks `{caption}`, or `drop` is not in
            [0, 1).
    """
    if not recipe.templates:
        raise TrainingError("[data.captions] templates is empty; remove it to use unchanged captions")
    for template in recipe.templates:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        for name in fields:
            if name not in _TEMPLATE_FIELDS:
                raise TrainingError(
                    f"template {template!r} has unknown field {name!r}{did_you_mean(name, _TEMPLATE_FIELDS)}"
                )
        if "caption" not in fields:
            raise TrainingError(f"template {template!r} lacks {{caption}}")
    if not 0 <= recipe.drop < 1:
        raise TrainingError(f"[data.captions] drop = {recipe.drop}: expected a number in [0, 1)")


def vary_caption(caption: str, recipe: CaptionRecipe, random_source: random.Random) -> str:
    """Return a str: `""` with probability `recipe.drop`, else a randomly chosen template filled with `caption`."""
    if random_source.random() < recipe.drop:
        return ""
    return fill_template(random_source.choice(recipe.templates), caption)


def fill_template(template: str, caption: str) -> str:
    """Return `template` as a str, with the caption for `{caption}` and, for `{article}`, "an" if the caption begins
    with a vowel, else "a".
    """
    article = "an" if caption[:1].lower() in "aeiou" and caption else "a"
    return template.format(caption=caption, article=article)
