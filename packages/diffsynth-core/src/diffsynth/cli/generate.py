"""`diffsynth generate`: a prompt in, pictures or a video out, each with the record of what made it."""

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
"""Of a model that says nothing of its own."""

_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")

_OPTIONS = (
    click.option("--seed", type=int, help="Of the initial noise; drawn and recorded when left out."),
    click.option("--steps", "num_inference_steps", type=int, help="Denoising steps."),
    click.option("--height", type=int, help="In pixels."),
    click.option("--width", type=int, help="In pixels."),
    click.option("--negative-prompt", help="What to draw away from; needs --cfg-scale other than 1."),
    click.option("--cfg-scale", type=float, help="Weight of classifier-free guidance; 1 is off."),
    click.option("--num-images", type=int, help="Several results go to OUT-1.png, OUT-2.png, ..."),
    click.option("--fps", type=float, help="Frames per second of a video; the model's own when left out."),
    click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other argument; may be repeated."),
    click.option("--device", help="cuda, cuda:1, cpu, ...; the first accelerator when left out."),
    click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of weights and activations."),
    click.option("--vram", "vram_limit", type=float, metavar="GIB", help="Keep the call within so much of the device."),
    click.option("--policy", type=click.Choice(POLICIES), help="Where weights wait; with --vram it is dynamic."),
    click.option("-v", "--verbose", is_flag=True, help="Say what moving weights cost, on stderr."),
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
    help="A .png file; an .mp4 file where MODEL makes videos.",
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
    """Draw what PROMPT describes with MODEL (see `diffsynth list`) into OUT."""
    _check_out(model, out, fps)
    given = {name: value for name, value in options.items() if value is not None}
    memory = {name: given.pop(name) for name in ("vram_limit", "policy") if name in given}
    arguments = _merge({"prompt": prompt, **given}, _parse(settings))
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
        _save_pictures(pipe, arguments, result, out)


def _check_out(model: str, out: Path, fps: float | None) -> None:
    from diffsynth import registry

    record = registry.get(model)
    suffix, holds = (".mp4", "a video") if record.task.endswith("video") else (".png", "pictures")
    if out.suffix.lower() != suffix:
        raise UserError(
            f"OUT is {str(out)!r}, and {record.name} makes {holds}: expected a name that ends in {suffix}, which can "
            "carry its record"
        )
    if fps is not None and suffix == ".png":
        raise UserError(f"--fps {fps:g}: {record.name} makes pictures, which have no frames per second")
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
            raise UserError(f"--set {name}={value!r}: {name} is given twice")
        if name == "output_type" and value != "pil":
            raise UserError(
                f"--set output_type={value!r}: this command writes pictures or a video; use Python for {value}"
            )
        arguments[name] = value
    return arguments


def _check_names(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, pictures opened, once it is known that the model takes them; weights are not touched."""
    from diffsynth import registry
    from diffsynth.spec import resolve

    record = registry.get(model)  # a wrong name costs no import of torch
    from diffsynth.runtime.request import reject_unknown

    pipeline = resolve(record.pipeline)
    signature = pipeline.call_signature(record.defaults)
    try:
        reject_unknown(arguments, signature)
    except TypeError as error:  # from the command line it is the user's
        fail(click.get_current_context(), error)
    return _open_pictures(arguments, pipeline.schema()["properties"])


def _check_values(model: str, arguments: Mapping[str, Any]) -> None:
    """Loading takes minutes for a large model; what is wrong with the arguments is told before."""
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


def _open_pictures(arguments: dict[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Replace paths by pictures, and paths of videos by their frames, wherever the argument takes pictures."""
    takes = {name for name, schema in schemas.items() if '"x-diffsynth-type": "image"' in json.dumps(schema)}
    return {name: _opened(name, value) if name in takes else value for name, value in arguments.items()}


def _opened(name: str, value: Any) -> Any:
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, list | tuple):
        return [_opened(name, one) for one in value]
    if not isinstance(value, str):
        return value
    if Path(value).suffix.lower() in _VIDEOS:
        from diffsynth.core.data.media import VideoData

        return VideoData(value)
    try:
        with Image.open(value) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise UserError(f"--set {name}={value}: cannot be opened as a picture: {error}") from error


def _save_pictures(pipe: Any, arguments: Mapping[str, Any], result: Any, out: Path) -> None:
    from diffsynth import provenance

    images = result if isinstance(result, list) else [result]
    for index, (image, path) in enumerate(zip(images, _numbered(out, len(images)), strict=True)):
        provenance.save_png(image, path, provenance.record(pipe, _arguments_of_image(arguments, index)))
        click.echo(str(path))


def _save_videos(pipe: Any, arguments: Mapping[str, Any], result: Any, out: Path, fps: float) -> None:
    from diffsynth import provenance

    videos = result if isinstance(result[0], list) else [result]
    for index, (frames, path) in enumerate(zip(videos, _numbered(out, len(videos)), strict=True)):
        made_by = provenance.record(pipe, _arguments_of_image(arguments, index))
        provenance.save_video(frames, path, made_by, fps=fps)
        click.echo(str(path))


def _frame_rate(model: str) -> float:
    from diffsynth import registry

    return registry.get(model).fps or _FPS


def _numbered(out: Path, count: int) -> list[Path]:
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(1, count + 1)]


def _arguments_of_image(arguments: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The call that draws result `index` alone: number i of several has `seed + i`, or the i-th of a list."""
    alone = {name: value for name, value in arguments.items() if name != "num_images"}
    seed = alone["seed"]
    return alone | {"seed": seed[index] if isinstance(seed, list | tuple) else seed + index}
