"""The settings of a call's argument `guidance`: the four classes that core declares, and their text form.

A guidance makes one velocity of the predictions of several branches. The arithmetic is in
`diffsynth.sampling.guidance`; plugins declare further classes by `register_guidance`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.core.arguments import check_integer, check_number
from diffsynth.errors import did_you_mean
from diffsynth.runtime.acceleration.settings import parse_settings
from diffsynth.sampling.guidance import (
    adaptive_projected_guidance,
    cfg_zero_star,
    classifier_free_guidance,
    rescaled_guidance,
)
from diffsynth.spec import GuidanceSpec, resolve


@dataclass(frozen=True)
class GuidanceStep:
    """One evaluation of the velocity in the denoising loop, as far as a guidance reads it.

    Args:
        latents: the latents at noise level `sigma`, `b ...`.
        sigma: the noise level of each entry, `(b,)`, fp32, in (0, 1].
        index: of the step, from 0.
        num_steps: of the schedule.
        is_first_evaluation: whether it is the first evaluation in this step; some solvers evaluate the velocity twice.
        state: what the guidance stores between evaluations; empty at the first evaluation of a call, dropped after it.
    """

    latents: Float[Tensor, "b ..."]
    sigma: Float[Tensor, " b"]
    index: int
    num_steps: int
    is_first_evaluation: bool
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Guidance(ABC):
    """The settings of a guidance, and how it combines predictions; a base class.

    A subclass is a frozen dataclass of plain values with `combine()`. `branches` names the predictions that it needs;
    units give each branch its own conditions, and the network runs once for each.

    Raises:
        ValueError: when a subclass is defined, `branches` is no tuple of names, is empty, or has a name twice.
    """

    branches: ClassVar[tuple[str, ...]] = ("cond", "uncond")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = cls.branches
        if not (isinstance(names, tuple) and names and all(isinstance(name, str) and name for name in names)):
            raise ValueError(f"{cls.__name__}.branches={names!r}: expected a tuple of names, at least one")
        if len(set(names)) < len(names):
            raise ValueError(f"{cls.__name__}.branches={names!r}: expected each name once")

    def is_off(self, cfg_scale: float) -> bool:
        """Whether a call computes `branches[0]` only, and does not call `combine()`; in this base class at a
        `cfg_scale` of 1.
        """
        return cfg_scale == 1

    def refuses(self, num_steps: int) -> str | None:
        """Return the reason why this guidance cannot serve a call of `num_steps` steps, as text, or None if it can."""
        return None

    @abstractmethod
    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        """Return the guided velocity, an fp32 tensor in the shape of `step.latents`, as subclasses define it.

        Args:
            predictions: name in `branches` -> velocity `noise - x0`, fp32; not to be changed in place.
            cfg_scale: the call's scale.
            step: the evaluation.
        """


@dataclass(frozen=True, kw_only=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance, Ho & Salimans 2022, arXiv:2207.12598; the default.

    See `diffsynth.sampling.guidance.classifier_free_guidance`.
    """

    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        """Return the guided velocity; see `Guidance.combine`."""
        return classifier_free_guidance(predictions["cond"], predictions["uncond"], cfg_scale)


@dataclass(frozen=True, kw_only=True)
class RescaledClassifierFree(Guidance):
    """Classifier-free guidance, scaled toward the standard deviation of the `cond` branch (Lin et al. 2023,
    arXiv:2305.08891).

    See `diffsynth.sampling.guidance.rescaled_guidance`.

    Args:
        rescale: in [0, 1]; 0 is classifier-free guidance.

    Raises:
        ValueError: `rescale` is out of range.
    """

    rescale: float = 0.7

    def __post_init__(self) -> None:
        check_number("rescale", self.rescale, least=0, most=1, note="0 rescales nothing")

    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        """Return the guided velocity; see `Guidance.combine`."""
        return rescaled_guidance(predictions["cond"], predictions["uncond"], cfg_scale, guidance_rescale=self.rescale)


@dataclass(frozen=True, kw_only=True)
class AdaptiveProjected(Guidance):
    """Adaptive projected guidance (APG), Sadat et al. 2024, arXiv:2410.02416: the difference of the denoised
    predictions, with a weight for its part parallel to the `cond` branch.

    See `diffsynth.sampling.guidance.adaptive_projected_guidance`. The momentum advances once per step: all evaluations
    of a step add the average of earlier steps, and the first one is stored.

    Args:
        eta: weight of the parallel part, which oversaturates: 0 removes it, 1 keeps it.
        momentum: weight of the average of earlier steps, in (-1, 1); 0 is none.
        norm_threshold: largest L2 norm of the difference for one image or video, at least 0; 0 is no limit.

    Raises:
        ValueError: a setting is out of range.
    """

    eta: float = 0.0
    momentum: float = -0.5
    norm_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_number("eta", self.eta)
        check_number("momentum", self.momentum, above=-1, below=1, note="0 is none")
        check_number("norm_threshold", self.norm_threshold, least=0, note="0 is no limit")

    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        """Return the guided velocity; see `Guidance.combine`."""
        state = step.state
        if step.is_first_evaluation:
            state["apg_earlier"] = state.pop("apg_average", None)
        velocity, average = adaptive_projected_guidance(
            predictions["cond"],
            predictions["uncond"],
            cfg_scale,
            latents=step.latents,
            sigma=step.sigma,
            eta=self.eta,
            norm_threshold=self.norm_threshold,
            momentum=self.momentum,
            average=state.get("apg_earlier"),
        )
        if step.is_first_evaluation and self.momentum != 0:
            state["apg_average"] = average
        return velocity


