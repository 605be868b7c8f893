"""LoRAs of a pipeline: fused into the weights of a component, or hot, computed beside them, which can be removed."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import files
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.lora import LoRA, add_hot, clear_hot, fit, fuse, read_lora
from diffsynth.core.lora.fused import is_fused
from diffsynth.core.vram.managed import managed
from diffsynth.runtime.architectures import architecture_of, cuts
from diffsynth.runtime.plan_cache import PlanCache

logger = logging.getLogger(__name__)

_PREFERS_HOT = "_diffsynth_lora_hot_loading"


@dataclass(frozen=True)
class LoadedLoRA:
    """A LoRA that is loaded in a pipeline.

    Args:
        role: of the component that it changes.
        files: that it was read from; empty for a state dict.
        alpha: its strength.
        hot: whether it is computed beside the weights, rather than fused into them.
    """

    role: str
    files: tuple[Path, ...]
    alpha: float
    hot: bool


class LoRAMethods:
    """The methods of `Pipeline` for LoRAs. They must not run during a call of the pipeline."""

    @property
    def parts(self) -> dict[str, Any]:
        """A dict role -> component, with one entry for each member of a role of many."""
        raise NotImplementedError

    plan_cache: PlanCache | None

    @property
    def loras(self) -> tuple[LoadedLoRA, ...]:
        """The LoRAs that are loaded: a tuple of `LoadedLoRA`, in the order of loading."""
        return tuple(vars(self).get("_loras", ()))

    def load_lora(
        self,
        module: nn.Module,
        lora_config: ModelConfig | str | Path | None = None,
        alpha: float = 1.0,
        hotload: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        verbose: int = 1,
    ) -> None:
        """Load a LoRA into a component. After an error nothing is changed.

        Args:
            module: a component of this pipeline, `pipe.dit`.
            lora_config: a file, as a path or a `ModelConfig`.
            alpha: strength; 1.0 is that of its training, and it may be negative.
            hotload: True computes it beside the weights in each call, until `clear_lora`; False fuses it into the
                weights for good, at no cost in a call. None is True for a component under a policy, and after
                `enable_lora_hot_loading`.
            state_dict: tensors in memory, in place of `lora_config`.
            verbose: 0 does not log it.

        Raises:
            TypeError: `module` is no module.
            ValueError: `module` is no component of this pipeline, two sources or none, an `alpha` that is not finite,
                weights that cannot be changed in this way, or this LoRA is fused into them already.
            CheckpointError: the file is missing or cannot be read; `KeyMismatch` if it is no plain LoRA, or not one of
                this component. The message has the number of layers that fit, and the model that the LoRA is for.
        """
        role = self._role_of(module)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha!r}: expected a number")
        lora, paths = _read(lora_config, state_dict)
        architecture = architecture_of(module)
        checkpoints = _discovery.catalog().layouts()[1]
        fitted = fit(lora, module, checkpoints, architecture="" if architecture is None else architecture.name)
        hot = (managed(module) is not None or _PREFERS_HOT in vars(module)) if hotload is None else hotload
        if hot:
            add_hot(module, fitted, alpha, atomic=cuts(architecture)["atomic"])
        else:
            fuse(module, fitted, alpha)
        vars(self).setdefault("_loras", []).append(LoadedLoRA(role, paths, alpha, hot))
        self._clear_plans()
        if verbose:
            how = "beside the weights" if hot else "in the weights"
            logger.info("%s: %d layers of %s changed, %s, alpha=%g", lora.where, len(fitted.layers), role, how, alpha)

    def clear_lora(self) -> None:
        """Remove all hot LoRAs (computed beside the weights) from all components; fused ones stay in the weights."""
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        cleared = sum(clear_hot(module) for module in modules)
        vars(self)["_loras"] = [lora for lora in self.loras if not lora.hot]
        self._clear_plans()
        if not cleared and any(is_fused(module) for module in modules):
            logger.warning(
                "clear_lora() has nothing to clear: fused LoRAs stay in the weights until the model is loaded anew"
            )

    def enable_lora_hot_loading(self, module: nn.Module) -> None:
        """Make `hotload=True` the default of `load_lora` for this component.

        Raises:
            TypeError, ValueError: as for `load_lora`.
        """
        self._role_of(module)
        vars(module)[_PREFERS_HOT] = True

    def _role_of(self, module: Any) -> str:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module={module!r}: expected a component of this pipeline, such as pipe.dit")
        for role, part in self.parts.items():
            if part is module:
                return role
        held = [role for role, part in self.parts.items() if isinstance(part, nn.Module)]
        raise ValueError(
            f"this {type(module).__name__} is no component of the {type(self).__name__}; expected one of "
            f"{', '.join(f'pipe.{role}' for role in held)}"
        )

    def _clear_plans(self) -> None:
        # Earlier plans do not count the memory of matrices beside the weights.
        if self.plan_cache is not None:
            self.plan_cache.clear()


def _read(
    config: ModelConfig | str | Path | None, state_dict: Mapping[str, Tensor] | None
) -> tuple[LoRA, tuple[Path, ...]]:
    if (config is None) == (state_dict is None):
        raise ValueError(f"load_lora got {'no LoRA' if config is None else 'two'}; expected lora_config or state_dict")
    if not isinstance(config, ModelConfig | None):
        config = ModelConfig(path=config)
    if config is None or config.state_dict is not None:
        return read_lora(state_dict if config is None else config.state_dict), ()
    paths = files.find(config, resolve=lambda source: _discovery.first("resolve_source", source=source))
    return read_lora(paths), tuple(paths)
