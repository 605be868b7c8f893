"""Data operators: casts, paths, dispatch and files. Those for images, clips and sound are re-exported here."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffsynth.core.data.audio import LoadAudio, LoadAudioWithTorchaudio, LoadPureAudioWithTorchaudio
from diffsynth.core.data.clip import FrameSamplerByRateMixin, LoadGIF, LoadVideo
from diffsynth.core.data.image import ImageCropAndResize, LoadImage
from diffsynth.core.data.operator_base import DataProcessingOperator, DataProcessingPipeline
from diffsynth.errors import CorruptFile, NoFiles

__all__ = [
    "DataProcessingOperator",
    "DataProcessingOperatorRaw",
    "DataProcessingPipeline",
    "FrameSamplerByRateMixin",
    "ImageCropAndResize",
    "LoadAudio",
    "LoadAudioWithTorchaudio",
    "LoadGIF",
    "LoadImage",
    "LoadPureAudioWithTorchaudio",
    "LoadTorchPickle",
    "LoadVideo",
    "RouteByExtensionName",
    "RouteByType",
    "SequencialProcess",
    "SequentialProcess",
    "ToAbsolutePath",
    "ToFloat",
    "ToInt",
    "ToList",
    "ToStr",
]


class DataProcessingOperatorRaw(DataProcessingOperator):
    """The value itself."""

    def __call__(self, data: Any) -> Any:
        """`data`."""
        return data


class ToInt(DataProcessingOperator):
    """An int, as of a csv's text."""

    def __call__(self, data: Any) -> int:
        """`int(data)`."""
        return int(data)


class ToFloat(DataProcessingOperator):
    """A float, as of a csv's text."""

    def __call__(self, data: Any) -> float:
        """`float(data)`."""
        return float(data)


class ToStr(DataProcessingOperator):
    """A text.

    Args:
        none_value: stands for None.
    """

    def __init__(self, none_value: str = "") -> None:
        self.none_value = none_value

    def __call__(self, data: Any) -> str:
        """`str(data)`, or `none_value`."""
        return self.none_value if data is None else str(data)


class ToList(DataProcessingOperator):
    """The value as the only item of a list."""

    def __call__(self, data: Any) -> list[Any]:
        """`[data]`."""
        return [data]


class ToAbsolutePath(DataProcessingOperator):
    """A path below a folder; addresses (`http://`, `https://`) pass unchanged.

    Args:
        base_path: the folder; an absolute path in the data stands for itself.
    """

    def __init__(self, base_path: str | Path = "") -> None:
        self.base_path = base_path

    def __call__(self, data: str) -> str:
        """The joined path.

        Raises:
            TypeError: not a path, as in a row without a value.
        """
        if not isinstance(data, str | Path):
            raise TypeError(f"{data!r} is no path; expected a text")
        if str(data).startswith(("http://", "https://")):
            return str(data)
        return str(Path(self.base_path) / data)


class SequentialProcess(DataProcessingOperator):
    """One operator over every item of a list.

    Args:
        operator: applied to each; None leaves them as they are.
    """

    def __init__(self, operator: Callable[[Any], Any] | None = None) -> None:
        self.operator = operator or DataProcessingOperatorRaw()

    def __call__(self, data: Sequence[Any]) -> list[Any]:
        """A list as long as `data`.

        Raises:
            TypeError: a text, whose items would be letters, or no sequence.
        """
        if isinstance(data, str) or not isinstance(data, Sequence):
            raise TypeError(f"{data!r} is no list; route other types with RouteByType")
        return [self.operator(item) for item in data]


SequencialProcess = SequentialProcess
"""The spelling of older scripts."""


class RouteByExtensionName(DataProcessingOperator):
    """An operator for a file's kind.

    Args:
        operator_map: pairs of suffixes without dot ("jpg", "png") and operator, tried in order; None for any suffix.
    """

    def __init__(self, operator_map: Sequence[tuple[Sequence[str] | None, Callable[[Any], Any]]]) -> None:
        self.operator_map = list(operator_map)

    def __call__(self, data: str) -> Any:
        """What the operator of this suffix makes of it; case does not matter.

        Raises:
            ValueError: no operator for it.
        """
        # The query of an address is no part of its suffix.
        suffix = Path(str(data).partition("?")[0]).suffix.removeprefix(".").lower()
        for suffixes, operator in self.operator_map:
            if suffixes is None or suffix in suffixes:
                return operator(data)
        known = ", ".join(name for suffixes, _ in self.operator_map for name in suffixes or ())
        raise ValueError(f"{str(data)!r} ends in {suffix or 'no suffix'!r}; expected one of {known}")


class RouteByType(DataProcessingOperator):
    """An operator for a value's type.

    Args:
        operator_map: pairs of type and operator, tried in order; None for any type.
    """

    def __init__(self, operator_map: Sequence[tuple[type | None, Callable[[Any], Any]]]) -> None:
        self.operator_map = list(operator_map)

    def __call__(self, data: Any) -> Any:
        """What the operator of this type makes of it.

        Raises:
            ValueError: no operator for it.
        """
        for kind, operator in self.operator_map:
            if kind is None or isinstance(data, kind):
                return operator(data)
        known = ", ".join(kind.__name__ for kind, _ in self.operator_map if kind is not None)
        raise ValueError(f"{data!r} is a {type(data).__name__}; expected one of {known}")


class LoadTorchPickle(DataProcessingOperator):
    """What `torch.save` wrote: tensors, numbers, texts, and lists and dicts of them. A pickle cannot run code here.

    Args:
        map_location: where tensors go.
    """

    def __init__(self, map_location: torch.device | str | None = None) -> None:
        self.map_location = map_location

    def __call__(self, data: str | Path) -> Any:
        """The content of the file.

        Raises:
            NoFiles: there is no such file.
            CorruptFile: it is no pickle, or holds objects that only running its code could make.
        """
        if not Path(data).is_file():
            raise NoFiles(f"{data} does not exist")
        try:
            return torch.load(data, map_location=self.map_location, weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CorruptFile(f"{data} is not a pickle of tensors and plain values: {reason}") from None
