"""Quantizing the layers of a module: in place, or while their weights are read from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.core.quant.config import Quantize, assignments
from diffsynth.core.quant.linear import QuantizedLinear
from diffsynth.core.quant.method import QuantMethod
from diffsynth.core.quant.methods import method_of
from diffsynth.core.quant.source import QuantizedSource
from diffsynth.core.vram.managed import managed
from diffsynth.errors import shortened

_ATTRIBUTE = "_diffsynth_quantization"


def quantize_module(
    module: nn.Module, config: Quantize, *, high_precision: Sequence[str] = (), atomic: tuple[type, ...] = ()
) -> list[str]:
    """Quantize linear layers of a frozen module in place, one by one, and return a list of their names.

    Nothing is changed if an error is raised.

    Args:
        module: with its weights; not wrapped by the VRAM engine.
        config: the methods and the layers.
        high_precision: name patterns of parameters that keep their precision where no layers are named.
        atomic: classes of modules that read the weights of their layers without calling the layers, which are left.

    Raises:
        ValueError: a module that is wrapped or trained, a layer that is quantized already or shares its weight, names
            of no layers, an unknown method or option, or a method that has no form for a layer.
        Unavailable: the library of a method is not installed, or the method cannot compute on the module's device.
    """
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    chosen = _chosen(module, config, device, high_precision=high_precision, atomic=atomic)
    for name, (method, layer) in chosen.items():
        made = QuantizedLinear.of(layer, method)
        _replace(module, name, made if config.mode == "dynamic" else made.dequantized(layer.weight.dtype))
    _note(module, chosen)
    return list(chosen)


def dequantize_module(module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Replace the quantized layers of a module by ordinary ones of the weights that they stand for, in place; return a
    list of their names.

    Args:
        module: not wrapped by the VRAM engine.
        dtype: of the weights.

    Raises:
        ValueError: the module is wrapped.
    """
    _refuse_wrapped(module)
    found = list(quantized_layers(module))
    for name, layer in found:
        _replace(module, name, layer.dequantized(dtype))
    return [name for name, _ in found]


def quantization_of(component: Any) -> dict[str, int]:
    """Return a dict method -> number of the layers of a component whose weights it stored, also where they were
    dequantized since; empty for a component that was not quantized.
    """
    return dict(getattr(component, _ATTRIBUTE, {}))


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield (name, layer) of each quantized layer of a module."""
    for name, part in module.named_modules():
        if isinstance(part, QuantizedLinear):
            yield name, part


def quantized_source(
    module: nn.Module,
    source: WeightSource,
    config: Quantize,
    *,
    device: torch.device,
    high_precision: Sequence[str] = (),
    atomic: tuple[type, ...] = (),
) -> QuantizedSource:
    """Replace linear layers of a module on meta by quantized ones, in place, and return the source of its weights,
    which quantizes them as they are read.

    Args:
        module: on meta, before its weights are read.
        source: of its weights.
        device: that will compute with them.
        config, high_precision, atomic: see `quantize_module`.

    Raises:
        ValueError, Unavailable: see `quantize_module`.
    """
    chosen = _chosen(module, config, device, high_precision=high_precision, atomic=atomic)
    rounds_only = config.mode == "dequant_once"
    for name, (method, layer) in chosen.items() if not rounds_only else ():
        _replace(module, name, QuantizedLinear.shell(layer, method))
    _note(module, chosen)
    return QuantizedSource(source, {name: method for name, (method, _) in chosen.items()}, rounds_only=rounds_only)


def _chosen(
    module: nn.Module,
    config: Quantize,
    device: torch.device,
    *,
    high_precision: Sequence[str],
    atomic: tuple[type, ...],
) -> dict[str, tuple[QuantMethod, nn.Linear]]:
    """Return a dict name -> (method, layer) of the layers to quantize, all checked."""
    _refuse_wrapped(module)
    if trained := [name for name, each in module.named_parameters() if each.requires_grad and not each.is_meta]:
        raise ValueError(
            f"{type(module).__name__} is trained: {shortened(trained, 3)} require gradients. Quantized weights are "
            "frozen: module.requires_grad_(False), and train a LoRA"
        )
    if already := [name for name, _ in quantized_layers(module)]:
        raise ValueError(f"{type(module).__name__} is quantized already: {shortened(already, 3)}")
    layers = dict(linear_layers(module, atomic=atomic))
    found = {}
    methods: dict[int, QuantMethod] = {}
    for name, each in assignments(config, tuple(layers), high_precision=high_precision).items():
        method = methods.setdefault(id(each), method_of(each.method, each.backend_config_kwargs))
        layer = layers[name]
        if each.mode == "dynamic" and (reason := method.refuses(device)):
            raise ValueError(f"method {each.method!r} is refused: {reason}")
        try:
            method.parts(layer.out_features, layer.in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. Add it to exclude_modules") from error
        found[name] = (method, layer)
    _refuse_tied(module, found)
    return found


def linear_layers(module: nn.Module, *, atomic: tuple[type, ...] = ()) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (name, layer) of each linear layer of a module whose forward is called, so that another layer can take its
    place.

    Args:
        module: any.
        atomic: classes of modules that read the weights of their layers without calling the layers.
    """
    inside: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, (nn.MultiheadAttention, *atomic)):
            inside.append(f"{name}." if name else "")
        elif type(part) is nn.Linear and name and not any(name.startswith(prefix) for prefix in inside):
            yield name, part


def _note(module: nn.Module, chosen: Mapping[str, tuple[QuantMethod, nn.Linear]]) -> None:
    vars(module)[_ATTRIBUTE] = Counter(method.name for method, _ in chosen.values())


def _refuse_wrapped(module: nn.Module) -> None:
    if managed(module) is not None:
        raise ValueError(
            f"{type(module).__name__} is wrapped by the VRAM engine; quantize it before, with diffsynth.load(quantize=)"
        )


def _refuse_tied(module: nn.Module, chosen: Mapping[str, Any]) -> None:
    """Raise ValueError if a chosen layer shares its weight with another module: one of them would keep the weight."""
    users: dict[int, list[str]] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if (weight := part._parameters.get("weight")) is not None:
            users.setdefault(id(weight), []).append(name)
    for name, (_, layer) in chosen.items():
        if len(shared := users[id(layer.weight)]) > 1:
            raise ValueError(
                f"{name} shares its weight with {', '.join(other for other in shared if other != name)}; add it to "
                "exclude_modules"
            )


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)
