"""The files of a command's results: suffix, settings and places checked before a model is loaded, and writing."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from diffsynth.cli.output import Function, UserError, echo, fail

if TYPE_CHECKING:
    from diffsynth.registry import ModelRecord
    from diffsynth.spec import WriterSpec

_FPS = 15
"""Frames per second of a video if the model declares no frame rate."""

_KINDS = {"fps": "video", "sample_rate": "audio"}
"""Setting of writers -> the kind of results that has it."""

_OPTIONS = (
    click.option("--fps", type=float, help="Frames per second of a video, above 0; the model's own by default."),
    click.option("--quality", type=click.IntRange(1, 100), help="Quality of .jpg, .webp and .mp4; 95, and 90 of .mp4."),
    click.option("--sample-rate", type=int, metavar="HZ", help="Sample rate of sound, if the model states none."),
    click.option("--grid", metavar="RxC", help="Also write OUT-grid, all images in R rows and C columns; or auto."),
)


def output_options(function: Function) -> Function:
    """Return `function`, a command, with the options of writers: --fps, --quality, --sample-rate and --grid."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@dataclass(frozen=True)
class Outputs:
    """The files that results are written to.

    Args:
        path: of the only file; of several, their names have numbers.
        spec: of the writer.
        write: function of the writer.
        kind: what the results are: "image", "video", ...
        settings: of the writer.
        grid: rows and columns of the image of all images; (0, 0) chooses them, None writes none.
    """

    path: Path
    spec: WriterSpec
    write: Callable[..., None]
    kind: str
    settings: Mapping[str, Any]
    grid: tuple[int, int] | None = None

    def check(self, count: int | None) -> None:
        """Raise ValueError if a file of a call's results cannot be written, UserError if the grid has too few places;
        do nothing for a number that is not known.

        Args:
            count: number of results.
        """
        if count is None:
            return
        for path in self._numbered(self.path, count):
            _check_place(path, self.spec)
        if self.grid is not None:
            _check_place(self._grid_path(), self.spec)
            if 0 < math.prod(self.grid) < count:
                raise UserError(f"--grid {self.grid[0]}x{self.grid[1]} has too few places for {count} images")

    def write_all(self, results: Sequence[tuple[Any, Mapping[str, Any]]], record: Mapping[str, Any]) -> list[Path]:
        """Write results to their files, print the paths, and return them as a list.

        Args:
            results: (output, record) for each result.
            record: of the whole call, for the grid.

        Raises:
            UserError: the writer refuses a result, or a file cannot be written.
        """
        written = []
        images = []
        for (output, made_by), path in zip(results, self._numbered(self.path, len(results)), strict=True):
            for one, file, its_record in self._images_of(output, path, made_by):
                self._write(one, file, its_record)
                written.append(file)
                images.append(one)
        if self.grid is not None:
            written.append(self._write_grid(images, record))
        return written

    def write_one(self, output: Any, record: Mapping[str, Any]) -> Path:
        """Write a result to the file, print its path and return it.

        Args:
            output: the result, of a list of images one.
            record: of the call.

        Raises:
            UserError: the writer refuses the result, or the file cannot be written.
        """
        self._write(output, self.path, record)
        return self.path

    def _write(self, output: Any, path: Path, record: Mapping[str, Any]) -> None:
        settings = {"written": dict(self.settings)} if self.settings else {}
        try:
            self.write(output, path, record={**record, **settings}, **self.settings)
        except (OSError, TypeError, ValueError) as error:
            _refuse(error, self.spec, record.get("seed"))
        echo(str(path))

    def _write_grid(self, images: Sequence[Any], record: Mapping[str, Any]) -> Path:
        rows, columns = grid_of(len(images)) if not any(self.grid or ()) else self.grid or (0, 0)
        if rows * columns < len(images):  # such as layers, whose number is known only now
            rows, columns = grid_of(len(images))
        path = self._grid_path()
        self._write(image_grid(images, rows, columns), path, {**record, "grid": [rows, columns]})
        return path

    def _images_of(
        self, output: Any, path: Path, record: Mapping[str, Any]
    ) -> Iterator[tuple[Any, Path, Mapping[str, Any]]]:
        """Yield (output, file, record): for each image of a result that is a list, such as the layers of an image, if
        the writer writes images; else once, of the result.
        """
        if self.kind != "image" or not isinstance(output, list | tuple) or not output:
            yield output, path, record
            return
        for number, (image, file) in enumerate(zip(output, self._numbered(path, len(output)), strict=True), 1):
            yield image, file, {**record, "image": number}

    def _numbered(self, path: Path, count: int) -> list[Path]:
        if count == 1:
            return [path]
        return [self._with_end(path, f"-{index}") for index in range(1, count + 1)]

    def _grid_path(self) -> Path:
        return self._with_end(self.path, "-grid")

    def _with_end(self, path: Path, text: str) -> Path:
        """Return a path with a text before its suffix; at the end of a folder's."""
        length = len(path.name) - (0 if self.spec.suffix == "/" else len(self.spec.suffix))
        return path.with_name(f"{path.name[:length]}{text}{path.name[length:]}")


