"""`diffsynth generate`: run a model and write what it returns to a file, with a record of the call inside."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.arguments import call_arguments, component_option, given_components, set_option
from diffsynth.cli.output import POLICIES, UserError, echo, fail, traceback_option
from diffsynth.errors import printable
from diffsynth.terminal import unescaped

if TYPE_CHECKING:
    import inspect

    from diffsynth.registry import ModelRecord
    from diffsynth.spec import WriterSpec

_FPS = 15
"""Frames per second of a video if the model declares no frame rate."""

_OPTIONS = (
    click.option("--seed", type=int, help="Seed of the initial noise; by default a random one, which is recorded."),
    click.option("--steps", "num_inference_steps", type=int, help="Number of denoising steps, at least 1."),
    click.option("--height", type=int, help="Height in pixels; rounded up to a multiple that the model supports."),
    click.option("--width", type=int, help="Width in pixels; rounded up to a multiple that the model supports."),
    click.option("--negative-prompt", help="Prompt to steer away from; needs a --cfg-scale other than 1."),
    click.option("--cfg-scale", type=float, help="Scale of classifier-free guidance; 1 is off."),
    click.option("--num-images", type=int, help="Number of results, at least 1; files OUT-1, OUT-2, ... if several."),
    set_option,
    component_option,
    click.option("--fps", type=float, help="Frames per second of a video, above 0; the model's own by default."),
    click.option("--sample-rate", type=int, metavar="HZ", help="Sample rate of sound, if the model states none."),
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
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="File to write; its suffix selects the format. With / at the end, a folder of frames.",
)
@_with_options
def generate(
    model: str,
    prompt: str | None,
    output: str,
    device: str | None,
    dtype: str | None,
    settings: tuple[str, ...],
    files: tuple[str, ...],
    verbose: bool,
    fps: float | None,
    sample_rate: int | None,
    **options: Any,
) -> None:
    """Run MODEL (see `diffsynth list`), with PROMPT if it takes one, and write what it returns to OUT."""
    from diffsynth import registry
    from diffsynth.runtime.writers import find_writer, load_writer

    record = registry.get(model)  # before importing torch, so that a wrong name or suffix fails at once
    out, writer = Path(output), find_writer(output)
    file_settings = _file_settings(record, out, writer.spec, {"fps": fps, "sample_rate": sample_rate})
    write = load_writer(writer)
    set_options = {name: value for name, value in options.items() if value is not None}
    memory: dict[str, Any] = {name: set_options.pop(name) for name in ("vram_limit", "policy") if name in set_options}
    from diffsynth.runtime.planning import check_before_loading

    components = given_components(record, files)
    arguments = _arguments(record, writer.spec, out, prompt, set_options, settings)
    count = check_before_loading(record, arguments, components=components)
    _check_outputs(out, writer.spec.suffix, count)
    pipe = _load(model, device, dtype, memory | ({"components": components} if components else {}), arguments)
    request = pipe.check(**arguments)
    _check_outputs(out, writer.spec.suffix, request.batch_size)
    made = pipe(**arguments, return_record=True)
    for role, report in pipe.transfers.items() if verbose else ():
        echo(f"{role}: {report.settle()}", err=True)
    for one, path in zip(made.results, _numbered(out, writer.spec.suffix, len(made.results)), strict=True):
        made_by = one.record
        files = (
            [(one.output, path, made_by)]
            if "fps" in file_settings
            else _images_of(one.output, path, writer.spec, made_by)
        )
        for image, file, its_record in files:
            try:
                write(image, file, record=its_record, **file_settings)
            except OSError as error:
                fail(click.get_current_context(), error)
            except (TypeError, ValueError) as error:
                fail(click.get_current_context(), _with_hint(error, writer.spec, made.record["seed"]))
            echo(str(file))


def _file_settings(
    record: ModelRecord, out: Path, spec: WriterSpec, given: Mapping[str, float | None]
) -> dict[str, Any]:
    """Return the settings of the writer as a dict; raise UserError or ValueError if OUT or an option does not fit the
    model.
    """
    from diffsynth.core.replacing import check_new_folder, check_writable
    from diffsynth.runtime.writers import FOLDER, check_kind, output_kind

    for name, kind in {"fps": "video", "sample_rate": "audio"}.items():
        value, option = given[name], f"--{name.replace('_', '-')}"
        if value is not None and kind not in (spec.kind, *spec.also):
            raise UserError(f"{option} {value:g} is for {kind}, and {spec.suffix} is for {spec.kind}; leave it out")
        if value is not None and not value > 0:
            raise UserError(f"{option} {value:g}: expected a positive number")
    if not out.parent.is_dir():
        raise UserError(f"OUT is {str(out)!r}: there is no folder {str(out.parent)!r}")
    (check_new_folder if spec.suffix == FOLDER else check_writable)(out)
    check_kind(out, spec, output_kind(record), name=record.name)
    is_video = "video" in (spec.kind, output_kind(record)) and spec.suffix != FOLDER
    default = {"fps": record.fps or _FPS} if is_video else {}
    return default | {name: value for name, value in given.items() if value is not None}


def _arguments(
    record: ModelRecord,
    spec: WriterSpec,
    out: Path,
    prompt: str | None,
    options: Mapping[str, Any],
    settings: tuple[str, ...],
) -> dict[str, Any]:
    """Return the arguments of the call as a dict, of known names and types."""
    from diffsynth.runtime.writers import TENSORS
    from diffsynth.spec import resolve

    parameters = resolve(record.pipeline).call_signature(record.defaults).parameters
    if prompt is not None:
        _check_prompt(record, prompt, parameters)
        options = {"prompt": prompt, **options}
    arguments = call_arguments(record, options, settings)
    if "output_type" in arguments and spec.kind != TENSORS:
        usual, value = parameters["output_type"].default, arguments["output_type"]
        if value != usual:
            raise UserError(
                f"--set output_type={value}: {spec.suffix} files ({spec.kind}) hold the output_type {usual}; "
                f"write tensors to {out.stem}.safetensors"
            )
    return arguments


def _check_prompt(record: ModelRecord, prompt: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    if "prompt" not in parameters:
        raise UserError(
            f"PROMPT is {prompt!r}, and {record.name} takes no prompt; leave it out. "
            f"It takes, by --set NAME=VALUE: {', '.join(parameters)}"
        )


def _load(
    model: str, device: str | None, dtype: str | None, memory: Mapping[str, Any], arguments: Mapping[str, Any]
) -> Any:
    from diffsynth import registry

    with _status(f"loading {registry.get(model).name}"):
        import torch

        import diffsynth
        from diffsynth.core.vram.policy import AUTO, Auto

        if memory.get("policy") == AUTO:
            memory = {**memory, "policy": Auto(arguments)}
        chosen: dict[str, Any] = {} if dtype is None else {"torch_dtype": getattr(torch, dtype)}
        return diffsynth.load(model, device=device, **chosen, **memory)


@contextmanager
def _status(text: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(file=unescaped(sys.stderr)).status(printable(text)):
        yield


def _images_of(
    one: Any, path: Path, spec: WriterSpec, record: Mapping[str, Any]
) -> list[tuple[Any, Path, Mapping[str, Any]]]:
    """Return a list of (output, file, record): one for each image of a result that is a list, such as the layers of an
    image, if the writer writes images; else one, of the result.
    """
    if spec.kind != "image" or not isinstance(one, list | tuple) or not one:
        return [(one, path, record)]
    files = _numbered(path, spec.suffix, len(one))
    numbered = enumerate(zip(one, files, strict=True), 1)
    return [(image, file, {**record, "image": number}) for number, (image, file) in numbered]


def _with_hint(error: Exception, spec: WriterSpec, seed: Any) -> ValueError:
    """Return the error of a writer that refuses a result, with the command that writes the same result as tensors."""
    from diffsynth.runtime.writers import TENSORS

    option = f" --seed {seed}" if isinstance(seed, int) else ""
    hint = "" if spec.kind == TENSORS else f". Tensors can be written with -o NAME.safetensors{option}"
    return ValueError(f"{error}{hint}")


def _numbered(out: Path, suffix: str, count: int) -> list[Path]:
    if count == 1:
        return [out]
    length = 0 if suffix == "/" else len(suffix)
    stem, end = out.name[: len(out.name) - length], out.name[len(out.name) - length :]
    return [out.with_name(f"{stem}-{index}{end}") for index in range(1, count + 1)]


def _check_outputs(out: Path, suffix: str, count: int | None) -> None:
    """Raise ValueError if a file of a call's results cannot be written; do nothing for a number that is not known."""
    from diffsynth.core.replacing import check_new_folder, check_writable

    for path in _numbered(out, suffix, count) if count is not None else []:
        (check_new_folder if suffix == "/" else check_writable)(path)