@dataclass(frozen=True, kw_only=True)
class ZeroStar(Guidance):
    """CFG-Zero*, Fan et al. 2025, arXiv:2503.18886: classifier-free guidance with the `uncond` branch scaled to fit the
    `cond` branch, and a velocity of 0 in the first steps.

    See `diffsynth.sampling.guidance.cfg_zero_star`. A call with no more than `zero_steps` steps, whose result would be
    noise, is refused.

    Args:
        zero_steps: number of steps at the beginning with a velocity of 0, at least 0. Their predictions are computed
            all the same.

    Raises:
        ValueError: `zero_steps` is no integer of at least 0.
    """

    zero_steps: int = 1

    def __post_init__(self) -> None:
        check_integer("zero_steps", self.zero_steps, least=0)

    def refuses(self, num_steps: int) -> str | None:
        """Return the reason why a call of `num_steps` steps is refused; see `Guidance.refuses`."""
        if self.zero_steps < num_steps:
            return None
        return f"zero_steps={self.zero_steps} leaves none of {num_steps} steps; the result would be noise"

    def combine(self, predictions: Mapping[str, Tensor], cfg_scale: float, step: GuidanceStep) -> Tensor:
        """Return the guided velocity; see `Guidance.combine`."""
        return cfg_zero_star(
            predictions["cond"], predictions["uncond"], cfg_scale, index=step.index, zero_steps=self.zero_steps
        )


GuidanceArgument = Guidance | str | None
"""The type of a call's argument `guidance`."""


def ignored_without_guidance(*names: str) -> Callable[[Mapping[str, Any]], Mapping[str, str]]:
    """Return a function for `Unit.ignores`: of a call's values, which returns the reason why `names` change nothing in
    a call without guidance, else an empty dict.
    """

    def ignored(values: Mapping[str, Any]) -> dict[str, str]:
        is_off = parse_guidance(values["guidance"]).is_off(values["cfg_scale"])
        return dict.fromkeys(names, f"guidance is off (cfg_scale={values['cfg_scale']})") if is_off else {}

    return ignored


def parse_guidance(value: str | Guidance | None) -> Guidance:
    """Return `value` as a `Guidance`: a text such as "apg:eta=0.5" is parsed; None is classifier-free guidance.

    A text begins with a name that core or a plugin declares by `register_guidance`. Of two plugins that declare one
    name, which `registry.problems()` reports, the one whose name sorts first is used, and core before all.

    Raises:
        ValueError: an unknown name or setting, a value out of range, a setting without default that is missing, or a
            declared class that cannot be used; the message names its plugin.
        TypeError: neither a text nor a guidance.
        BrokenPlugin: a declared class cannot be used, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    if value is None:
        return ClassifierFree()
    if isinstance(value, Guidance):
        return value
    if not isinstance(value, str):
        raise TypeError(f"guidance={value!r}: expected a Guidance, a text such as 'apg:eta=0.5', or None")
    argument = f"guidance={value!r}"
    name, _, rest = value.partition(":")
    declared = {one.spec.name: one for one in reversed(_discovery.catalog().guidance)}
    if name not in declared:
        raise ValueError(_unknown(argument, name, declared))
    kind = _guidance_class(declared[name], argument)
    own = [each for each in fields(kind) if each.init]
    settings = parse_settings(rest, [each.name for each in own], argument=argument)
    required = [each.name for each in own if each.default is MISSING and each.default_factory is MISSING]
    if missing := [each for each in required if each not in settings]:
        raise ValueError(f"{argument}: {name} needs {missing[0]}, as in '{name}:{missing[0]}=0.1'")
    return kind(**settings)


def _guidance_class(declared: Declared[GuidanceSpec], argument: str) -> type[Guidance]:
    """Import and return the class that a plugin declares; raise ValueError if it cannot be used, and record that as a
    problem of the plugin.
    """
    try:
        kind = resolve(declared.spec.guidance)
        if not (isinstance(kind, type) and issubclass(kind, Guidance)):
            raise TypeError(f"{declared.spec.guidance!r} is {kind!r}; expected a subclass of Guidance")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        _discovery.report(
            declared,
            f"guidance {declared.spec.name!r} cannot be used: {reason}. "
            f"Without the plugin: {_discovery.removal(declared)}",
            cause=error,
        )
        plugin = f"{declared.plugin} ({declared.distribution} {declared.version})"
        raise ValueError(
            f"{argument}: {declared.spec.name!r} of plugin {plugin} cannot be used: {reason}. Choose another guidance"
        ) from error
    return kind


def _unknown(argument: str, name: str, known: Iterable[str]) -> str:
    names, broken = sorted(known), _discovery.broken_plugins()
    text = f"{argument}: {name!r} is unknown{did_you_mean(name, names)}; expected one of {', '.join(names)}"
    return text + (f".  {_discovery.describe(broken)}" if broken else "")
