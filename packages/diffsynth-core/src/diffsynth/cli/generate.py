"""`diffsynth generate`: generate images or videos from a prompt, each file with a record of the call."""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from diffsynth.cli.output import POLICIES, UserError, fail, traceback_option

_FPS = 15
"""Frames per second of a video if the model declares no frame rate."""

_VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")

_OPTIONS = (
    click.option("--seed", type=int, help="Seed of the initial noise; by default a random one, which is recorded."),
    click.option("--steps", "num_inference_steps", type=int, help="Number of denoising steps, at least 1."),
    click.option("--height", type=int, help="Height in pixels; rounded up to a multiple that the model supports."),
    click.option("--width", type=int, help="Width in pixels; rounded up to a multiple that the model supports."),
    click.option("--negative-prompt", help="Prompt to steer away from; needs a --cfg-scale other than 1."),
    click.option("--cfg-scale", type=float, help="Scale of classifier-free guidance; 1 is off."),
    click.option("--num-images", type=int, help="Number of results, at least 1; files OUT-1, OUT-2, ... if several."),
    click.option("--fps", type=float, help="Frames per second of a video, above 0; the model's own by default."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="NAME=VALUE",
        help="Set any other argument of the pipeline; may be repeated.",
    ),
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


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="File to write: .png, or .mp4 if MODEL generates videos.",
)
@_with_options
def generate(
    model: str,
    prompt: str,
    out: Path,
    device: str | None,
    dtype: str | None,
    settings: tuple[str, ...],
    fps: float | None,
    verbose: bool,
    **options: Any,
) -> None:
    """Generate an image or a video of PROMPT with MODEL (see `diffsynth list`) and write it to OUT."""
    _check_out(model, out, fps)
    set_options = {name: value for name, value in options.items() if value is not None}
    memory = {name: set_options.pop(name) for name in ("vram_limit", "policy") if name in set_options}
    arguments = _merge({"prompt": prompt, **set_options}, _parse(settings))
    arguments.setdefault("seed", secrets.randbelow(2**31))
    arguments = _check_names(model, arguments)
    _check_values(model, arguments)
    pipe = _load(model, device, dtype, memory, arguments)
    result = pipe(**arguments)
    for role, report in pipe.transfers.items() if verbose else ():
        click.echo(f"{role}: {report.settle()}", err=True)
    if out.suffix.lower() == ".mp4":
        _save_videos(pipe, arguments, result, out, fps or _frame_rate(model))
    else:
        _save_images(pipe, arguments, result, out)


def _check_out(model: str, out: Path, fps: float | None) -> None:
    from diffsynth import registry

    record = registry.get(model)
    suffix, result = (".mp4", "a video") if record.task.endswith("video") else (".png", "images")
    if out.suffix.lower() != suffix:
        raise UserError(
            f"OUT is {str(out)!r}, and {record.name} generates {result}: expected a name that ends in {suffix}, "
            "a format that holds the record of the call"
        )
    if fps is not None and suffix == ".png":
        raise UserError(f"--fps {fps:g}: {record.name} generates images, which have no frame rate")
    if fps is not None and not fps > 0:
        raise UserError(f"--fps {fps:g}: expected a positive number")
    if not out.parent.is_dir():
        raise UserError(f"OUT is {str(out)!r}: there is no folder {str(out.parent)!r}")


def _parse(settings: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--set {setting!r}: expected NAME=VALUE")
        try:
            yield name, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            yield name, text


def _merge(arguments: dict[str, Any], settings: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    for name, value in settings:
        if name in arguments:
            raise UserError(f"--set {name}={value!r}: {name} is set twice")
        if name == "output_type" and value != "pil":
            raise UserError(
                f"--set output_type={value!r}: this command writes images or videos; use Python for {value}"
            )
        arguments[name] = value
    return arguments


def _check_names(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `arguments` with images and videos opened; raise UserError for an argument that the model does not have.

    Loads no weights.
    """
    from diffsynth import registry
    from diffsynth.spec import resolve

    record = registry.get(model)  # before importing torch, so that a wrong name fails at once
    from diffsynth.runtime.request import reject_unknown

    pipeline = resolve(record.pipeline)
    signature = pipeline.call_signature(record.defaults)
    try:
        reject_unknown(arguments, signature)
    except TypeError as error:  # an argument from the command line is the user's error, not a fault of the program
        fail(click.get_current_context(), error)
    return _open_images(arguments, pipeline.schema()["properties"])


def _check_values(model: str, arguments: Mapping[str, Any]) -> None:
    """Raise the error that a call would raise for its argument values, before weights are loaded."""
    from diffsynth import registry
    from diffsynth.runtime.planning import check_before_loading

    check_before_loading(registry.get(model), arguments)


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
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _open_images(arguments: dict[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Return `arguments` with paths of images or videos, where these are taken, opened as PIL images or `VideoData`."""
    image_arguments = {name for name, schema in schemas.items() if '"x-diffsynth-type": "image"' in json.dumps(schema)}
    return {name: _opened(name, value) if name in image_arguments else value for name, value in arguments.items()}


def _opened(name: str, value: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, list | tuple):
        return [_opened(name, item) for item in value]
    if not isinstance(value, str):
        return value
    if Path(value).suffix.lower() in _VIDEO_SUFFIXES:
        from diffsynth.core.data.media import VideoData

        return VideoData(value)
    try:
        with Image.open(value) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--set {name}={value}: cannot be opened as an image: {error}") from error


def _save_images(pipe: Any, arguments: Mapping[str, Any], result: Any, out: Path) -> None:
    from diffsynth import provenance

    images = result if isinstance(result, list) else [result]
    for index, (image, path) in enumerate(zip(images, _numbered(out, len(images)), strict=True)):
        provenance.save_png(image, path, provenance.record(pipe, _arguments_of_result(arguments, index)))
        click.echo(str(path))


def _save_videos(pipe: Any, arguments: Mapping[str, Any], result: Any, out: Path, fps: float) -> None:
    from diffsynth import provenance

    videos = result if isinstance(result[0], list) else [result]
    for index, (frames, path) in enumerate(zip(videos, _numbered(out, len(videos)), strict=True)):
        record = provenance.record(pipe, _arguments_of_result(arguments, index))
        provenance.save_video(frames, path, record, fps=fps)
        click.echo(str(path))


def _frame_rate(model: str) -> float:
    from diffsynth import registry

    return registry.get(model).fps or _FPS


def _numbered(out: Path, count: int) -> list[Path]:
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]


def _arguments_of_result(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return `arguments` of result `index` alone: no num_images, and seed `seed + index`, or that item of a list."""
    single = {name: value for name, value in arguments.items() if name != "num_images"}
    seed = single["seed"]
    return single | {"seed": seed[index] if isinstance(seed, list | tuple) else seed + index}
