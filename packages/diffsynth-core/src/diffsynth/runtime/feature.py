"""Features: everything of one conditioning of a pipeline, as one object that the pipeline lists.

A control video, a reference image, a ControlNet or an upscaler after the loop is a `Feature`: the arguments that it
adds to a call, the roles of its networks, its units, its checks, and the conditions that it passes to `velocity()`. A
plugin adds a feature in the same form to a pipeline of another package (`register_features`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from torch import Tensor

from diffsynth.errors import InvalidPipeline
from diffsynth.runtime.role import Agreement, Processor, Role
from diffsynth.runtime.unit import Unit
from diffsynth.sampling.windows import Window

Cut: TypeAlias = Callable[[Any, Window], Any]
"""Function of a condition's value and a window that returns the value for the window."""

Constrain: TypeAlias = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""Function of velocity, latents, noise levels and a condition's value that returns a velocity."""

Configs: TypeAlias = Mapping[str, Any]
"""Role -> the config of its component, None for one that is not loaded; a tuple of configs for a role of many."""


@dataclass(frozen=True)
class StepContext:
    """The step of the denoising loop that a call of `velocity()` belongs to.

    A solver may evaluate the velocity more than once in a step, at other noise levels; these fields are those of the
    step. Outside of a loop, as in training, there is one step.

    Args:
        sigma: noise level at the beginning of the step, in [0, 1].
        index: of the step, 0 for the first.
        num_steps: number of steps of the call.
        branch: name of the branch of guidance; names joined by "+" if branches are computed as one batch.
        window: the frames that are computed; None for all.
        networks: role -> component of the pipeline, for extensions that call a network of their own.
        call_state: a dict that lives for one call and one branch, for what an extension stores between steps.
    """

    sigma: float
    index: int = 0
    num_steps: int = 1
    branch: str = "cond"
    window: Window | None = None
    networks: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    call_state: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def in_branch(self, branch: str, call_state: dict[str, Any]) -> StepContext:
        """Return a `StepContext` of the same step in a branch of guidance, with the branch's state."""
        # Not `replace`, which takes twice as long: this runs for each branch of each evaluation.
        return StepContext(self.sigma, self.index, self.num_steps, branch, self.window, self.networks, call_state)

    @property
    def progress(self) -> float:
        """The share of the steps that are done at the beginning of this one, in [0, 1)."""
        return self.index / self.num_steps


@dataclass(frozen=True)
class Condition:
    """The treatment of a value that units write for `velocity()`.

    Args:
        cut: function of the value and a `Window` that returns the value for the window, such as `frames()` and `whole`;
            or a text, the reason why a call with this condition cannot use sliding windows.
        batch: "stack" if values that differ between the branches of guidance are tensors, which can be concatenated to
            one batch; "separate" if no batch can hold them.
        constrain: function of the guided velocity `b c ...`, the latents, the noise levels `b` and the value, that
            returns the velocity for the solver, such as one that keeps a part of an image; for what no guidance and no
            solver may change. `velocity()` does not get the value, and one that names it does the same by itself.

    Raises:
        InvalidPipeline: `cut` is an empty text, or `batch` is unknown.
    """

    cut: Cut | str = "it does not declare how it is cut"
    batch: Literal["stack", "separate"] = "stack"
    constrain: Constrain | None = None

    def __post_init__(self) -> None:
        if not self.cut:
            raise InvalidPipeline("Condition(cut=''): expected a function, or the reason why it cannot be cut")
        if self.batch not in ("stack", "separate"):
            raise InvalidPipeline(f"Condition(batch={self.batch!r}): expected 'stack' or 'separate'")


@dataclass(frozen=True)
class Feature:
    """One conditioning of a pipeline.

    Args:
        name: unique in the pipeline, "camera".
        arguments: a `TypedDict(total=False)` of the call's arguments that its units read, with their descriptions; it
            is a base of the family's own argument type. None for a feature without arguments.
        roles: role -> `Role` or `Processor` of what it brings.
        loop_roles: those of `roles` whose networks the loop calls.
        facts: name -> "role.field", see `Pipeline.facts`.
        agreements: the config fields that must be equal, see `Pipeline.agreements`.
        units: before the loop; each declares its `Phase`.
        outputs: units after the loop, which read and write `output`.
        conditions: name -> `Condition` of the values that `velocity()` reads. One that is no parameter of `velocity()`
            is an extension: its value is passed in `extensions`, unless it is None.
        per_image: names of arguments that take one value, or a list of one for each result.
        check: called with the configs of the components and the values of a call, see `Pipeline.known_values`, before
            anything runs; raises for arguments that do not fit.
        roles_at: function of a `StepContext` and the call's values that returns the roles of the networks that the
            feature calls in the step, at most its `loop_roles`. None is all of `loop_roles` in calls where one of
            the conditions is not None.
        alone: whether `Pipeline.from_pretrained` loads files for the roles of its units alone, without the pipeline's
            other components, for a feature that is also used outside of calls.
        other_arguments: argument that users of other programs know and the feature does not take -> what takes its
            place, for the error.
        provider: the plugin that adds it to a pipeline of another package; "" for the pipeline's own features.
    """

    name: str
    arguments: type | None = None
    roles: Mapping[str, Role | Processor] = field(default_factory=dict, hash=False)
    loop_roles: tuple[str, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict, hash=False)
    agreements: tuple[Agreement, ...] = ()
    units: tuple[Unit, ...] = ()
    outputs: tuple[Unit, ...] = ()
    conditions: Mapping[str, Condition] = field(default_factory=dict, hash=False)
    per_image: tuple[str, ...] = ()
    check: Callable[[Configs, Mapping[str, Any]], None] | None = None
    roles_at: Callable[[StepContext, Mapping[str, Any]], tuple[str, ...]] | None = None
    alone: bool = False
    other_arguments: Mapping[str, str] = field(default_factory=dict, hash=False)
    provider: str = ""

    def __post_init__(self) -> None:
        for name in ("roles", "facts", "conditions", "other_arguments"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def title(self) -> str:
        """The feature's name in messages: `feature 'blur'`, or `feature 'blur' of plugin soft (diffsynth-soft)`."""
        return f"feature {self.name!r}" + (f" of plugin {self.provider}" if self.provider else "")

    def is_alone(self, loaded: Collection[str]) -> bool:
        """Whether components under the roles `loaded` are for this feature alone, which is declared to be `alone`."""
        used = {role for step in (*self.units, *self.outputs) for role in (*step.roles, *step.requires)}
        return self.alone and used.issuperset(loaded) and not self.roles.keys().isdisjoint(loaded)

    def roles_in(self, step: StepContext, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Return a tuple of the roles whose networks the feature calls in a step of the loop.

        Args:
            step: the step.
            values: the arguments of the call and what units wrote.
        """
        if self.roles_at is not None:
            return self.roles_at(step, values)
        return self.loop_roles if any(values.get(name) is not None for name in self.conditions) else ()


def whole(value: Any, window: Window) -> Any:
    """Return `value` itself: a condition that is the same for every window."""
    return value


def frames(dim: int = 2) -> Cut:
    """Return a `Cut` of tensors whose axis `dim` is latent frames; a window without any of the tensor's frames gets
    None.
    """

    def cut(value: Tensor, window: Window) -> Tensor | None:
        part = window.cut(value, dim)
        return part if part.shape[dim] else None

    return cut


def in_window(value: Any, window: Window) -> Any:
    """Return `value.in_window(window)`: the cut of a condition whose class has this method."""
    return value.in_window(window)
