"""Loading one component from its file: build the module on meta, plan, check, then read the weights."""

from __future__ import annotations

import fnmatch
import threading
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn import init
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from diffsynth.core import device as devices
from diffsynth.core import finite, progress
from diffsynth.core.loader import convert
from diffsynth.core.loader.header import Header
from diffsynth.core.loader.reader.ops import apply_rule, dequantize
from diffsynth.core.loader.reader.source import ComponentSource, WeightSource, stored_dtype
from diffsynth.core.loader.recognize import Recognized
from diffsynth.core.loader.scaled import Scaled, has_scale_marker
from diffsynth.errors import CorruptFile, KeyMismatch, NotEnoughMemory, shortened
from diffsynth.spec import ArchitectureSpec, resolve
from diffsynth.terminal import module_logger

__all__ = [
    "apply_rule",
    "build",
    "check_finite",
    "dequantize",
    "fill_buffers",
    "load_component",
    "materialize",
    "open_component",
]

logger = module_logger(__name__)

_COMPUTED = (convert.Dequantize, convert.Apply, Scaled)
"""Rules whose result is floating, whatever their sources are."""


def build(architecture: ArchitectureSpec, config: Any, *, most: int | None = None) -> nn.Module:
    """Return a new `nn.Module` of an architecture and config, on the meta device: its weights have no memory.

    Args:
        architecture: the architecture.
        config: an instance of its config.
        most: number of parameters above which building ends, so that a config from a damaged file does not take all
            memory; None for no limit.

    Raises:
        KeyMismatch: no network can be built from the config, or it would have more parameters than `most`.
    """
    make = resolve(architecture.module)
    try:
        with nullcontext() if most is None else _at_most(most), torch.device("meta"), _WithoutInitialWeights():
            module: nn.Module = make(config)
    except Exception as error:  # a config of impossible sizes ends anywhere in torch
        raise KeyMismatch(
            f"no {architecture.name} can be built from its config: {type(error).__name__}: {error}. The config is "
            f"{config!s:.500}"
        ) from error
    return module


class _WithoutInitialWeights(TorchFunctionMode):
    """Context manager in which the functions of `torch.nn.init` return their tensor as it is.

    On meta there are no weights to draw, and torch imports its compiler for the first that are drawn there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == init.__name__:
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Context manager in which building a module of more than `most` parameters raises KeyMismatch."""
    thread, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise KeyMismatch(f"the network would have more than {most} parameters")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def open_component(recognized: Recognized, header: Header, *, dtype: torch.dtype) -> tuple[nn.Module, ComponentSource]:
    """Return a tuple: a component (module of a pipeline) as an `nn.Module` on meta, and the `ComponentSource` of its
    weights.

    Args:
        recognized: the component in the file.
        header: the file's header.
        dtype: dtype of the floating tensors. If it has less than 16 bits, parameters that match the architecture's
            `high_precision` patterns keep the file's dtype.

    Raises:
        NotRunnable: no installed package has the network.
        KeyMismatch: keys or shapes do not fit the module.
        CorruptFile: the file has a dtype that torch does not have.
        TypeError: a `dtype` that is no floating-point dtype.
    """
    devices.check_floating(dtype, "dtype", stored=True)
    architecture, prefix = recognized.architecture, recognized.prefix
    keys = recognized.keys or tuple(key for key in header.tensors if key.startswith(prefix))
    # Fused keys become a few parameters each, so a network that the file fits stays far below this.
    where = ", ".join(map(str, header.files)) or "the given state_dict"
    recognized.require_runnable(where)
    try:
        module = build(architecture, recognized.config, most=16 * len(keys) + 1000)
        plan = convert.plan(recognized.rules, {key.removeprefix(prefix): header.tensors[key].shape for key in keys})
    except KeyMismatch as error:
        raise KeyMismatch(f"{where} does not fit: {error}") from error
    weights = module.state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    unused = convert.check(plan, wanted, where=where, unused="report" if recognized.tier == "structure" else "raise")
    _warn_unused([prefix + source for key in unused for source in plan.targets[key].sources], recognized, where)
    targets = {key: plan.targets[key] for key in wanted}
    floating = {key for key, tensor in weights.items() if tensor.is_floating_point()}
    _check_numbers(targets, floating, header, prefix=prefix, where=where)
    dtypes = {
        key: _dtype(key, target, header, prefix=prefix, architecture=architecture, dtype=dtype)
        for key, target in targets.items()
    }
    return module, ComponentSource(header, targets, dtypes, prefix=prefix, where=where)


