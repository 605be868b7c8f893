"""From a recognised header to a module with weights: build on meta, plan, check, then read one target at a time."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.recognize import Recognized
from diffsynth.errors import CorruptFile, NotEnoughMemory
from diffsynth.spec import ArchitectureSpec, resolve

logger = logging.getLogger(__name__)


def build(architecture: ArchitectureSpec, config: Any) -> nn.Module:
    """The module on the meta device: no memory, no initialisation."""
    with torch.device("meta"):
        return resolve(architecture.module)(config)


def load_component(
    recognized: Recognized, header: Header, *, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A module in eval mode with its weights, on `device` in `dtype`.

    Peak memory is the module plus one target and its sources. Tensors of a `ModelConfig.state_dict` that need no
    change are shared with it, not copied.

    Args:
        recognized: what the file holds.
        header: of that file.
        device: where the weights go.
        dtype: of floating tensors. When it is narrower than 16 bits, which only storage is, the architecture's
            `high_precision` patterns keep the file's dtype.

    Raises:
        KeyMismatch: keys or shapes do not fit; nothing was read.
        NotEnoughMemory: it would not fit; nothing was read.
    """
    architecture, prefix = recognized.architecture, recognized.prefix
    module = build(architecture, recognized.config)
    keys = recognized.keys or tuple(key for key in header.tensors if key.startswith(prefix))
    plan = convert.plan(recognized.rules, {key.removeprefix(prefix): header.tensors[key].shape for key in keys})
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    where = ", ".join(map(str, header.files)) or "the given state_dict"
    unused = convert.check(plan, wanted, where=where, unused="report" if recognized.tier == "structure" else "raise")
    _warn_unused([prefix + source for key in unused for source in plan.targets[key].sources], recognized, where)
    reader = TensorReader(header, prefix)
    dtypes = {key: _dtype(key, plan.targets[key], reader, architecture=architecture, dtype=dtype) for key in wanted}
    _check_memory({key: plan.targets[key] for key in wanted}, dtypes, reader, device=device, where=where)
    with reader:
        state = {key: _make(plan.targets[key], reader, device=device, dtype=dtypes[key]) for key in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    for part in module.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{type(module).__name__} leaves {left} on meta; give it a reset_buffers()"
    return module.to(device).eval().requires_grad_(False)


class TensorReader:
    """Single tensors of a header. Files stay open from the first read to the end of the `with`.

    Args:
        header: names and places.
        prefix: stands before every key that is asked for.
    """

    def __init__(self, header: Header, prefix: str = "") -> None:
        self._header = header
        self._prefix = prefix
        self._open: dict[Path, BinaryIO] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for stream in self._open.values():
            stream.close()
        self._open.clear()

    def dtype(self, key: str) -> torch.dtype:
        """As stored; told by the header."""
        in_memory = self._in_memory(key)
        return in_memory.dtype if in_memory is not None else _torch_dtype(self._header.tensors[self._prefix + key])

    def shape(self, key: str) -> tuple[int, ...]:
        """As stored."""
        return self._header.tensors[self._prefix + key].shape

    def size(self, key: str) -> int:
        """Bytes that reading it takes: none for what is in memory anyway."""
        info = self._header.tensors[self._prefix + key]
        return info.end - info.start

    def __call__(self, key: str, rows: slice | None = None) -> Tensor:
        """One tensor as stored, or only some of its rows; in memory of its own unless the caller gave it."""
        in_memory = self._in_memory(key)
        if in_memory is not None:
            tensor = in_memory if rows is None else in_memory[rows]
            # A pickle's tensors are the file, mapped: whoever changes the file would change the weights.
            return tensor.clone(memory_format=torch.contiguous_format) if self._header.files else tensor
        info = self._header.tensors[self._prefix + key]
        shape, start = info.shape, info.start
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
            start += (info.end - info.start) // max(info.shape[0], 1) * rows.start
        tensor = torch.empty(shape, dtype=_torch_dtype(info))
        if tensor.numel():
            self._read_into(tensor, info, start)
        return tensor

    def _read_into(self, tensor: Tensor, info: TensorInfo, start: int) -> None:
        assert info.file is not None
        if info.file not in self._open:
            self._open[info.file] = info.file.open("rb", buffering=0)
        stream = self._open[info.file]
        stream.seek(start)
        left = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        while left:
            count = stream.readinto(left)
            if not count:
                raise CorruptFile(f"{info.file} ends in the middle of a tensor; it changed since its header was read")
            left = left[count:]

    def _in_memory(self, key: str) -> Tensor | None:
        return (self._header.tensors_in_memory or {}).get(self._prefix + key)


def apply_rule(rule: convert.Rule, sources: tuple[Tensor, ...], index: int) -> Tensor:
    """Output `index` of a rule."""
    for kind, make in _OPS.items():
        if isinstance(rule, kind):
            return make(rule, sources, index)
    raise AssertionError(f"no op for {type(rule).__name__}")


def _dequantize(rule: convert.Dequantize, sources: tuple[Tensor, ...], index: int) -> Tensor:
    weight, scale = sources[0].float(), sources[1].float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    # One scale a row, or one a block of equal size.
    scale = scale.reshape(scale.shape + (1,) * (weight.dim() - scale.dim()))
    for axis, (extent, blocks) in enumerate(zip(weight.shape, scale.shape, strict=True)):
        if blocks not in (1, extent):
            scale = scale.repeat_interleave(extent // blocks, dim=axis)
    return weight * scale


def _split(rule: convert.Split, sources: tuple[Tensor, ...], index: int) -> Tensor:
    return sources[0].split(rule.part_sizes(tuple(sources[0].shape)), dim=rule.dim)[index].contiguous()


def _reorder(rule: convert.ReorderChunks, sources: tuple[Tensor, ...], index: int) -> Tensor:
    chunks = sources[0].chunk(len(rule.order), dim=rule.dim)
    return torch.cat([chunks[chunk] for chunk in rule.order], dim=rule.dim)


_OPS: Mapping[type, Callable[[Any, tuple[Tensor, ...], int], Tensor]] = {
    convert.Rename: lambda rule, sources, index: sources[0],
    convert.Tie: lambda rule, sources, index: sources[0],
    convert.Split: _split,
    convert.Fuse: lambda rule, sources, index: torch.cat(sources, dim=rule.dim),
    convert.Reshape: lambda rule, sources, index: sources[0].reshape(rule.shapes(tuple(sources[0].shape))[0]),
    convert.Permute: lambda rule, sources, index: sources[0].permute(rule.order).contiguous(),
    convert.ReorderChunks: _reorder,
    convert.Dequantize: _dequantize,
    convert.Constant: lambda rule, sources, index: torch.full(rule.shape, rule.value),
    convert.Apply: lambda rule, sources, index: rule.function(*sources),
}


def _make(target: convert.Target, reader: TensorReader, *, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    rule = target.rule
    if isinstance(rule, convert.Split) and rule.dim == 0:
        # Rows are contiguous in the file: read this part alone, not the whole once for each part.
        (source,) = target.sources
        sizes = rule.part_sizes(reader.shape(source))
        first = sum(sizes[: target.index])
        made = reader(source, slice(first, first + sizes[target.index]))
    else:
        made = apply_rule(rule, tuple(reader(key) for key in target.sources), target.index)
    assert tuple(made.shape) == target.shape, f"{rule} made {tuple(made.shape)}, planned {target.shape}"
    return made.to(device, dtype).contiguous()


def _dtype(
    key: str, target: convert.Target, reader: TensorReader, *, architecture: ArchitectureSpec, dtype: torch.dtype
) -> torch.dtype:
    """Of the finished target."""
    if not target.sources:
        return dtype
    stored = reader.dtype(target.sources[0])
    if not stored.is_floating_point and not isinstance(target.rule, convert.Dequantize | convert.Apply):
        return stored
    keeps = any(fnmatch.fnmatchcase(key, pattern) for pattern in architecture.high_precision)
    return stored if keeps and dtype.itemsize < 2 <= stored.itemsize else dtype


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    if info.dtype not in _DTYPES:
        raise CorruptFile(f"{info.file}: dtype {info.dtype!r} is not known; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[info.dtype]


_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def _warn_unused(unused: Sequence[str], recognized: Recognized, where: str) -> None:
    outside = [key for key in recognized.extra if not key.startswith(recognized.prefix)]
    if unused or outside:
        every = [*unused, *outside]
        more = ", ..." if len(every) > 8 else ""
        are = "key is" if len(every) == 1 else "keys are"
        logger.warning("%s: %d %s not used: %s%s", where, len(every), are, ", ".join(every[:8]), more)


def _check_memory(
    targets: Mapping[str, convert.Target],
    dtypes: Mapping[str, torch.dtype],
    reader: TensorReader,
    *,
    device: torch.device | str,
    where: str,
) -> None:
    sizes = {key: prod(target.shape) * dtypes[key].itemsize for key, target in targets.items()}
    needed = {torch.device(device).type: sum(sizes.values())}
    # Sources are read, and rules applied, in host memory.
    work = max((sum(map(reader.size, target.sources)) for target in targets.values()), default=0)
    needed["cpu"] = needed.get("cpu", 0) + work
    for kind, size in needed.items():
        free = devices.available_memory(device if kind != "cpu" else "cpu")
        if free is not None and size > free:
            raise NotEnoughMemory(
                f"{where} needs {size / 2**30:.1f} GiB on {device if kind != 'cpu' else 'cpu'}, "
                f"which has {free / 2**30:.1f} GiB free. "
                f"Nothing was read. Free memory, use a smaller dtype, or pass vram_limit."
            )
