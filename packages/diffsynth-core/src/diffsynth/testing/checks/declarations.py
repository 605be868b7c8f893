"""Checks of the functions and classes that a plugin declares by name: solvers, guidances, writers, LoRA defaults."""

from __future__ import annotations

import functools
import inspect
import tempfile
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth import _discovery
from diffsynth.errors import Unavailable, did_you_mean, shown
from diffsynth.spec import (
    GuidanceSpec,
    LoRASpec,
    ModelSpec,
    ObjectiveSpec,
    SolverSpec,
    TrainingSpec,
    WriterSpec,
    parse_source,
    resolve,
)
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.pipelines import units_of
from diffsynth.testing.checks.plugin import REFERENCES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEVELS = (1.0, 0.6, 0.25, 0.0)
"""Noise levels of the schedule that solvers are tried on."""


def checks(subject: Subject) -> Iterator[Check]:
    """Yield a `Check` (a named test, not yet run) for each solver, guidance, writer, objective, training schedule,
    published LoRA and model of the plugin.
    """
    own = {fact.pipeline for fact in (*subject.declared("models"), *subject.declared("training"))}
    for kind, title, function in (
        ("solvers", "solver {0.name} ends at the data", _solves),
        ("guidance", "guidance {0.name} combines predictions", _combines),
        ("writers", "writer {0.suffix} writes a result", _writes),
        ("objectives", "objective {0.name} has a loss", _has_loss),
        ("training", "training of {0.pipeline} has a schedule", _has_schedule),
        ("loras", "LoRA {0.name} sets arguments of its pipeline", _sets_arguments),
        ("models", "model {0.name} has sources that can be found", _has_known_sources),
    ):
        for fact in subject.declared(kind):
            # A pipeline of the plugin itself has a check of its own, and what it takes is not known if that fails.
            after = (units_of(fact.pipeline),) if kind == "loras" and fact.pipeline in own else ()
            if kind != "training" or fact.schedule:
                yield Check(title.format(fact), functools.partial(function, fact), after=(REFERENCES, *after))