def load_component(
    recognized: Recognized, header: Header, *, device: torch.device | str, dtype: torch.dtype, copy: bool = True
) -> nn.Module:
    """Return a component as an `nn.Module` with its weights on `device`, in eval mode and frozen; on "meta" nothing is
    read.

    Peak host memory is that of the module on the CPU, or of a ring of upload buffers for an accelerator; and in both
    cases that of the source tensors that are being converted, a few at a time.

    Args:
        recognized: the component in the file.
        header: the file's header.
        device: the device of the weights; on "meta" nothing is read.
        dtype: as for `open_component`.
        copy: as for `ComponentSource.read`.

    Raises:
        KeyMismatch: keys or shapes do not fit the module; nothing was read.
        NotEnoughMemory: the weights do not fit into the free memory; nothing was read.
        CorruptFile: a file changed since its header was read, or cannot be read; or a weight holds NaN or infinity.
    """
    module, source = open_component(recognized, header, dtype=dtype)
    with progress.task("load", total=source.size(), unit="bytes", description=source.where):
        return materialize(module, source, device=device, copy=copy)


def materialize(module: nn.Module, source: WeightSource, *, device: torch.device | str, copy: bool = True) -> nn.Module:
    """Read the weights of `source` onto `device` into `module` (nothing for "meta"), and return `module`, in eval mode
    and frozen.

    `device`, `copy` and errors: see `load_component`.
    """
    on_meta = torch.device(device).type == "meta"
    if not on_meta:
        _check_memory(source, device=device, copy=copy)
    module.load_state_dict(source.read(device=device, copy=copy), strict=True, assign=True)
    if not on_meta:
        check_finite(dict(module.named_parameters()), source.where)
        fill_buffers(module)
        module.to(device)
    return module.eval().requires_grad_(False)


