"""A pipeline's LoRAs: loaded into a component's weights or beside them, and taken away again."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.loader import files
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.lora import LoRA, add_hot, clear_hot, fit, fuse, read_lora
from diffsynth.core.lora.cold import is_fused
from diffsynth.core.vram.managed import managed
from diffsynth.runtime.acceleration.blocks import architecture_of
from diffsynth.runtime.memory_options import cuts

if TYPE_CHECKING:
    from diffsynth.runtime.plan_cache import PlanCache

logger = logging.getLogger(__name__)

_PREFERS_HOT = "_diffsynth_lora_hot_loading"


@dataclass(frozen=True)
class LoadedLoRA:
    """A LoRA that a pipeline draws with.

    Args:
        role: of the component that it changes.
        files: that it came from; empty for a state dict.
        alpha: its strength.
        hot: whether it is beside the weights, not in them.
    """

    role: str
    files: tuple[Path, ...]
    alpha: float
    hot: bool


class LoRAMethods:
    """What `Pipeline` does about LoRAs. Call these between calls of the pipeline, not during one."""

    components: dict[str, Any]
    _limit: PlanCache | None

    @property
    def loras(self) -> tuple[LoadedLoRA, ...]:
        """The LoRAs that this pipeline loaded and did not clear."""
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
        """Load a LoRA, all of it or, with an error, nothing of it.

        Args:
            module: a component of this pipeline, `pipe.dit`.
            lora_config: a file, by its path or as a `ModelConfig`.
            alpha: strength; 1.0 is that of its training, and it may be negative.
            hotload: True adds it beside the weights whenever a layer runs, which `clear_lora` ends; False adds it to
                the weights for good, at no cost in a call. None is True for a component under a policy, and after
                `enable_lora_hot_loading`.
            state_dict: tensors in memory, in place of `lora_config`.
            verbose: 0 does not log it.

        Raises:
            TypeError: `module` is no module.
            ValueError: `module` is no component of this pipeline, two sources or none, an `alpha` that is no number,
                weights that cannot be changed as asked, or this LoRA is in them already.
            CheckpointError: no such file, or one that cannot be read; `KeyMismatch` if it is no plain LoRA, or not one
                of this component. The message says how much of it fits, and what it is for.
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
        self._forget_plans()
        if verbose:
            how = "beside the weights" if hot else "in the weights"
            logger.info("%s: %d layers of %s changed, %s, alpha=%g", lora.where, len(fitted.layers), role, how, alpha)

    def clear_lora(self) -> None:
        """Take every hot LoRA away, from all components; the weights are what they were. Fused ones stay."""
        modules = [part for part in self.components.values() if isinstance(part, nn.Module)]
        cleared = sum(clear_hot(module) for module in modules)
        vars(self)["_loras"] = [lora for lora in self.loras if not lora.hot]
        self._forget_plans()
        if not cleared and any(is_fused(module) for module in modules):
            logger.warning(
                "clear_lora() has nothing to clear: LoRAs in the weights stay until the model is loaded anew"
            )

    def enable_lora_hot_loading(self, module: nn.Module) -> None:
        """Have `load_lora` put LoRAs beside this component's weights unless it is told otherwise.

        Raises:
            TypeError, ValueError: as for `load_lora`.
        """
        self._role_of(module)
        vars(module)[_PREFERS_HOT] = True

    def _role_of(self, module: Any) -> str:
        if not isinstance(module, nn.Module):
            raise TypeError(f"module={module!r}: expected a component of this pipeline, such as pipe.dit")
        for role, part in self.components.items():
            if part is module:
                return role
        held = [role for role, part in self.components.items() if isinstance(part, nn.Module)]
        raise ValueError(
            f"this {type(module).__name__} is no component of the {type(self).__name__}; expected one of "
            f"{', '.join(f'pipe.{role}' for role in held)}"
        )

    def _forget_plans(self) -> None:
        # Matrices beside the weights take memory that plans made before do not know of.
        if self._limit is not None:
            self._limit.forget()


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
