"""`UnifiedDataset`: training samples from the rows of a table, or from files that split training cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from diffsynth.core.data.manifest import read_rows
from diffsynth.core.data.operators import (
    DataProcessingOperator,
    DataProcessingOperatorRaw,
    ImageCropAndResize,
    LoadGIF,
    LoadImage,
    LoadTorchPickle,
    LoadVideo,
    RouteByAnimation,
    RouteByExtensionName,
    RouteByType,
    SequentialProcess,
    ToAbsolutePath,
    ToList,
)
from diffsynth.errors import TrainingError
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
VIDEOS = ("mp4", "avi", "mov", "wmv", "mkv", "flv", "webm")

Operator = Callable[[Any], Any]


class UnifiedDataset(Dataset[Any]):
    """Dataset of the rows of a table (csv, json, jsonl), or, without a table, of the `.pth` files below a folder.

    Args:
        base_path: folder of the files.
        metadata_path: the table; None uses the `.pth` files that split training cached below `base_path`.
        repeat: number of times that each row occurs in an epoch.
        data_file_keys: columns of file names; a row may lack some of them.
        main_data_operator: operator for the cells of these columns, for example `default_image_operator()`.
        special_operator_map: column -> operator, for any column; has precedence over `main_data_operator`.
        max_data_items: length of an epoch instead of rows x repeat; if it is larger, samples are repeated.

    Raises:
        TrainingError: no rows or no cached files, a table that cannot be read, or a table without any of the columns
            that have an operator.
        TypeError: `data_file_keys` is a text.
    """

    def __init__(
        self,
        base_path: str | Path | None = None,
        metadata_path: str | Path | None = None,
        repeat: int = 1,
        data_file_keys: Sequence[str] = (),
        main_data_operator: Operator | None = None,
        special_operator_map: Mapping[str, Operator] | None = None,
        max_data_items: int | None = None,
    ) -> None:
        if isinstance(data_file_keys, str):
            raise TypeError(f"data_file_keys is the text {data_file_keys!r}; expected column names: .split(',')")
        self.base_path = base_path
        self.metadata_path = metadata_path
        self.repeat = repeat
        self.data_file_keys = tuple(data_file_keys)
        self.max_data_items = max_data_items
        main = main_data_operator or DataProcessingOperatorRaw()
        self.operators: dict[str, Operator] = {**dict.fromkeys(data_file_keys, main), **(special_operator_map or {})}
        self.cached_data_operator: Operator = LoadTorchPickle(map_location="cpu")
        self.data: list[dict[str, Any]] = []
        self.cached_data: list[Path] = []
        self.load_metadata(metadata_path)

    @property
    def load_from_cache(self) -> bool:
        """Whether samples come from cached `.pth` files, which is so if `metadata_path` is None."""
        return self.metadata_path is None

    def load_metadata(self, metadata_path: str | Path | None) -> None:
        """Store the rows of the table `metadata_path` in `self.data`, or, if it is None, the paths of cached `.pth`
        files in `self.cached_data`; raise TrainingError if there are none.
        """
        self.metadata_path = metadata_path
        if metadata_path is None:
            self.search_for_cached_data_files(self.base_path or ".")
            return
        self.data = read_rows(Path(metadata_path))
        if not self.data:
            raise TrainingError(f"{metadata_path} has no rows")
        columns = {column: None for row in self.data for column in row}
        if self.operators and not set(self.operators) & set(columns):
            raise TrainingError(
                f"{metadata_path} has none of the columns {', '.join(self.operators)}; it has {', '.join(columns)}"
            )

    def search_for_cached_data_files(self, path: str | Path) -> None:
        """Store a sorted list of the paths of all `.pth` files below the folder `path` in `self.cached_data`; raise
        TrainingError if there are none.
        """
        self.cached_data = sorted(Path(path).rglob("*.pth"))
        if not self.cached_data:
            raise TrainingError(f"no .pth file below {path}; give a metadata_path, or the folder of cached samples")
        logger.info("%d cached samples below %s", len(self.cached_data), path)

    def __len__(self) -> int:
        if self.max_data_items is not None:
            return self.max_data_items
        return len(self.cached_data if self.load_from_cache else self.data) * self.repeat

    def __getitem__(self, index: int) -> Any:
        """Return a row as a dict column -> value, with its files loaded, or the content of a cached file.

        Raises:
            IndexError: index out of range.
            TrainingError: an operator fails; the message names row, column and reason.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        if self.load_from_cache:
            return self.cached_data_operator(self.cached_data[index % len(self.cached_data)])
        number = index % len(self.data)
        return {column: self._value(number, column, cell) for column, cell in self.data[number].items()}

    def _value(self, number: int, column: str, cell: Any) -> Any:
        if column not in self.operators:
            return cell
        try:
            return self.operators[column](cell)
        except Exception as error:  # operators of users may raise anything; the message must name the row
            raise TrainingError(f"{self.metadata_path}, row {number + 1}, column {column!r}: {error}") from error

    @staticmethod
    def check_data_equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
        """Whether two samples (dicts column -> value) have the same columns with equal values."""
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)

    @staticmethod
    def default_image_operator(
        base_path: str | Path = "",
        max_pixels: int | None = 1920 * 1080,
        height: int | None = None,
        width: int | None = None,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
    ) -> DataProcessingOperator:
        """Return a data operator (callable) that maps the path of an image, or a list of paths, to the resized PIL
        image, or a list of them.
        """
        resize = ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor)
        load = ToAbsolutePath(base_path) >> LoadImage() >> resize
        return RouteByType([(str, load), (list, SequentialProcess(load))])

    @staticmethod
    def default_video_operator(
        base_path: str | Path = "",
        max_pixels: int | None = 1920 * 1080,
        height: int | None = None,
        width: int | None = None,
        height_division_factor: int = 16,
        width_division_factor: int = 16,
        num_frames: int = 81,
        time_division_factor: int = 4,
        time_division_remainder: int = 1,
    ) -> DataProcessingOperator:
        """Return a data operator (callable) that maps the path of a video, an animated image or an image to a list of
        its first `num_frames` frames as resized PIL images, one for an image.

        See `LoadVideo` and `ImageCropAndResize`.
        """
        resize = ImageCropAndResize(height, width, max_pixels, height_division_factor, width_division_factor)
        frames = (num_frames, time_division_factor, time_division_remainder, resize)
        by_suffix = RouteByExtensionName(
            [
                (IMAGES, RouteByAnimation(LoadGIF(*frames), LoadImage() >> resize >> ToList())),
                (("gif",), LoadGIF(*frames)),
                (VIDEOS, LoadVideo(*frames)),
            ]
        )
        return RouteByType([(str, ToAbsolutePath(base_path) >> by_suffix)])


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and bool(first == second)
