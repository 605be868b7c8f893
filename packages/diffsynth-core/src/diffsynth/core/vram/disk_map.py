"""Tensors of a file by name, read when they are looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.loader import convert
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.key_differences import key_differences
from diffsynth.core.loader.reader.source import ComponentSource, stored_dtype
from diffsynth.core.loader.reader.traced import trace
from diffsynth.errors import KeyMismatch, shortened


class DiskMap(Mapping[str, Tensor]):
    """The tensors of a checkpoint as a mapping; each is read again whenever it is looked up.

    No file stays open and no tensor is cached, so there is nothing to flush.

    Args:
        path: a file, or the files of one checkpoint.
        device: device of the tensors.
        torch_dtype: dtype of floating-point tensors; None keeps the file's.
        state_dict_converter: returns other names, or other tensors, for those of the file; it is run once, on tensors
            without values (see `diffsynth.core.loader.reader.traced`).
        buffer_size: has no effect; older code passes it.

    Raises:
        CheckpointError: the file is missing or cannot be read.
        ValueError: the converter reads values of tensors.
        TypeError: a `torch_dtype` that is no floating-point dtype.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        device: torch.device | str = "cpu",
        torch_dtype: torch.dtype | None = None,
        state_dict_converter: Callable[[dict[str, Any]], Any] | None = None,
        buffer_size: int = 10**9,
    ) -> None:
        self.device = torch.device(device)
        self.torch_dtype = None if torch_dtype is None else devices.check_floating(torch_dtype, stored=True)
        self._header = read_files([Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path])
        if state_dict_converter is None:
            self._targets = convert.plan((), self._header.shapes).targets
            found = {key: stored_dtype(self._header, key) for key in self._targets}
        else:
            self._targets, found = trace(state_dict_converter, self._header)
        wanted = {
            key: torch_dtype if torch_dtype is not None and own.is_floating_point else own for key, own in found.items()
        }
        self.source = ComponentSource(self._header, self._targets, wanted)

    def __getitem__(self, name: str) -> Tensor:
        return self.source.read([name], device=self.device)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.source.keys)

    def __len__(self) -> int:
        return len(self.source.keys)

    def __contains__(self, name: object) -> bool:
        return name in self._targets

    def flush_files(self) -> None:
        """Do nothing, as no file stays open; older code calls this."""

    def source_of(self, module: nn.Module, prefix: str = "") -> ComponentSource:
        """Return a `ComponentSource`, for `wrap`, that reads the weights of `module` from the file; tensors that the
        module lacks are ignored, and those that the file lacks or has in other shapes raise KeyMismatch.

        Args:
            module: the module; the file must have its parameters and those of its buffers that are on meta.
            prefix: prefix of their names in this mapping, such as `"encoder."`.

        Raises:
            KeyMismatch: names are missing or have other shapes, or a buffer on meta is in no file.
        """
        wanted = dict(module.named_parameters()) | {
            name: buffer for name, buffer in module.named_buffers() if buffer.is_meta or prefix + name in self
        }
        if lost := [name for name in wanted if name not in module.state_dict()]:
            raise KeyMismatch(
                f"{type(module).__name__} has buffers on meta that no file holds: {shortened(lost)}. Fill them first"
            )
        keys = {name: prefix + name for name in wanted} | self._keys_of_tied(module, prefix)
        shapes = self.source.shapes
        differences = key_differences(shapes, {key: tuple(wanted[name].shape) for name, key in keys.items()})
        if faults := replace(differences, unknown=()):
            raise KeyMismatch(
                f"{self.source.where} does not fit {type(module).__name__}: {faults.describe(limit=8)}. "
                "Pass a state_dict_converter, or the prefix of its names"
            )
        targets = {name: self._targets[key] for name, key in keys.items()}
        dtypes = {name: self.source.dtypes[key] for name, key in keys.items()}
        return ComponentSource(self._header, targets, dtypes)

    def _keys_of_tied(self, module: nn.Module, prefix: str) -> dict[str, str]:
        """Return a dict first name of each parameter with several names -> its key in the file: `prefix` + the one of
        its names that the file has, else the first.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return {
            several[0]: next((prefix + name for name in several if prefix + name in self), prefix + several[0])
            for several in names.values()
            if len(several) > 1
        }
