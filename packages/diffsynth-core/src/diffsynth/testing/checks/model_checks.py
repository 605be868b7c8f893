"""Checks of a model with tiny components. Each function raises AssertionError if the model does not pass."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from torch import Tensor

from diffsynth.core.lora.format import to_state_dict
from diffsynth.core.planning.workload import GIB
from diffsynth.errors import Cancelled, MissingComponent
from diffsynth.runtime.architectures import architecture_of
from diffsynth.runtime.request import Step
from diffsynth.testing.checks.lora import random_lora
from diffsynth.testing.checks.records import is_equal, result_faults, schema_refusal, several_faults, step_faults
from diffsynth.testing.checks.tiny_model import STEPS, TinyModel

_PATIENCE = 1.0
"""Seconds that one of two calls waits for the other to reach the same step."""

_UNKNOWN = "no_such_argument"

_WRONG: tuple[Any, ...] = ("no such value", 0.5, {"no such field": 0}, [[[]]])
"""Values of which a schema refuses at least one, unless it accepts everything."""


def is_loaded(model: TinyModel) -> None:
    """Do nothing: the model was loaded to be passed here."""


def can_be_called(model: TinyModel) -> None:
    """Make the first call of a model; its exceptions are those of the check."""
    model.first  # noqa: B018 - the call is made when it is first needed


def has_correct_velocity(model: TinyModel) -> None:
    """Raise AssertionError if `velocity()` got wrong noise levels, or returned values that are not finite or not in the
    shape of the latents.
    """
    _assert_none(model.first.velocity_faults)


def has_correct_steps(model: TinyModel) -> None:
    """Raise AssertionError unless the call made the steps that it was asked for, from a noise level of at most 1 down
    to 0, with finite fp32 latents.
    """
    if model.pipe.has_loop():
        _assert_none(step_faults(model.first.steps, num_steps=STEPS))


def has_correct_result(model: TinyModel) -> None:
    """Raise AssertionError unless the result is finite and, if it is an image or a video, of the size asked for."""
    _assert_none(result_faults(model.first.output, model.first.size, kind=model.kind))


def makes_several(model: TinyModel) -> None:
    """Raise AssertionError unless a call for two images of another size returns a list of two of that size."""
    call = model.call(model.second_size, num_images=2, output_type="pil")
    if model.pipe.has_loop():
        _assert_none([*call.velocity_faults, *step_faults(call.steps, num_steps=STEPS, batch=2)])
    _assert_none(several_faults(call.output, call.size, kind=model.kind, batch=2))


def depends_on_seed(model: TinyModel) -> None:
    """Raise AssertionError if two calls with one seed differ, or two seeds give equal results; a pipeline without a
    unit that is declared `random=True` must give equal ones.
    """
    first, again = model.first_sample, model.sample
    assert is_equal(first, again), (
        "two calls with one seed give different results; is there a random number that does not come from `seeds`, or "
        "a value that is kept from the call before?"
    )
    other = model.sample_of_another_seed
    random = [step.name for step in model.pipe.program.units if step.random]
    if random:
        assert not is_equal(other, again), (
            f"two seeds give equal results, although {', '.join(random)} is declared random=True; use `seeds`"
        )
    else:
        assert is_equal(other, again), "two seeds give different results; declare the unit that draws random=True"


def has_neutral_defaults(model: TinyModel) -> None:
    """Raise AssertionError if a call that passes each default gives another result than one that leaves them out."""
    given = model.arguments(model.first.size, output_type="")
    parameters = model.pipe.__signature__.parameters.values()
    found = model.sample_of(**{each.name: each.default for each in parameters if each.name not in given})
    assert is_equal(found, model.sample), "a call that passes every default gives another result than without"


def can_be_cancelled(model: TinyModel) -> None:
    """Raise AssertionError unless a call whose `cancel` is set in step 0, or before a call without a loop, raises
    `Cancelled` before step 1.
    """
    stop, steps = threading.Event(), []

    def on_step(step: Step) -> None:
        steps.append(step.index)
        stop.set()

    if not model.pipe.has_loop():
        stop.set()
    try:
        model.sample_of(cancel=stop, **({"on_step": on_step} if model.pipe.has_loop() else {}))
    except Cancelled:
        assert steps in ([], [0]), f"cancel was set in step 0, and the steps {steps} ran"
    else:
        raise AssertionError("cancel was set, and the call returned a result; expected Cancelled")


def supports_threads(model: TinyModel) -> None:
    """Raise AssertionError unless two calls, each of which waits for the other after every step if there is a loop,
    give the results that they give alone.
    """
    together = threading.Barrier(2)

    def on_step(step: Step) -> None:
        with suppress(threading.BrokenBarrierError):  # the other call is over, or waits for a lock of this one
            together.wait(timeout=_PATIENCE)

    alone = [model.sample, model.sample_of_another_seed]
    waiting = {"on_step": on_step} if model.pipe.has_loop() else {}
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda seed: model.sample_of(seed=seed, **waiting), (0, 1)))
    changed = [seed for seed in (0, 1) if not is_equal(found[seed], alone[seed])]
    assert not changed, (
        "two calls at the same time give other results than one after the other; keep the state of a call in the "
        "values of its units, not in an attribute of the pipeline or of a module"
    )


def can_be_planned(model: TinyModel) -> None:
    """Raise AssertionError unless a call can be planned for an accelerator."""
    names = [stage.name for stage in model.plan.stages]
    assert model.plan.loop or not model.pipe.has_loop(), f"the plan has no stage of the loop, only {', '.join(names)}"


def can_be_planned_with_the_smallest_limit(model: TinyModel) -> None:
    """Raise AssertionError unless a call can be planned with the smallest limit on device memory, and the plan keeps
    it.
    """
    plan = model.plan
    limited = model.plan_of(vram_limit=plan.smallest_vram / GIB)
    assert limited.peak_vram <= plan.smallest_vram, (
        f"planned for {plan.smallest_vram} bytes, the plan takes {limited.peak_vram}"
    )


def is_equal_offloaded(model: TinyModel) -> None:
    """Raise AssertionError unless the model, loaded under a memory policy and with a limit, gives the same bits."""
    pipe = model.load(policy="cpu-offload", vram_limit=1.0)
    found = model.call(model.first.size, pipe=pipe, output_type="tensor").output
    assert is_equal(found, model.first.output), "under the policy 'cpu-offload' the result differs"


def supports_loras(model: TinyModel) -> None:
    """Raise AssertionError unless a LoRA of each network of the loop changes the latents, and neither a strength of 0
    nor a LoRA that was removed does.
    """
    pipe, loras = model.pipe, {}
    for role in pipe.all_loop_roles if pipe.has_loop() else ():
        module = pipe.parts[role]
        architecture = None if module is None else architecture_of(module)
        if architecture is not None and architecture.lora_targets:
            loras[role] = to_state_dict(random_lora(module, architecture.lora_targets))
    if not loras:
        return
    for role, weights in loras.items():
        pipe.load_lora(pipe.parts[role], state_dict=weights, alpha=0.0, hotload=True, verbose=0)
    assert is_equal(model.sample_of(), model.sample), "a LoRA with alpha=0 changes the result"
    pipe.clear_lora()
    for role, weights in loras.items():
        pipe.load_lora(pipe.parts[role], state_dict=weights, hotload=True, verbose=0)
        changed = model.sample_of()
        pipe.clear_lora()
        assert not is_equal(changed, model.sample), (
            f"a LoRA of {role} changes nothing; does velocity() call this network?"
        )
    assert is_equal(model.sample_of(), model.sample), "the LoRAs were removed, and the result differs"


def refuses_wrong_arguments(model: TinyModel) -> None:
    """Raise AssertionError unless the call refuses an unknown argument and, for each argument, a value of a wrong type,
    before `velocity()` runs.
    """
    schema = model.pipe.schema()
    wrong = {name: value for name in schema["properties"] if (value := _wrong_value(schema, name)) is not None}
    faults = [_fault_of(model, name, value) for name, value in {_UNKNOWN: 1, **wrong}.items()]
    _assert_none(fault for fault in faults if fault is not None)


def _wrong_value(schema: Mapping[str, Any], name: str) -> Any:
    """Return a value that the schema of an argument refuses; None if it refuses none that is tried."""
    return next((value for value in _WRONG if schema_refusal(schema, name, value) is not None), None)


def _fault_of(model: TinyModel, name: str, value: Any) -> str | None:
    """Return what is wrong with how a call treats a wrong value, as a text; None if it refuses the value."""

    class Reached(Exception):
        """The loop began."""

    def velocity(*latents_and_sigma: Tensor, **conditions: Any) -> Tensor:
        raise Reached

    pipe, refused = model.pipe, (TypeError, ValueError, MissingComponent)
    call = model.arguments(model.first.size, **{name: value})
    vars(pipe)["velocity"] = velocity
    try:
        pipe(**call)
    except refused:
        return None
    except Reached:
        return f"{name}={value!r} is accepted and the loop begins; expected TypeError or ValueError"
    except Exception as error:
        return f"{name}={value!r} raises {type(error).__name__}: {error!s:.80}; expected TypeError or ValueError"
    finally:
        del vars(pipe)["velocity"]
    return f"{name}={value!r} is accepted; expected TypeError or ValueError"


def _assert_none(faults: Iterable[str]) -> None:
    found = list(faults)
    assert not found, "; ".join(found)