def _solves(fact: SolverSpec) -> None:
    """Raise AssertionError unless the solver ends at the data x0 under the exact velocity of data that is the one
    point x0, `v = (x - x0) / sigma`, and keeps the contract of solvers.
    """
    import torch

    from diffsynth.runtime.solvers import load_solver

    generator = torch.Generator().manual_seed(0)
    x0, start = torch.randn(2, 3, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    sigmas, levels, calls = torch.tensor(LEVELS), [], {"noise": 0, "progress": 0}
    seen: list[int] = []

    def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
        levels.append(float(sigma))
        return (latents - x0) / max(float(sigma), 1e-6)

    def noise(index: int) -> Tensor:
        calls["noise"] += 1
        return torch.randn(2, 3, 4, generator=generator)

    def progress(steps: Any) -> Any:
        calls["progress"] += 1
        return iter(steps)

    latents, steps = start.clone(), len(LEVELS) - 1
    result = load_solver(fact)(
        velocity, latents, sigmas, noise=noise, on_step=lambda index, _: seen.append(index), progress=progress
    )
    _check_tensor(result, start, f"{fact.solver} returned")
    assert torch.equal(latents, start), f"{fact.solver} changed the latents that it was given; compute new ones"
    assert levels, f"{fact.solver} never called velocity()"
    wrong = [level for level in levels if not any(abs(level - own) < 1e-6 for own in LEVELS[:-1])]
    assert not wrong, (
        f"{fact.solver} called velocity() at {wrong[0]:.4g}; expected levels of the schedule above 0, "
        f"{', '.join(map(str, LEVELS[:-1]))}, by which pipelines choose their network"
    )
    most = fact.evaluations_per_step * steps
    assert len(levels) <= most, (
        f"{fact.solver} called velocity() {len(levels)} times in {steps} steps; evaluations_per_step="
        f"{fact.evaluations_per_step} allows {most}. Declare more"
    )
    assert fact.uses_noise or not calls["noise"], f"{fact.solver} called noise(); declare uses_noise=True"
    assert seen == list(range(steps)), (
        f"{fact.solver} called on_step() with {seen}; expected {list(range(steps))}, once after each step"
    )
    assert calls["progress"], f"{fact.solver} did not iterate over progress(steps)"
    error = (result - x0).abs().max().item()
    assert error <= 1e-3, (
        f"{fact.solver} ends {error:.2g} from the data; expected at most 0.001. velocity() is noise - data, and a step "
        f"is latents + velocity * (sigma_next - sigma)"
    )


def _check_tensor(found: Any, like: torch.Tensor, what: str) -> None:
    import torch

    expected = f"expected a finite fp32 tensor {tuple(like.shape)}"
    assert isinstance(found, torch.Tensor), f"{what} {shown(found)}; {expected}"
    assert (found.shape, found.dtype) == (like.shape, like.dtype), (
        f"{what} {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}; {expected}"
    )
    assert torch.isfinite(found).all(), f"{what} NaN or infinity; {expected}"


def _combines(fact: GuidanceSpec) -> None:
    """Raise AssertionError unless the guidance makes a velocity of the predictions of its branches.

    Raises:
        Unavailable: it has settings without defaults, so that it cannot be made here.
    """
    import torch

    from diffsynth.runtime.guidance import Guidance, GuidanceStep

    kind: type[Guidance] = resolve(fact.guidance)
    needed = [one.name for one in fields(kind) if one.init and one.default is one.default_factory is MISSING]
    if needed:
        raise Unavailable(f"{fact.guidance} needs {', '.join(needed)}, which have no defaults")
    guidance, generator, state = kind(), torch.Generator().manual_seed(0), {}
    reason = guidance.refuses(4)
    assert reason is None or (isinstance(reason, str) and reason), (
        f"refuses() of {fact.guidance} returned {shown(reason)}; expected a reason as str, or None"
    )
    assert isinstance(guidance.is_off(1.0), bool), f"is_off() of {fact.guidance} returned {shown(guidance.is_off(1.0))}"
    for index, level in enumerate(LEVELS[:-1]):
        latents = torch.randn(2, 16, 4, 6, generator=generator)
        predictions = {branch: torch.randn(2, 16, 4, 6, generator=generator) for branch in guidance.branches}
        given = {branch: each.clone() for branch, each in predictions.items()}
        step = GuidanceStep(latents, torch.full((2,), level), index, len(LEVELS) - 1, True, state)
        _check_tensor(guidance.combine(predictions, 3.0, step), latents, f"combine() of {fact.guidance} returned")
        changed = [branch for branch in given if not torch.equal(given[branch], predictions[branch])]
        assert not changed, f"combine() of {fact.guidance} changed predictions[{changed[0]!r}]; compute a new tensor"


def _writes(fact: WriterSpec) -> None:
    """Raise AssertionError unless the writer takes a path and a record, writes a small result of its kind, and refuses
    what it cannot write; results of other kinds than core's are not made here.
    """
    from diffsynth.runtime.writers import FOLDER

    writer, is_folder = resolve(fact.writer), fact.suffix == FOLDER
    settings = {"fps": 8.0} if fact.kind == "video" and not is_folder else {}
    try:
        inspect.signature(writer).bind(None, Path(), record={}, **settings)
    except TypeError as error:
        raise AssertionError(
            f"{fact.writer} cannot be called as f(output, path, record=...{', fps=...' if settings else ''}): {error}"
        ) from None
    if fact.kind not in _RESULTS:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("result" if is_folder else f"result{fact.suffix}")
        writer(_RESULTS[fact.kind](), path, record={"prompt": "a red apple"}, **settings)
        assert path.exists(), f"{fact.writer} wrote no file {path.name}"
        try:
            writer(object(), Path(folder) / f"other{fact.suffix}", record={}, **settings)
        except (TypeError, ValueError):
            return
    raise AssertionError(f"{fact.writer} accepted a result that is no {fact.kind}; expected TypeError or ValueError")


def _image() -> Any:
    from PIL import Image

    return Image.new("RGB", (32, 16), "red")


def _sound() -> Any:
    import torch

    from diffsynth.core.data.audio import Audio

    return Audio(torch.zeros(1, 800), 8000)


def _tensors() -> Any:
    import torch

    return {"values": torch.zeros(2, 3)}


_RESULTS = {"image": _image, "video": lambda: [_image(), _image()], "audio": _sound, "tensors": _tensors}
"""Kind of result -> function that makes a small one."""


def _has_loss(fact: ObjectiveSpec) -> None:
    kind = resolve(fact.objective)
    missing = [name for name in ("units", "loss") if not callable(getattr(kind, name, None))]
    assert not missing, f"{fact.objective} has no {missing[0]}(); see diffsynth_train.objectives.base.Objective"


def _has_schedule(fact: TrainingSpec) -> None:
    import torch

    sigmas = resolve(fact.schedule)(8)
    fits = isinstance(sigmas, torch.Tensor) and sigmas.is_floating_point() and sigmas.ndim == 1
    assert fits, f"{fact.schedule} returned {shown(sigmas)} for 8 steps; expected a floating-point tensor of one axis"
    falls = len(sigmas) == 9 and bool((sigmas[1:] < sigmas[:-1]).all()) and sigmas[-1] >= 0 and sigmas[0] <= 1
    assert falls, (
        f"{fact.schedule} returned {[round(level, 4) for level in sigmas.tolist()]} for 8 steps; expected 9 levels in "
        f"[0, 1] that descend strictly"
    )


def _sets_arguments(fact: LoRASpec) -> None:
    arguments = resolve(fact.pipeline).call_signature().parameters
    for name in fact.defaults:
        assert name in arguments, (
            f"default {name!r} is not an argument of {fact.pipeline}{did_you_mean(name, arguments)}"
        )


def _has_known_sources(fact: ModelSpec) -> None:
    """Raise AssertionError if a component or processor has a scheme that no installed plugin resolves."""
    for role, text in (*fact.components.items(), *fact.processors.items()):
        scheme = parse_source(text).scheme
        assert scheme in ("", "package") or _discovery.implements("resolve_source"), (
            f"{role}: {text}: no installed plugin resolves {scheme}://; implement the hook resolve_source"
        )
