"""The weights of a component whose linear layers are quantized while they are read, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.core.loader.component import check_finite
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.quant.method import QuantMethod


class QuantizedSource:
    """A source that reads the parts of quantized weights in place of the weights.

    The file is read as often as before, and the parts are computed from it each time: equal bits, but more work than a
    file with quantized weights. Memory for one weight is needed beside the result.

    Args:
        source: of the component's weights.
        methods: name of a layer -> method of its weight.
        rounds_only: whether the weights are dequantized again, and have their own names.
    """

    def __init__(self, source: WeightSource, methods: Mapping[str, QuantMethod], *, rounds_only: bool) -> None:
        self._source = source
        self._methods = {f"{name}.weight": method for name, method in methods.items()}
        self._rounds_only = rounds_only
        self._weight_of: dict[str, str] = {}
        self.where = source.where
        self.dtypes: dict[str, torch.dtype] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key, shape in source.shapes.items():
            if key not in self._methods or rounds_only:
                self.dtypes[key], self.shapes[key] = source.dtypes[key], shape
                self._weight_of |= {key: key} if key in self._methods else {}
                continue
            for part, info in self._methods[key].parts(*shape).items():
                name = f"{key.removesuffix('weight')}{part}"
                self._weight_of[name] = key
                self.dtypes[name], self.shapes[name] = info.stored, info.shape

    @property
    def keys(self) -> tuple[str, ...]:
        """A tuple of the names of all tensors."""
        return tuple(self.dtypes)

    @property
    def files(self) -> tuple[Path, ...]:
        """A tuple of the `Path`s of the files that are read; empty for tensors in memory."""
        return self._source.files

    @property
    def streams(self) -> bool:
        """Whether reading some tensors takes memory for those only."""
        return self._source.streams

    def size(self, keys: Iterable[str] | None = None) -> int:
        """Return the total size in bytes of the tensors named in `keys` (None: all)."""
        return sum(prod(self.shapes[key]) * self.dtypes[key].itemsize for key in (self.keys if keys is None else keys))

    def host_memory(self, device: torch.device | str, *, copy: bool) -> int:
        """Return the peak host memory, in bytes, to read all tensors onto `device`."""
        largest = max((self._source.size([key]) for key in self._methods), default=0)
        on_host = torch.device(device).type == "cpu"
        return min(self._source.host_memory(device, copy=copy), 4 * largest) + (self.size() if on_host else 0)

    def read(
        self, keys: Iterable[str] | None = None, *, device: torch.device | str = "cpu", copy: bool = True
    ) -> dict[str, Tensor]:
        """Return a dict name -> tensor on `device` for `keys` (None: all). Arguments and errors: see
        `ComponentSource.read`.

        Raises:
            CorruptFile: a weight to be quantized holds NaN or infinity.
        """
        wanted = self.keys if keys is None else tuple(keys)
        if torch.device(device).type == "meta":
            return {key: torch.empty(self.shapes[key], dtype=self.dtypes[key], device="meta") for key in wanted}
        plain, weights = self._plain_and_quantized(wanted)
        made = self._source.read(plain, device=device, copy=copy)
        for key in weights:
            made |= self._quantized(key, torch.device(device))
        return {key: made[key] for key in wanted}

    def fill(self, into: Mapping[str, Tensor]) -> None:
        """Read the tensors named in `into` into the existing tensors of `into`. Arguments and errors: see
        `ComponentSource.fill`.
        """
        plain, weights = self._plain_and_quantized(into)
        self._source.fill({key: into[key] for key in plain})
        for key in weights:
            made = self._quantized(key, next(iter(into.values())).device)
            for name in made.keys() & into.keys():
                into[name].copy_(made[name])

    def read_ahead(self, *, limit: int, stop: Callable[[], bool]) -> None:
        """Read up to `limit` bytes of the files and drop them; see `ComponentSource.read_ahead`."""
        self._source.read_ahead(limit=limit, stop=stop)

    def _plain_and_quantized(self, names: Iterable[str]) -> tuple[list[str], list[str]]:
        """Return (those of the names that are read as they are, the weights that the others are made of, each once)."""
        names = list(names)
        weights = dict.fromkeys(self._weight_of[name] for name in names if name in self._weight_of)
        return [name for name in names if name not in self._weight_of], list(weights)

    def _quantized(self, key: str, device: torch.device) -> dict[str, Tensor]:
        weight = self._source.read([key], device=device)[key]
        check_finite({key: weight}, self.where)
        method = self._methods[key]
        parts = method.quantize(weight)
        if self._rounds_only:
            return {key: method.dequantize(parts, weight.dtype)}
        return {f"{key.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
