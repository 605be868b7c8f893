"""From a recognised header to a module with weights: build on meta, plan, check, then read one target at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.core import device as devices
from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header, strip_prefix
from diffsynth.core.loader.recognize import Recognized
from diffsynth.errors import NotEnoughMemory
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

    Peak memory is the module plus one target and its sources.

    Raises:
        KeyMismatch: keys or shapes do not fit; nothing was read.
        NotEnoughMemory: it would not fit; nothing was read.
    """
    module = build(recognized.architecture, recognized.config)
    shapes = strip_prefix(header.shapes, recognized.prefix) if recognized.prefix else header.shapes
    plan = convert.plan(recognized.rules, shapes)
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    where = ", ".join(map(str, header.files)) or "the given state_dict"
    unused = convert.check(plan, wanted, where=where, unused="report" if recognized.tier == "structure" else "raise")
    if unused:
        logger.warning("%s: %d keys are not used: %s", where, len(unused), ", ".join(unused[:8]))
    _check_memory(wanted, device, dtype, where)
    with TensorReader(header) as reader:
        state = {key: _make(plan.targets[key], reader, recognized.prefix, device=device, dtype=dtype) for key in wanted}
    module.load_state_dict(state, strict=True, assign=True)
    for part in module.modules():
        if hasattr(part, "reset_buffers"):
            part.reset_buffers()
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"{type(module).__name__} leaves {left} on meta; give it a reset_buffers()"
    return module.to(device).eval().requires_grad_(False)


class TensorReader:
    """Single tensors of a header, from files that stay mapped while the reader is open."""

    def __init__(self, header: Header) -> None:
        self._header = header
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.clear()

    def __call__(self, key: str) -> Tensor:
        """One tensor, as stored."""
        if self._header.tensors_in_memory is not None and key in self._header.tensors_in_memory:
            return self._header.tensors_in_memory[key]
        file = self._header.tensors[key].file
        assert file is not None
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(key)


def apply_rule(rule: convert.Rule, sources: tuple[Tensor, ...], index: int) -> Tensor:
    """Output `index` of a rule."""
    for kind, make in _OPS.items():
        if isinstance(rule, kind):
            return make(rule, sources, index)
    raise AssertionError(f"no op for {type(rule).__name__}")


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
    convert.Reshape: lambda rule, sources, index: sources[0].reshape(rule.shape),
    convert.Permute: lambda rule, sources, index: sources[0].permute(rule.order).contiguous(),
    convert.ReorderChunks: _reorder,
    convert.Dequantize: lambda rule, sources, index: sources[0].float() * sources[1].float(),
    convert.Constant: lambda rule, sources, index: torch.full(rule.shape, rule.value),
    convert.Apply: lambda rule, sources, index: rule.function(*sources),
}


def _make(
    target: convert.Target, reader: TensorReader, prefix: str, *, device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    made = apply_rule(target.rule, tuple(reader(prefix + key) for key in target.sources), target.index)
    made = made.to(device, dtype if made.is_floating_point() else made.dtype)
    # A tensor that is still the file's mapping would be changed by whoever changes the file.
    return made.clone() if made.device.type == "cpu" and isinstance(target.rule, convert.Rename) else made


def _check_memory(wanted: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype, where: str) -> None:
    free = devices.available_memory(device)
    needed = sum(torch.Size(shape).numel() for shape in wanted.values()) * dtype.itemsize
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"{where} needs {needed / 2**30:.1f} GiB in {dtype} on {device}, which has {free / 2**30:.1f} GiB free. "
            f"Nothing was read. Free memory, use a smaller dtype, or pass vram_limit."
        )
