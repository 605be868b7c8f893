"""`diffsynth generate`: run a model and write what it returns to a file, with a record of the call inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.arguments import (
    call_arguments,
    component_option,
    given_components,
    given_loras,
    input_texts,
    set_option,
)
from diffsynth.cli.call import Call, run
from diffsynth.cli.completion import ModelName, complete_file
from diffsynth.cli.config_file import check_config, config_option, config_settings, without_set
from diffsynth.cli.output import POLICIES, UserError, echo, traceback_option
from diffsynth.cli.outputs import Outputs, find_outputs, output_options
from diffsynth.cli.trained import TrainedWeights, trained_weights

if TYPE_CHECKING:
    import inspect

    from diffsynth.registry import ModelRecord

_OPTIONS = (
    click.option("--seed", type=int, help="Seed of the initial noise; by default a random one, which is recorded."),
    click.option("--steps", "num_inference_steps", type=int, help="Number of denoising steps, at least 1."),
    click.option("--height", type=int, help="Height in pixels; rounded up to a multiple that the model supports."),
    click.option("--width", type=int, help="Width in pixels; rounded up to a multiple that the model supports."),
    click.option("--negative-prompt", help="Prompt to steer away from; needs a --cfg-scale other than 1."),
    click.option("--cfg-scale", type=float, help="Scale of classifier-free guidance; 1 is off."),
    click.option("--num-images", type=int, help="Number of results, at least 1; files OUT-1, OUT-2, ... if several."),
    set_option,
    click.option(
        "--lora",
        "loras",
        multiple=True,
        metavar="FILE[:SCALE]",
        shell_complete=complete_file,
        help="LoRA, with a strength of 1 by default; may be repeated.",
    ),
    click.option(
        "--weights",
        type=click.Path(path_type=Path),
        metavar="FOLDER|FILE",
        help="Weights of a run of `diffsynth train`, in place of the model's, with their size by default.",
    ),
    component_option,
    config_option,
    output_options,
    click.option("--device", help="Device to compute on: cuda, cuda:1, cpu, ...; the first accelerator by default."),
    click.option(
        "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Dtype of weights and activations."
    ),
    click.option("--vram", "vram_limit", type=float, metavar="GIB", help="Limit of the device memory used, in GiB."),
    click.option(
        "--policy", type=click.Choice(POLICIES), help="Where weights are stored between uses; dynamic with --vram."
    ),
    click.option("-v", "--verbose", is_flag=True, help="Print the transfer statistics of weights on stderr."),
    traceback_option,
)


def _with_options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


class _Generate(click.Command):
    """The command, whose help lists the suffixes that installed writers have."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the suffixes, with the kind and the description of each, into the help text."""
        from diffsynth.runtime.writers import declared_writers

        specs = {suffix: one.spec for suffix, one in declared_writers().items()}
        with formatter.section("Suffixes of OUT"):
            formatter.write_dl(
                [(name, f"{one.kind}: {one.description}".removesuffix(": ")) for name, one in specs.items()]
            )


@click.command(cls=_Generate)
@click.argument("model", type=ModelName())
@click.argument("prompt", required=False)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    shell_complete=complete_file,
    help="File to write; its suffix selects the format. With / at the end, a folder of frames.",
)
@_with_options
@click.pass_context
def generate(
    ctx: click.Context,
    model: str,
    prompt: str | None,
    output: str,
    settings: tuple[str, ...],
    files: tuple[str, ...],
    loras: tuple[str, ...],
    weights: Path | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Run MODEL (see `diffsynth list`), with PROMPT if it takes one, and write what it returns to OUT."""
    from diffsynth import registry
    from diffsynth.spec import resolve

    record = registry.get(model)  # before importing torch, so that a wrong name or suffix fails at once
    outputs = find_outputs(record, output, _taken(options, "fps", "quality", "sample_rate", "grid"))
    loading = _given(_taken(options, "device", "dtype", "vram_limit", "policy"))
    pipeline = resolve(record.pipeline)
    check_config(ctx, pipeline.call_signature(record.defaults).parameters, pipeline.other_arguments)
    trained = None if weights is None else trained_weights(record, weights)
    arguments = _arguments(
        record,
        outputs,
        prompt,
        without_set(ctx, _given(options), settings),
        config_settings(ctx, settings),
        {} if trained is None else trained.size,
    )
    inputs = input_texts(arguments, config_settings(ctx, settings))
    components = given_components(record, _files(trained, files))
    if trained is not None:
        echo(trained, err=True)
    call = Call(model, record, arguments, components, given_loras(loras), loading, inputs)
    results, whole = run(call, outputs, verbose=verbose)
    outputs.write_all(results, whole)


def _arguments(
    record: ModelRecord,
    outputs: Outputs,
    prompt: str | None,
    options: Mapping[str, Any],
    settings: Sequence[str],
    defaults: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the arguments of the call as a dict, of known names and types.

    Args:
        record: of the model.
        outputs: the files.
        prompt: PROMPT.
        options: argument -> value of the command's own options.
        settings: texts of `--set`.
        defaults: argument -> value that neither options nor settings give, of those that the pipeline takes.
    """
    from diffsynth.runtime.writers import TENSORS
    from diffsynth.spec import resolve

    parameters = resolve(record.pipeline).call_signature(record.defaults).parameters
    if prompt is not None:
        _check_prompt(record, prompt, parameters)
        options = {"prompt": prompt, **options}
    arguments = call_arguments(record, options, settings)
    if "output_type" in arguments and outputs.spec.kind != TENSORS:
        usual, value = parameters["output_type"].default, arguments["output_type"]
        if value != usual:
            raise UserError(
                f"--set output_type={value}: {outputs.spec.suffix} files ({outputs.spec.kind}) hold the output_type "
                f"{usual}; write tensors to {outputs.path.stem}.safetensors"
            )
    return {**{name: value for name, value in defaults.items() if name in parameters}, **arguments}


def _check_prompt(record: ModelRecord, prompt: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    if "prompt" not in parameters:
        raise UserError(
            f"PROMPT is {prompt!r}, and {record.name} takes no prompt; leave it out. "
            f"It takes, by --set NAME=VALUE: {', '.join(parameters)}"
        )


def _files(trained: TrainedWeights | None, files: Sequence[str]) -> list[str]:
    """Return a list of the texts ROLE=FILE of trained weights and of `--component`, which has precedence."""
    given = {text.partition("=")[0] for text in files}
    own = {} if trained is None else trained.components
    return [*(f"{role}={file}" for role, file in own.items() if role not in given), *files]


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return a dict of some options, which are taken out of `options`."""
    return {name: options.pop(name) for name in names}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
