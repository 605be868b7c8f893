"""LoRAs of a pipeline: fused into the weights of a component, or hot, computed beside them, which can be removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.arguments import check_number
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.lora_match import role_hint
from diffsynth.core.lora import LoRA, add_hot, clear_hot, fit, fuse, read_lora
from diffsynth.core.lora.applied import is_fused
from diffsynth.core.lora.call_defaults import call_defaults_metadata
from diffsynth.core.lora.fitting import what_does_not_fit, what_fits
from diffsynth.core.lora.format import subset, write_keys
from diffsynth.core.lora.fused import check_fused
from diffsynth.core.lora.hot import check_hot, not_hot
from diffsynth.core.lora.spelling import spelled, spelling_of
from diffsynth.core.lora.widening import widen, wider_layers
from diffsynth.core.paths import expanded
from diffsynth.core.replacing import check_writable
from diffsynth.core.torch_defaults import torch_defaults
from diffsynth.core.vram.managed import managed, wrap
from diffsynth.errors import KeyMismatch, shortened
from diffsynth.runtime.architectures import architecture_of, cuts
from diffsynth.runtime.branch_lora import BranchLoRASession, find_lora
from diffsynth.runtime.lora_defaults import declared_defaults, defaults_of, joined_defaults
from diffsynth.runtime.plan_cache import PlanCache
from diffsynth.runtime.running_calls import RunningCalls
from diffsynth.spec import CheckpointSpec, resolve
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_PREFERS_HOT = "_diffsynth_lora_hot_loading"


@dataclass(frozen=True)
class LoadedLoRA:
    """A LoRA that is loaded in a pipeline.

    Args:
        role: of the component that it changes.
        files: that it was read from; empty for a state dict.
        alpha: its strength.
        hot: whether it is computed beside the weights, rather than fused into them.
        where: the file's name, for messages.
        call_defaults: argument -> default of calls while it is loaded.
    """

    role: str
    files: tuple[Path, ...]
    alpha: float
    hot: bool
    where: str = "a LoRA"
    call_defaults: Mapping[str, Any] = field(default_factory=dict)


class LoRAMethods:
    """The methods of `Pipeline` for LoRAs. Those that change weights refuse to run during a call of the pipeline."""

    @property
    def parts(self) -> dict[str, Any]:
        """A dict role -> component, with one entry for each member of a role of many."""
        raise NotImplementedError

    plan_cache: PlanCache | None
    running_calls: RunningCalls
    device: torch.device
    all_loop_roles: tuple[str, ...]

    def follow_defaults(self) -> None:
        """Set the defaults of calls anew, after those of loaded LoRAs changed."""
        raise NotImplementedError

    def _follow_wrapped(self) -> None:
        """Move the components that are wrapped now, after one was wrapped anew."""
        raise NotImplementedError

    @property
    def loras(self) -> tuple[LoadedLoRA, ...]:
        """The LoRAs that are loaded: a tuple of `LoadedLoRA`, in the order of loading."""
        return tuple(vars(self).get("_loras", ()))

    @property
    def lora_call_defaults(self) -> dict[str, Any]:
        """A dict argument -> default of calls that loaded LoRAs set, in place of the model's."""
        return joined_defaults(self.loras)

    @torch_defaults()
    def load_lora(
        self,
        module: nn.Module | ModelConfig | str | Path | None = None,
        lora_config: ModelConfig | str | Path | None = None,
        alpha: float = 1.0,
        hotload: bool | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        verbose: int = 1,
        *,
        strict: bool = True,
        call_defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Load a LoRA into a component, or each of its layers into the component that has it. After an error nothing is
        changed.

        `load_lora(pipe.dit, file)` adds the layers of that component, and leaves those that only another component has
        to it. `load_lora(file)` adds all.

        A LoRA may set defaults of calls, such as four steps without guidance: by its metadata, or as a published one
        that a plugin declares. They are logged, a call's own arguments have precedence, and `clear_lora` restores the
        model's defaults.

        Args:
            module: a component of this pipeline, `pipe.dit`; a LoRA or None adds each layer to the component that has
                it.
            lora_config: a file, a folder with one LoRA, or a `ModelConfig`.
            alpha: strength; 1.0 is that of its training, and it may be negative.
            hotload: True computes it beside the weights in each call, until `clear_lora`; False fuses it into the
                weights for good, at no cost in a call. None is True for a component under a policy, and after
                `enable_lora_hot_loading`, unless the LoRA has changes that can only be fused.
            state_dict: tensors in memory, in place of `lora_config`.
            verbose: 0 does not log it.
            strict: False leaves out what cannot be applied, and logs a warning that lists it.
            call_defaults: argument -> default of calls while it is loaded, in place of what the LoRA sets; `{}` is
                none. A LoRA with an `alpha` of 0 or less sets none by itself.

        Raises:
            PipelineError: a call of this pipeline runs, in this thread or another one.
            TypeError: `module` is no module, or `hotload` is neither a bool nor None.
            ValueError: `module` is no component of this pipeline, two sources or none, an `alpha` that is not finite,
                weights that cannot be changed in this way, a layer that two components have, this LoRA is loaded
                already, defaults that calls refuse, or others than those of a LoRA that is loaded.
            CheckpointError: the file is missing or cannot be read; `KeyMismatch` if it is no LoRA, or, if strict, some
                of it cannot be applied. The message has the number of layers that fit, and the model that the LoRA is
                for.
        """
        is_role = isinstance(module, str) and module in self.parts  # `pipe.dit` is meant, and the error says so
        if isinstance(module, str | Path | ModelConfig) and lora_config is None and not is_role:
            module, lora_config = None, module
        role = None if module is None else self._role_of(module)
        check_number("alpha", alpha)
        if not isinstance(hotload, bool | None):
            raise TypeError(f"hotload={hotload!r:.60}: expected True, False or None")
        self.running_calls.refuse("load_lora()")
        lora, paths = _read(lora_config, state_dict, strict)
        config = ModelConfig(path=lora_config) if isinstance(lora_config, str | Path) else lora_config
        given = {} if call_defaults is None and alpha <= 0 else call_defaults
        defaults = defaults_of(self, lora, given, config=config, paths=paths)
        fitted = self._fitted(lora, role, strict)
        ways = {role: self._is_hot(role, part, hotload) for role, part in fitted.items()}
        loaded = [LoadedLoRA(role, paths, alpha, ways[role], lora.where, defaults) for role in fitted]
        joined_defaults([*self.loras, *loaded])
        for role, part in fitted.items():
            if ways[role]:
                check_hot(self.parts[role], part, atomic=self._atomic(role))
            else:
                check_fused(self.parts[role], part)
        for role, part in fitted.items():
            self._apply(role, part, alpha, hot=ways[role], verbose=verbose)
        vars(self)["_loras"] = [*self.loras, *loaded]
        self.follow_defaults()
        if defaults and verbose:
            shown = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
            logger.info("%s sets the defaults of calls: %s", lora.where, shown)
        self._clear_plans()

    def check_lora(self, lora_config: ModelConfig | str | Path, module: nn.Module | None = None) -> None:
        """Raise the error of `load_lora` for a LoRA whose layers do not fit the components, also for components without
        weights; change nothing.

        Args:
            lora_config: a file, a folder with one LoRA, or a `ModelConfig`.
            module: a component of this pipeline; None is all.

        Raises:
            CheckpointError: the file is missing or cannot be read; `KeyMismatch` if it does not fit.
            ValueError: `module` is no component of this pipeline, or a layer that two components have.
        """
        config = lora_config if isinstance(lora_config, ModelConfig) else ModelConfig(path=lora_config)
        lora, _ = _read(config, None, strict=True)
        self._fitted(lora, None if module is None else self._role_of(module), strict=True)

    def _apply(self, role: str, part: LoRA, alpha: float, *, hot: bool, verbose: int) -> None:
        """Add the layers of a LoRA to the component of a role, beside its weights or in them, and log it."""
        if hot:
            add_hot(self.parts[role], part, alpha, atomic=self._atomic(role))
        else:
            self._widen(role, part)
            fuse(self.parts[role], part, alpha)
        if verbose:
            how = "beside the weights" if hot else "in the weights"
            count = len(part.layers) + len(part.others)
            logger.info("%s: %d layers of %s changed, %s, alpha=%g", part.where, count, role, how, alpha)

    def convert_lora(
        self,
        lora_config: ModelConfig | str | Path,
        path: Path | str,
        *,
        spelling: str,
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Write a LoRA file again, under the keys that another program reads, and return the new file's `Path`.

        The pipeline's components say which layers there are, and are not changed. Layers of text encoders are written
        to the same file, and so are the defaults of calls that the LoRA sets.

        Args:
            lora_config: a file, a folder with one LoRA, or a `ModelConfig`.
            path: the new file, a safetensors file; an existing one is replaced.
            spelling: the program: `"diffusers"`, `"kohya"`, `"comfyui"`, `"peft"` or another that the components'
                architectures declare.
            metadata: additional metadata; values must be text.

        Raises:
            ValueError: an unknown spelling, a component without an architecture, or a path that cannot be written to.
            CheckpointError: as for `load_lora`; `KeyMismatch` also if a change is no plain LoRA, or the program does
                not know a layer.
        """
        check_writable(expanded(path))
        config = lora_config if isinstance(lora_config, ModelConfig) else ModelConfig(path=lora_config)
        lora, paths = _read(config, None, strict=True)
        asked = call_defaults_metadata(declared_defaults(type(self), lora, config=config, paths=paths))
        tensors: dict[str, Tensor] = {}
        for role, part in self._fitted(lora, None, strict=True).items():
            architecture = architecture_of(self.parts[role])
            if architecture is None:
                raise ValueError(f"{role} is of no declared architecture, so no spelling of its layers is known")
            own = {key: tuple(tensor.shape) for key, tensor in self.parts[role].state_dict().items()}
            known = spelling_of(spelling, architecture)
            tensors |= spelled(part, known, own, _discovery.catalog().layouts()[1])
        return write_keys(tensors, path, {**asked, **(metadata or {})})

    def branch_loras(self, loras: Mapping[str, Sequence[LoRA]], branches: Sequence[str]) -> BranchLoRASession:
        """Return the `BranchLoRASession` of a call.

        Args:
            loras: branch -> its LoRAs, under the names of their files.
            branches: those that the call computes; the LoRAs of others are left out.

        Raises:
            KeyMismatch: a LoRA does not fit the networks of the loop, or fits another component.
            ValueError: as for `BranchLoRASession`.
        """
        fitted: dict[str, dict[str, list[LoRA]]] = {}
        for branch in branches:
            for lora in loras.get(branch, ()):
                for role, part in self._fitted(lora, None, strict=True).items():
                    if role not in self.all_loop_roles:
                        raise KeyMismatch(
                            f"{lora.where} changes {role}, which the branches of guidance do not call; expected "
                            f"changes of {' and '.join(self.all_loop_roles)} only. Load it with load_lora()"
                        )
                    fitted.setdefault(branch, {}).setdefault(role, []).append(part)
        return BranchLoRASession(fitted, self._networks(), device=self.device, atomic=self._atomic)

    def _fitted(self, lora: LoRA, role: str | None, strict: bool) -> dict[str, LoRA]:
        """Return a dict role -> the layers of `lora` that its component gets, under its names.

        Args:
            lora: a LoRA with the names of its file.
            role: the role that the user named; None for all.
            strict: whether every layer must belong to a component.

        Raises:
            KeyMismatch, ValueError: as for `load_lora`.
        """
        refusal: KeyMismatch | None = None
        if lora.left:
            logger.warning("%s: left out, because it cannot be read: %s", lora.where, shortened(lora.left))
        try:
            if role is not None:
                return {role: self._fit(lora, role)}
        except KeyMismatch as error:
            refusal = error
        owners = self._owners(lora)
        roles = list(dict.fromkeys(each for found in owners.values() for each in found)) if role is None else [role]
        names = {each: {name for name, found in owners.items() if each in found} for each in roles}
        if not any(names.values()):
            raise refusal or self._refusal(lora, owners)
        lost = [name for name, found in owners.items() if not found]
        if lost and strict:
            if role is not None:
                raise self._refusal(subset(lora, names[role] | set(lost)), owners, role)
            raise KeyMismatch(
                f"{lora.where} does not fit this {type(self).__name__}, and nothing was changed: "
                f"{len(owners) - len(lost)} of its {len(owners)} layers fit; {self._why_lost(lora, lost)}. "
                "strict=False adds those that fit"
            )
        double = [name for name, found in owners.items() if len(found) > 1]
        if double and role is None:
            named = [f"pipe.{each}" for each in owners[double[0]]]
            raise ValueError(
                f"{lora.where}: {shortened(double, 2)}: layers of {' and of '.join(named)}. Name the component: "
                f"load_lora({named[0]}, ...)"
            )
        if lost:
            logger.warning("%s: left out: %s", lora.where, self._why_lost(lora, lost))
        if others := [name for name, found in owners.items() if found and not set(found) & set(roles)]:
            logger.info("%s: left to other components: %s", lora.where, shortened(others))
        return {each: self._fit(subset(lora, names[each]), each) for each in roles}

    def _widen(self, role: str, lora: LoRA) -> None:
        """Give a component's layers the inputs that a LoRA adds to them."""
        module, architecture = self.parts[role], architecture_of(self.parts[role])
        if not wider_layers(lora):
            return
        assert architecture is not None, "its spec says that the layers may be widened"
        engine = managed(module)
        if engine is not None:
            engine.unwrap()
        try:
            widen(module, lora, resolve(architecture.infer_config))
        finally:
            if engine is not None:
                wrap(module, engine.policy, **cuts(architecture))
                self._follow_wrapped()

    def _owners(self, lora: LoRA) -> dict[str, list[str]]:
        """Return a dict name of a change of `lora` -> the roles whose components have it, of those that its prefix
        allows.
        """
        modules = self._networks()
        names = list(dict.fromkeys(each.change.name for each in lora.factors))
        second = any(role_hint(name) == ("network", "2") for name in names)
        allowed = {name: _allowed(name, list(modules), second=second) for name in names}
        owners: dict[str, list[str]] = {name: [] for name in names}
        for role, module in modules.items():
            part = subset(lora, {name for name, roles in allowed.items() if role in roles})
            for name in what_fits(part, module, *_layouts(module)):
                owners[name].append(role)
        return owners

    def _fit(self, lora: LoRA, role: str) -> LoRA:
        checkpoints, architecture, widened = _layouts(self.parts[role])
        return fit(lora, self.parts[role], checkpoints, architecture=architecture, widened=widened)

    def _refusal(self, lora: LoRA, owners: Mapping[str, Sequence[str]], role: str | None = None) -> KeyMismatch:
        """Return the KeyMismatch of fitting `lora` to the component of `role`, or to the one that most of it fits."""
        if role is None:
            fitting = [each for found in owners.values() for each in found]
            role = max(self._networks(), key=fitting.count)
        try:
            self._fit(lora, role)
        except KeyMismatch as error:
            return error
        names = shortened([each.change.name for each in lora.factors], 4)
        return KeyMismatch(f"{lora.where}: by their prefix {names} are layers of another component than {role}")

    def _why_lost(self, lora: LoRA, lost: Sequence[str]) -> str:
        """Return why changes fit no component: a text for messages."""
        part, reasons = subset(lora, set(lost)), dict[str, str]()
        for module in self._networks().values():
            left = what_does_not_fit(part, module, *_layouts(module))
            reasons |= {name: reason for name, reason in left.items() if reason}
        texts = [shortened(list(dict.fromkeys(reasons.values())), 2)] if reasons else []
        if absent := [name for name in lost if name not in reasons]:
            texts.append(f"no component has {shortened(absent, 4)}")
        return "; ".join(texts)

    def _networks(self) -> dict[str, nn.Module]:
        return {role: part for role, part in self.parts.items() if isinstance(part, nn.Module)}

    def _is_hot(self, role: str, lora: LoRA, hotload: bool | None) -> bool:
        module = self.parts[role]
        if hotload is not None:
            return hotload
        if managed(module) is None and _PREFERS_HOT not in vars(module):
            return False
        if reason := not_hot(lora):
            logger.info("%s; the LoRA is fused into %s", reason, role)
        return not reason

    def _atomic(self, role: str) -> tuple[type, ...]:
        found: tuple[type, ...] = cuts(architecture_of(self.parts[role]))["atomic"]
        return found

    def clear_lora(self) -> None:
        """Remove all hot LoRAs (computed beside the weights) from all components, and the defaults of calls that they
        set; fused ones stay in the weights.

        Raises:
            PipelineError: a call of this pipeline runs.
        """
        self.running_calls.refuse("clear_lora()")
        modules = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        cleared = sum(clear_hot(module) for module in modules)
        vars(self)["_loras"] = [lora for lora in self.loras if not lora.hot]
        self.follow_defaults()
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


def _layouts(module: nn.Module) -> tuple[Sequence[CheckpointSpec], str, Sequence[str]]:
    """Return a tuple: all published layouts, the name of the module's architecture, and the names of the layers that a
    LoRA may widen; empty without an architecture.
    """
    architecture = architecture_of(module)
    known = ("", ()) if architecture is None else (architecture.name, architecture.widened_by_loras)
    return _discovery.catalog().layouts()[1], *known


def _allowed(name: str, roles: Sequence[str], *, second: bool) -> list[str]:
    """Return a list of the roles that a change may belong to by the prefix of its name.

    Args:
        name: the change's name in its file.
        roles: the pipeline's roles.
        second: whether the file has changes of a second network, such as `transformer_2`.
    """
    kind, number = role_hint(name)
    text = [role for role in roles if "text_encoder" in role]
    networks = [role for role in roles if role not in text]
    if kind.startswith("role:") and kind[5:] in roles:
        return [kind[5:]]
    if kind == "text":
        # kohya calls T5 the third text encoder, also where there are two.
        return text[int(number) - 1 :][:1] or text if number and len(text) > 1 else text
    if kind == "network":
        return [role for role in networks if not second or role.endswith("2") == (number == "2")]
    return list(roles)


def _read(
    config: ModelConfig | str | Path | None, state_dict: Mapping[str, Tensor] | None, strict: bool
) -> tuple[LoRA, tuple[Path, ...]]:
    if (config is None) == (state_dict is None):
        raise ValueError(f"load_lora got {'no LoRA' if config is None else 'two'}; expected lora_config or state_dict")
    if not isinstance(config, ModelConfig | None):
        config = ModelConfig(path=config)
    given = state_dict if config is None else config.state_dict
    if given is not None:
        return read_lora(given, strict=strict), ()
    assert config is not None
    paths = find_lora(config)
    return read_lora(paths, strict=strict), tuple(paths)
