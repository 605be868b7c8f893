"""The choice of what is quantized: a method, and the layers that it is used for."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffsynth.errors import did_you_mean, shortened, shown

MODES = ("dynamic", "dequant_once")


@dataclass(frozen=True)
class QuantizeConfig:
    """A quantization method, and the linear layers of a component whose weights it stores.

    A name in `target_modules` or `exclude_modules` is that of a layer, the end of such names after a dot ("to_q" for
    "blocks.0.attn.to_q"), or a glob over whole names ("blocks.*.attn.*").

    Args:
        method: name of the method, see `diffsynth.core.quant.methods`.
        mode: "dynamic" stores the parts and dequantizes a weight whenever its layer runs; "dequant_once" rounds the
            weights, and stores them in the component's dtype.
        target_modules: names of layers; None is all linear layers but those that the architecture declares to be of
            high precision.
        exclude_modules: names of layers that are left out.
        backend_config_kwargs: options of the method.

    Raises:
        ValueError: an unknown mode.
        TypeError: a field of another type.
    """

    method: str
    mode: Literal["dynamic", "dequant_once"] = "dynamic"
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] = ()
    backend_config_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise TypeError(f"method={shown(self.method)}: expected the name of a method, such as 'fp8_row'")
        if self.mode not in MODES:
            raise ValueError(
                f"mode={shown(self.mode)}: expected {' or '.join(MODES)}{did_you_mean(str(self.mode), MODES)}"
            )
        for name in ("target_modules", "exclude_modules"):
            names = getattr(self, name)
            if names is None and name == "target_modules":
                continue
            if not isinstance(names, list | tuple) or not all(isinstance(each, str) and each for each in names):
                raise TypeError(f"{name}={shown(names)}: expected a list of names of layers")
            object.__setattr__(self, name, tuple(names))
        if not isinstance(self.backend_config_kwargs, Mapping):
            raise TypeError(
                f"backend_config_kwargs={shown(self.backend_config_kwargs)}: expected a dict option -> value"
            )

    def layers(self, names: Collection[str], *, high_precision: Sequence[str] = ()) -> list[str]:
        """Return a list of the names of the layers to quantize, in the order of `names`.

        Args:
            names: of all linear layers of the component.
            high_precision: name patterns of parameters that keep their precision where no layers are named.

        Raises:
            ValueError: a name in `target_modules` or `exclude_modules` is that of no layer, or no layer is left.
        """
        for field_name in ("target_modules", "exclude_modules"):
            for pattern in getattr(self, field_name) or ():
                if not any(_matches(name, pattern) for name in names):
                    near = did_you_mean(pattern, [*names, *{name.rpartition(".")[2] for name in names}])
                    raise ValueError(
                        f"{field_name} has {pattern!r}, the name of no linear layer{near or '.'} "
                        f"There are {len(names)}: {shortened(names, 4)}"
                    )
        chosen = [
            name
            for name in names
            if not any(_matches(name, pattern) for pattern in self.exclude_modules)
            and (
                any(_matches(name, pattern) for pattern in self.target_modules)
                if self.target_modules is not None
                else not any(fnmatch.fnmatchcase(f"{name}.weight", pattern) for pattern in high_precision)
            )
        ]
        if not chosen:
            raise ValueError(f"QuantizeConfig(method={self.method!r}) leaves no linear layer to quantize")
        return chosen


@dataclass(frozen=True)
class MixedQuantizeConfig:
    """Several methods for different layers of one component.

    Args:
        configs: one or more, for different layers; all of one mode.

    Raises:
        ValueError: no config, or configs of two modes.
        TypeError: an item that is no `QuantizeConfig`.
    """

    configs: Sequence[QuantizeConfig]

    def __post_init__(self) -> None:
        if not isinstance(self.configs, list | tuple) or not self.configs:
            raise ValueError(f"configs={shown(self.configs)}: expected a list of QuantizeConfigs")
        for each in self.configs:
            if not isinstance(each, QuantizeConfig):
                raise TypeError(f"configs has {shown(each)}; expected a QuantizeConfig")
        if len(modes := {each.mode for each in self.configs}) > 1:
            raise ValueError(f"configs have the modes {' and '.join(sorted(modes))}; expected one for all")
        object.__setattr__(self, "configs", tuple(self.configs))

    @property
    def mode(self) -> str:
        """The mode of all configs."""
        return self.configs[0].mode


Quantize = QuantizeConfig | MixedQuantizeConfig


def assignments(
    config: Quantize, names: Collection[str], *, high_precision: Sequence[str] = ()
) -> dict[str, QuantizeConfig]:
    """Return a dict layer -> the config whose method stores its weight.

    Args:
        config: the choice of layers.
        names: of all linear layers of the component.
        high_precision: see `QuantizeConfig.layers`.

    Raises:
        ValueError: see `QuantizeConfig.layers`; or two configs name one layer.
    """
    found: dict[str, QuantizeConfig] = {}
    for each in config.configs if isinstance(config, MixedQuantizeConfig) else (config,):
        for name in each.layers(names, high_precision=high_precision):
            if name in found:
                raise ValueError(
                    f"two configs quantize {name}: {found[name].method} and {each.method}. Name it in one of them, or "
                    "in exclude_modules of the other"
                )
            found[name] = each
    return found


def quantize_config(value: Any) -> Quantize:
    """Return the config that a value stands for: a config itself, the name of a method, a dict of the fields of a
    `QuantizeConfig` or a list of such dicts, or a path of a JSON file with one of these.

    Raises:
        ValueError, TypeError: no such value, or a field that is wrong; the message names it.
        OSError: the file cannot be read.
    """
    if isinstance(value, QuantizeConfig | MixedQuantizeConfig):
        return value
    if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".json")):
        try:
            value = json.loads(Path(value).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{value} is no JSON file: {error}") from error
    if isinstance(value, str):
        return QuantizeConfig(value)
    if isinstance(value, Mapping):
        known = QuantizeConfig.__dataclass_fields__
        for name in value:
            if name not in known:
                raise ValueError(f"quantize has {name!r}{did_you_mean(str(name), known)} Expected {', '.join(known)}")
        if "method" not in value:
            raise ValueError(f"quantize={shown(value)} names no method")
        return QuantizeConfig(**value)
    if isinstance(value, list | tuple):
        configs = [quantize_config(each) for each in value]
        return MixedQuantizeConfig(configs)  # type: ignore[arg-type]
    raise TypeError(
        f"quantize={shown(value)}: expected the name of a method, a QuantizeConfig, or a dict of its fields"
    )


def _matches(name: str, pattern: str) -> bool:
    if any(char in pattern for char in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith(f".{pattern}")
