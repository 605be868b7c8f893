"""Memory management by the names and arguments of older code: module maps, the eight keys, wrapper classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from diffsynth.core import device as devices
from diffsynth.core.loader.config import VRAM_KEYS
from diffsynth.core.planning import spread
from diffsynth.core.planning.workload import GIB, check_limit
from diffsynth.core.vram.disk_map import DiskMap
from diffsynth.core.vram.managed import DEFAULT_SLOTS, ManagedModule, wrap
from diffsynth.core.vram.policy import Policy
from diffsynth.errors import NotEnoughMemory, did_you_mean
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

ModuleMap = Mapping[type[nn.Module], type["AutoTorchModule"]]


class AutoTorchModule:
    """A value of `module_map`: how layers of a class are cut. Such classes have no instances and no code."""

    def __new__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Always raise TypeError: the class has no instances.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"{cls.__name__} wraps nothing by itself: it is a value for module_map. A module is put under a policy "
            "with diffsynth.core.vram.wrap, and keeps its class"
        )


class AutoWrappedModule(AutoTorchModule):
    """The layer is a block, and is streamed as a whole."""


class AutoWrappedLinear(AutoWrappedModule):
    """The same as `AutoWrappedModule`: linear layers need no wrapper of their own."""


class AutoWrappedNonRecurseModule(AutoTorchModule):
    """The layers inside it are cut; its own parameters stay on the device for the stage."""


def enable_vram_management(
    model: nn.Module,
    module_map: ModuleMap | None,
    vram_config: Mapping[str, Any],
    vram_limit: float | None = None,
    disk_map: DiskMap | None = None,
    quantize: Any = None,
) -> nn.Module:
    """Freeze `model` and put it under the placement policy of the eight keys in `vram_config`, in place, and return the
    same model.

    Args:
        model: the model, which is frozen here; it keeps its class and its results. With a `disk_map` it may be on meta.
        module_map: layer class -> `AutoWrappedModule`, `AutoWrappedLinear` or `AutoWrappedNonRecurseModule`; the first
            that fits a layer counts. With the model's own class in it, the model is moved as a whole. None or an empty
            map cuts it at its repeated blocks, which moves the same bytes in fewer copies.
        vram_config: `offload_device`, `offload_dtype` and so on; see `Policy.from_keys`. Computation is on the first
            accelerator where it is left out.
        vram_limit: GiB that this model's weights may take on the device; 0 keeps none
            between calls of their blocks, None keeps all.
        disk_map: reads the weights from their file.
        quantize: not supported in this version.

    Returns:
        The model, with `vram_management_enabled` True. `diffsynth.core.vram.managed(model)` has its
        transfer report, and `unwrap()`.

    Raises:
        ValueError: a key of the policy is missing, or it needs a file and there is none; see `wrap`.
        TypeError: the module map has other keys or values.
        NotEnoughMemory: the limit is less than the model needs with one layer at a time.
        KeyMismatch: the weights do not fit the model.
    """
    _check(module_map or {}, vram_config, vram_limit, quantize)
    if _is_whole(_entry(model, module_map or {})):
        return _enable(model, {"atomic": (type(model),)}, fill_vram_config(model, vram_config), vram_limit, disk_map)
    return enable_vram_management_recursively(model, module_map, vram_config, vram_limit, disk_map=disk_map)


def enable_vram_management_recursively(
    model: nn.Module,
    module_map: ModuleMap | None,
    vram_config: Mapping[str, Any],
    vram_limit: float | None = None,
    name_prefix: str = "",
    disk_map: DiskMap | None = None,
    quantize: Any = None,
) -> nn.Module:
    """Freeze `model` and put it under the placement policy of the keys in `vram_config`, in place, and return the same
    model; an entry of `module_map` for the model's own class is ignored.

    Everything else is as in `enable_vram_management`.

    Args:
        name_prefix: prefix of the model's parameters in the `disk_map`, without a dot at its end.
    """
    _check(module_map or {}, vram_config, vram_limit, quantize)
    prefix = f"{name_prefix}." if name_prefix else ""
    return _enable(model, _cuts(model, module_map or {}), vram_config, vram_limit, disk_map, prefix)


def fill_vram_config(model: nn.Module, vram_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `vram_config` whose `onload` and `preparing` keys have the values of `computation`, so that the
    model moves as a whole.

    Raises:
        ValueError: an unknown key, or no computation.
    """
    _check_keys(vram_config)
    parts = {part: vram_config.get(f"computation_{part}") for part in ("device", "dtype")}
    if missing := [f"computation_{part}" for part, value in parts.items() if value is None]:
        raise ValueError(f"vram_config has no {' and no '.join(missing)}")
    filled = dict(vram_config) | {
        f"{state}_{part}": value for state in ("onload", "preparing") for part, value in parts.items()
    }
    if any(name in vram_config and vram_config[name] != value for name, value in filled.items()):
        logger.info("%s is moved as a whole: onload and preparing are as computation", type(model).__name__)
    return filled


