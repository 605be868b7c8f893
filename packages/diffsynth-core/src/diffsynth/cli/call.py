"""A call of a model as a command describes it: checked before the model is loaded, made, and recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffsynth.cli.arguments import GivenLoRA
from diffsynth.cli.output import echo
from diffsynth.cli.outputs import Outputs
from diffsynth.cli.progress import progress_line

if TYPE_CHECKING:
    from diffsynth.registry import ModelRecord


@dataclass(frozen=True)
class Call:
    """A call of a model, as a command describes it.

    Args:
        model: as it was given.
        record: of the model.
        arguments: of the call.
        components: role -> `ModelConfig` in place of the model's own.
        loras: in the order of loading.
        loading: device, dtype, vram_limit and policy, those that are given.
        inputs: argument -> text of those that are images or videos, such as a path.
    """

    model: str
    record: ModelRecord
    arguments: Mapping[str, Any]
    components: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[GivenLoRA] = ()
    loading: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def note(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record of the call with what only the command knows: files of inputs and components, and options of
        loading.

        Args:
            record: of `provenance.record`.
        """
        from diffsynth import provenance

        notes = {
            "inputs": provenance.input_files(self.inputs),
            "components": {role: str(config) for role, config in self.components.items()},
            "loading": {name: self.loading[name] for name in ("vram_limit", "policy") if name in self.loading},
        }
        not_recorded = [name for name in record["not_recorded"] if name not in self.inputs]
        return {**record, "not_recorded": not_recorded, **{name: value for name, value in notes.items() if value}}


def run(
    call: Call, outputs: Outputs, *, verbose: bool = False
) -> tuple[list[tuple[Any, dict[str, Any]]], dict[str, Any]]:
    """Check a call, load its model and make the call; return (output, record) of each result, and the record of the
    whole call. Of several results each record has the number of the result, from 1, and what differs in the whole call.

    Args:
        call: the call.
        outputs: the files that are meant for the results.
        verbose: print the transfer statistics of weights on stderr.
    """
    from diffsynth.runtime.planning import check_before_loading
    from diffsynth.runtime.progress import no_progress
    from diffsynth.runtime.writers import check_alpha

    def prepare(pipe: Any) -> None:
        check_alpha(outputs.path, outputs.spec, pipe)
        for lora in call.loras:
            lora.check(pipe)

    count = check_before_loading(call.record, call.arguments, components=call.components, prepare=prepare)
    outputs.check(count)
    pipe = load(call)
    check_alpha(outputs.path, outputs.spec, pipe)
    request = pipe.check(**call.arguments)
    outputs.check(request.batch_size)
    with progress_line(f"running {call.record.name}") as show:
        # One line for all stages takes the place of the bar of the loop.
        shown = {} if show is None else {"on_progress": show, "progress_bar_cmd": no_progress}
        made = pipe(**call.arguments, **shown, return_record=True)
    for role, report in pipe.transfers.items() if verbose else ():
        echo(f"{role}: {report.settle()}", err=True)
    total = len(made.results)
    results = [
        (one.output, call.note(_numbered(one.record, made.record, number, total)))
        for number, one in enumerate(made.results, 1)
    ]
    return results, call.note(made.record)


def _numbered(record: Mapping[str, Any], whole: Mapping[str, Any], number: int, count: int) -> dict[str, Any]:
    """Return the record of a result, with its number and the arguments of the whole call that differ from its own."""
    from diffsynth.provenance import recorded_arguments

    if count == 1:
        return dict(record)
    own = recorded_arguments(record)
    others = {name: value for name, value in recorded_arguments(whole).items() if (name, value) not in own.items()}
    return {**record, "result": number, "call": others}


def load(call: Call) -> Any:
    """Return the `Pipeline` of a call, with its LoRAs.

    Args:
        call: the call.
    """
    with progress_line(f"loading {call.record.name}") as show:
        import torch

        import diffsynth
        from diffsynth.core.vram.policy import AUTO, Auto

        options = {"device": None, **call.loading}
        if (dtype := options.pop("dtype", None)) is not None:
            options["torch_dtype"] = getattr(torch, dtype)
        if options.get("policy") == AUTO:
            options["policy"] = Auto(call.arguments)
        if call.components:
            options["components"] = call.components
        if show is not None:
            options["on_progress"] = show
        pipe = diffsynth.load(call.model, **options)
        for lora in call.loras:
            lora.load_into(pipe)
        return pipe