def find_outputs(record: ModelRecord, output: str, given: Mapping[str, Any]) -> Outputs:
    """Return the `Outputs` of a command. Loads no weights.

    Args:
        record: of the model.
        output: OUT, a file, or with "/" at the end a folder.
        given: option -> value of --fps, --quality, --sample-rate and --grid, by their parameters' names; None is not
            given.

    Raises:
        UserError, ValueError: no writer has the suffix, the model returns another kind, the file cannot be written, or
            an option does not fit.
        RegistryError: the writer's code cannot be imported.
    """
    from diffsynth.runtime.writers import check_kind, find_writer, load_writer, output_kind

    path, declared = Path(output), find_writer(output)
    spec = declared.spec
    for name, value in given.items():
        _check_option(name, value, spec)
    if not path.parent.is_dir():
        raise UserError(f"OUT is {output!r}: there is no folder {str(path.parent)!r}")
    _check_place(path, spec)
    returned = output_kind(record)
    check_kind(path, spec, returned, name=record.name)
    write = load_writer(declared)
    kind = returned if returned in (spec.kind, *spec.also) else spec.kind
    settings = {name: value for name, value in given.items() if name != "grid" and value is not None}
    taken = inspect.signature(write).parameters
    for name in settings:
        if name not in taken:
            raise UserError(f"--{name.replace('_', '-')} {settings[name]}: {spec.suffix} has none; leave it out")
    if kind == "video" and "fps" in taken:
        settings.setdefault("fps", record.fps or _FPS)
    return Outputs(path, spec, write, kind, settings, _grid(given.get("grid"), kind, spec))


def grid_of(count: int) -> tuple[int, int]:
    """Return the rows and columns of a grid of `count` images: as many columns as rows, or one more."""
    columns = math.ceil(math.sqrt(count))
    return -(-count // columns), columns


def image_grid(images: Sequence[Any], rows: int, columns: int) -> Any:
    """Return one RGB PIL image of images of one size, in reading order, without gaps.

    Args:
        images: PIL images.
        rows, columns: of the grid, at least as many places as images.

    Raises:
        ValueError: images of several sizes.
    """
    from diffsynth.core.data.image import contact_sheet

    if len(sizes := {image.size for image in images}) > 1:
        raise ValueError(f"--grid: the images have the sizes {', '.join(map(str, sorted(sizes)))}; expected one size")
    return contact_sheet(images, rows=rows, columns=columns, width=images[0].width, gap=0)


def _refuse(error: Exception, spec: WriterSpec, seed: Any) -> NoReturn:
    """Raise the error of a writer that refuses a result, in one line; for a result that does not fit the format with
    the command that writes the same result as tensors.
    """
    from diffsynth.runtime.writers import TENSORS

    if isinstance(error, TypeError | ValueError):
        again = f" --seed {seed}" if isinstance(seed, int) else ""
        hint = "" if spec.kind == TENSORS else f". Tensors can be written with -o NAME.safetensors{again}"
        error = ValueError(f"{error}{hint}")
    fail(click.get_current_context(), error)


def _check_place(path: Path, spec: WriterSpec) -> None:
    from diffsynth.core.replacing import check_new_folder, check_writable
    from diffsynth.runtime.writers import FOLDER

    (check_new_folder if spec.suffix == FOLDER else check_writable)(path)


def _check_option(name: str, value: Any, spec: WriterSpec) -> None:
    kind = _KINDS.get(name)
    if value is None or kind is None:
        return
    option = f"--{name.replace('_', '-')}"
    if kind not in (spec.kind, *spec.also):
        raise UserError(f"{option} {value:g} is for {kind}, and {spec.suffix} is for {spec.kind}; leave it out")
    if not value > 0:
        raise UserError(f"{option} {value:g}: expected a positive number")


def _grid(text: str | None, kind: str, spec: WriterSpec) -> tuple[int, int] | None:
    if text is None:
        return None
    if kind != "image":
        raise UserError(f"--grid {text} is for images, and {spec.suffix} is for {kind}; leave it out")
    if text == "auto":
        return 0, 0
    found = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not found:
        raise UserError(f"--grid {text!r}: expected ROWSxCOLUMNS, such as 2x3, or auto")
    return int(found[1]), int(found[2])