def _enable(
    model: nn.Module,
    cuts: Mapping[str, Any],
    vram_config: Mapping[str, Any],
    vram_limit: float | None,
    disk_map: DiskMap | None,
    prefix: str = "",
) -> nn.Module:
    policy = Policy.from_keys(vram_config, device=devices.default_device(), dtype=None)
    if policy is None:
        raise ValueError("vram_config is empty; expected offload_device, offload_dtype and so on")
    source = disk_map.source_of(model, prefix) if disk_map is not None else None
    managed = wrap(model.requires_grad_(False), policy, source=source, **cuts)
    try:
        if vram_limit is not None:
            _keep_within(managed, vram_limit)
    except NotEnoughMemory:
        managed.unwrap()
        raise
    return model


def _keep_within(managed: ManagedModule, vram_limit: float) -> None:
    """Set as many blocks of `managed` resident as fit into `vram_limit` GiB, spread evenly, none for 0; raise
    NotEnoughMemory if the limit is too small for one block at a time.

    The limit has no effect where weights are used in place.
    """
    managed.configure(resident=(), slots=1)
    if managed.blocks and not managed.streamed:
        logger.warning("vram_limit=%s has no effect: the weights are used where they are stored", vram_limit)
        return
    if vram_limit == 0:
        return
    footprint = managed.footprint()
    room, names = int(vram_limit * GIB), managed.blocks
    for count in range(len(names), -1, -1):
        resident = frozenset(names[index] for index in spread(count, len(names)))
        if footprint.on_device(resident, slots=DEFAULT_SLOTS) <= room:
            managed.configure(resident=resident, slots=DEFAULT_SLOTS)
            return
    least = footprint.on_device(frozenset(), slots=1)
    if least > room:
        raise NotEnoughMemory(
            f"vram_limit={vram_limit} GiB is too small for the weights of {type(managed.module).__name__}: with one "
            f"layer at a time they take {least / GIB:.3f} GiB"
        )


def _entry(module: nn.Module, module_map: ModuleMap) -> type[AutoTorchModule] | None:
    """Return the wrapper class in `module_map` for the first class there that `module` is an instance of; None if there
    is none.
    """
    return next((how for layer, how in module_map.items() if isinstance(module, layer)), None)


def _is_whole(how: type[AutoTorchModule] | None) -> bool:
    return how is not None and issubclass(how, AutoWrappedModule)


def _check(
    module_map: ModuleMap, vram_config: Mapping[str, Any], vram_limit: float | None, quantize: Any = None
) -> None:
    if quantize is not None:
        raise NotImplementedError(f"quantize={quantize!r}: quantization is not supported in this version")
    check_limit("vram_limit", vram_limit)
    _check_keys(vram_config)
    known = (AutoWrappedModule, AutoWrappedLinear, AutoWrappedNonRecurseModule)
    for layer, how in module_map.items():
        if not (isinstance(layer, type) and issubclass(layer, nn.Module)) or how not in known:
            raise TypeError(
                f"module_map[{layer!r}] is {how!r}; expected a module class and one of "
                f"{', '.join(each.__name__ for each in known)}. Code of a wrapper would never run: use forward hooks"
            )


def _check_keys(vram_config: Mapping[str, Any]) -> None:
    for name in vram_config:
        if name not in VRAM_KEYS:
            near = did_you_mean(name, VRAM_KEYS) or "."
            raise ValueError(f"vram_config has {name!r}{near} Expected {', '.join(VRAM_KEYS)}")


def _cuts(model: nn.Module, module_map: ModuleMap) -> dict[str, Any]:
    """Return keyword arguments of `wrap` for `module_map`, a dict with the one key `whole`: a tuple of the classes of
    the model that are blocks.

    Raises:
        ValueError: the model has no such layers.
    """
    inside = [(type(part), _entry(part, module_map)) for part in model.modules() if part is not model]
    if module_map and all(how is None for _, how in inside):
        raise ValueError(
            f"{type(model).__name__} has none of the layers in module_map: "
            f"{', '.join(layer.__name__ for layer in module_map)}. Leave it out to cut the model at its repeated blocks"
        )
    return {"whole": tuple(dict.fromkeys(kind for kind, how in inside if _is_whole(how)))}