def check_finite(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise CorruptFile if weights hold NaN or infinity, from which no image could be made.

    Large weights in host memory are sampled, see `finite.nonfinite`; what that misses is found after the first step.

    Args:
        weights: name -> weight.
        where: the file's name, for the message.

    Raises:
        CorruptFile: a weight holds NaN or infinity.
    """
    if wrong := finite.nonfinite(weights):
        hold = "weight holds" if len(wrong) == 1 else "weights hold"
        raise CorruptFile(
            f"{where}: {len(wrong)} {hold} NaN or infinity: {shortened(wrong, 3)}. The training that wrote the file "
            f"diverged, or a conversion to a smaller dtype overflowed: use an earlier checkpoint, or fetch it again."
        )


def fill_buffers(module: nn.Module) -> None:
    """Fill the buffers of `module` that no file holds, by each submodule's `reset_buffers()`; raise KeyMismatch if one
    is left.

    Raises:
        KeyMismatch: a buffer is still on meta.
    """
    for submodule in module.modules():
        if hasattr(submodule, "reset_buffers"):
            submodule.reset_buffers()
    in_files = module.state_dict().keys()
    left = [name for name, tensor in module.named_buffers() if tensor.is_meta and name not in in_files]
    if left:
        raise KeyMismatch(
            f"{type(module).__name__} has buffers that no file holds: {shortened(left)}. "
            f"Give it a reset_buffers() that fills them."
        )


def _dtype(
    key: str,
    target: convert.Target,
    header: Header,
    *,
    prefix: str,
    architecture: ArchitectureSpec,
    dtype: torch.dtype,
) -> torch.dtype:
    """Return the `torch.dtype` to read a parameter in: the file's for unscaled integers and, if `dtype` has less than
    16 bits, for `high_precision` ones of 16 or more; else `dtype`.

    The file's dtype is kept for numbers that are not floating and need no conversion, and for parameters of high
    precision if `dtype` has less than 16 bits.
    """
    if not target.sources:
        return dtype
    stored = stored_dtype(header, prefix + target.sources[0])
    if not stored.is_floating_point and not isinstance(target.rule, _COMPUTED):
        return stored
    high_precision = any(fnmatch.fnmatchcase(key, pattern) for pattern in architecture.high_precision)
    return stored if high_precision and dtype.itemsize < 2 <= stored.itemsize else dtype


def _check_numbers(
    targets: Mapping[str, convert.Target], floating: Container[str], header: Header, *, prefix: str, where: str
) -> None:
    """Raise KeyMismatch if numbers of the file that are not floating would be read as parameters that are, or fp8
    weights without the scales that they need.
    """
    wrong = [
        f"{prefix}{target.sources[0]} is {str(stored).removeprefix('torch.')}"
        for key, target in targets.items()
        if key in floating and target.sources and not isinstance(target.rule, _COMPUTED)
        if not (stored := stored_dtype(header, prefix + target.sources[0])).is_floating_point
    ]
    if wrong:
        raise KeyMismatch(
            f"{where} is quantised in a way that is not read: {shortened(wrong, 3)}, without a scale or a note that "
            f"says what it means. Use a file in bf16, or in fp8 with scales."
        )
    if bare := _without_scale(targets, header, prefix):
        raise KeyMismatch(
            f"{where} is in fp8 with scales, and {len(bare)} of its weights have none: {shortened(bare, 3)}. Use the "
            f"file as it was published, one in bf16, or one in fp8 without scales."
        )


def _without_scale(targets: Mapping[str, convert.Target], header: Header, prefix: str) -> list[str]:
    """Return a list of the keys of fp8 matrices without a scale, in a file whose other weights have scales or that is
    marked as one with scales; a file of fp8 weights alone is a plain cast, and the list is empty.
    """
    scaled = [target for target in targets.values() if isinstance(target.rule, convert.Dequantize | Scaled)]
    if not scaled and not has_scale_marker(key for key in header.tensors if key.startswith(prefix)):
        return []
    bare: dict[str, None] = {}
    for target in targets.values():
        if isinstance(target.rule, convert.Dequantize):
            continue
        scales = target.rule.scales if isinstance(target.rule, Scaled) else ("",) * len(target.sources)
        for source, scale in zip(target.sources, scales, strict=False):
            key = prefix + source
            if not scale and len(header.tensors[key].shape) == 2:
                stored = stored_dtype(header, key)
                bare |= {key: None} if stored.is_floating_point and stored.itemsize == 1 else {}
    return list(bare)


def _warn_unused(unused: Sequence[str], recognized: Recognized, where: str) -> None:
    outside = [key for key in recognized.extra if not key.startswith(recognized.prefix)]
    if unused or outside:
        every = [*unused, *outside]
        are = "key is" if len(every) == 1 else "keys are"
        logger.warning("%s: %d %s not used: %s", where, len(every), are, shortened(every))


def _check_memory(source: WeightSource, *, device: torch.device | str, copy: bool) -> None:
    needed = {"cpu": source.host_memory(device, copy=copy)}
    if torch.device(device).type != "cpu":
        needed[str(device)] = source.size()
    for memory, size in needed.items():
        free = devices.available_memory(memory)
        if free is not None and size > free:
            raise NotEnoughMemory(
                f"{source.where} needs {size / 2**30:.1f} GiB on {memory}, which has {free / 2**30:.1f} GiB free. "
                f"Nothing was read. Free memory, use a smaller dtype, or pass vram_limit."
            )
