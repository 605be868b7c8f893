"""Results of calls together with the records of how they were made: what `pipe(..., return_record=True)` returns."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffsynth import provenance
from diffsynth.runtime.request import Request


@dataclass(frozen=True)
class RecordedOutput:
    """The output of a call, with what it takes to generate it again.

    Args:
        output: what the call returns without `return_record`; not a copy.
        seeds: one for each result, also those that were random: integers from 0 to 2**64 - 1.
        record: of the call, as `provenance.record` makes it and `provenance.save_png` stores it.
        results: one `RecordedOutput` for each result of the call, whose record gives this result alone, in the order of
            the seeds; one of the whole output if it cannot be separated. Empty in a `RecordedOutput` of one result.
    """

    output: Any = field(repr=False)
    seeds: tuple[int, ...]
    record: Mapping[str, Any] = field(repr=False)
    results: tuple[RecordedOutput, ...] = field(default=(), repr=False)


def with_drawn_seed(pipe: Any, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the arguments of a call, with a random seed if it is to be recorded and has none.

    Args:
        pipe: the pipeline, whose processes use one seed.
        arguments: of the call.
    """
    parameters = pipe.__signature__.parameters
    is_recorded, seed = (
        arguments[name] if name in arguments else parameters[name].default for name in ("return_record", "seed")
    )
    if not is_recorded or seed is not None:
        return arguments
    (drawn,) = pipe.mesh.broadcast_seeds([draw_seed()])
    return {**arguments, "seed": drawn}


def draw_seed() -> int:
    """Return a random seed: an integer from 0 to 2**31 - 1, which every generator reads in full."""
    return secrets.randbelow(2**31)


def recorded(pipe: Any, request: Request, arguments: Mapping[str, Any], output: Any) -> RecordedOutput:
    """Return the `RecordedOutput` of a call that has seeds.

    Args:
        pipe: the pipeline that was called.
        request: the checked call.
        arguments: of the call, with its seed.
        output: what the call returns.
    """
    seeds = tuple(seed for seed in request.seeds if seed is not None)
    record = provenance.record(pipe, arguments)
    if request.single:
        separate = [output]
    elif isinstance(output, list | tuple | Tensor) and len(output) == request.batch_size:
        separate = list(output)
    else:
        return RecordedOutput(output, seeds, record, (RecordedOutput(output, seeds, record),))
    results = tuple(
        RecordedOutput(
            one, seeds[index : index + 1], _of_result(record, index, request.loop.num_images, pipe.per_image)
        )
        for index, one in enumerate(separate)
    )
    return RecordedOutput(output, seeds, record, results)


def _of_result(record: Mapping[str, Any], index: int, per_entry: int, per_image: Sequence[str]) -> dict[str, Any]:
    """Return the record of result `index` of a call alone: no num_images, seed `seed + index` or that item of a list,
    and of a list of prompts or of another argument in `per_image` the entry that it belongs to; `per_entry` results
    belong to each.
    """

    def single(values: Mapping[str, Any]) -> dict[str, Any]:
        found = {name: value for name, value in values.items() if name != "num_images"}
        for name in per_image:
            if isinstance(found.get(name), list | tuple):
                found[name] = found[name][index // per_entry]
        return found

    seed = record["seed"]
    own = {"seed": seed[index] if isinstance(seed, list | tuple) else seed + index}
    return {**single(record), **own, "arguments": single(record["arguments"])}
