"""Records of how a result was made: call, versions and weights, stored inside the result's file and read from it."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth import _discovery
from diffsynth.core.paths import expanded
from diffsynth.core.quant.modules import quantization_of
from diffsynth.core.replacing import replacing, replacing_folder
from diffsynth.errors import shown
from diffsynth.runtime.parameters_text import parameters_text
from diffsynth.runtime.request import HOST_ARGUMENTS
from diffsynth.runtime.taking_part import plugins_of_call
from diffsynth.runtime.unit import equals_default

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

KEY = "diffsynth"
"""The name of the record, which is JSON in UTF-8: of a text chunk of a PNG, of an entry in the metadata of safetensors,
of the only key of the JSON object in the comment of a JPEG, WebP, GIF, video or WAV file."""

_ALWAYS = ("prompt", "seed", "num_inference_steps", "cfg_scale", "solver")
"""The arguments that a record has also where they equal the defaults."""

IMAGES = (".jpg", ".jpeg", ".webp", ".gif")
"""Suffixes of images with a record in a comment."""


def record(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict of JSON values that records a call: model, pipeline, arguments unless they equal the defaults,
    device, dtype, versions, and the identities of weight and LoRA files.

    Args:
        pipe: the pipeline that made it.
        arguments: of the call; those equal to the pipeline's defaults are left out, except prompt, seed, steps, scale
            of guidance and solver, and so are those without effect, such as a negative prompt where guidance is off,
            and those that only watch the call, such as `on_step`. The defaults that loaded LoRAs set are recorded as if
            they were given.

    Returns:
        model, pipeline, prompt, seed, num_inference_steps, cfg_scale and solver (those that it takes), arguments,
        not_recorded (names of arguments such as images, which JSON cannot hold), device, hardware (the name of the
        device's), dtype, versions, plugins (distribution -> version of each that took part, see
        `diffsynth.runtime.taking_part`), weights (role -> file name -> identity of its content), and if any are loaded,
        loras (role, alpha, hot, files likewise, their paths, and the defaults of calls that it sets), and quantization
        (role -> method -> number of layers).
    """
    from diffsynth.core.device import card_name

    if not isinstance(arguments, Mapping):
        raise TypeError(f"arguments={shown(arguments)}: expected a dict argument -> value")
    defaults = {name: parameter.default for name, parameter in inspect.signature(pipe).parameters.items()}
    always: dict[str, Any] = {name: arguments.get(name, defaults[name]) for name in _ALWAYS if name in defaults}
    unused = pipe.arguments_without_effect(**arguments)
    set_by_loras = pipe.lora_call_defaults  # without the LoRA the call has others, so they are recorded
    others = {
        name: value
        for name, value in {**set_by_loras, **arguments}.items()
        if name not in (*always, *unused, *HOST_ARGUMENTS)
        and (name in set_by_loras or not equals_default(value, defaults[name]))
    }
    return {
        "model": pipe.model_name,
        "pipeline": f"{type(pipe).__module__}:{type(pipe).__qualname__}",
        **always,
        "arguments": {name: value for name, value in others.items() if _is_json(value)},
        "not_recorded": sorted(name for name, value in others.items() if not _is_json(value)),
        "device": str(pipe.device),
        "hardware": card_name(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": _versions(pipe),
        "plugins": plugins_of_call(pipe, arguments),
        "weights": {role: identities(paths) for role, paths in pipe.component_files.items()},
        **({"loras": [_lora(lora) for lora in pipe.loras]} if pipe.loras else {}),
        **({"quantization": quantized} if (quantized := _quantization(pipe)) else {}),
    }


def recorded_arguments(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict argument -> JSON value of the call that a record describes.

    Args:
        made_by: the record.
    """
    return {name: made_by[name] for name in _ALWAYS if name in made_by} | dict(made_by.get("arguments") or {})


def input_files(texts: Mapping[str, str]) -> dict[str, Any]:
    """Return what a record says of arguments that are files, under "inputs": argument -> its text as `value`, and as
    `files` the identities of the contents of the files that are named in it.

    Args:
        texts: argument -> path, or JSON or a Python literal with paths in it.

    Raises:
        OSError: a file cannot be read.
    """
    found = {name: [Path(each) for each in _strings_in(text) if _exists(each)] for name, text in texts.items()}
    return {
        name: {"value": texts[name], "files": {str(path): content_of(path) for path in paths}}
        for name, paths in found.items()
    }


def content_of(path: Path) -> Any:
    """Return the identity of a file's content, a text; of a folder a dict name -> identity of its files.

    Args:
        path: of the file or folder.

    Raises:
        OSError: a file cannot be read.
    """
    found = identities([path])
    return found if path.is_dir() else found[path.name]


def save_png(image: Image.Image, path: Path | str, made_by: Mapping[str, Any]) -> None:
    """Write `image` to the file `path` as PNG, with the record `made_by` as JSON text inside, and a text `parameters`
    in the form of A1111. An existing file is replaced in one step, so it is never half written.

    Raises:
        OSError: the folder does not exist or cannot be written.
        TypeError: `image` is no PIL image.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if not isinstance(image, Image.Image):
        raise TypeError(f"image={shown(image)}: expected a PIL image")
    text = PngInfo()
    text.add_itxt(KEY, _as_text(made_by))
    text.add_text("parameters", parameters_text(made_by, image.size))
    with replacing(expanded(path)) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=text)


def save_frames(frames: Sequence[Image.Image], folder: Path | str, made_by: Mapping[str, Any]) -> None:
    """Write `frames` to a new folder as `00000.png`, `00001.png`, ..., each with the record `made_by` and its number as
    `frame`, from 0. The folder appears when all are written.

    Raises:
        OSError: the folder exists and is not empty, or the one above it does not exist or cannot be written.
        TypeError: a frame is no PIL image.
    """
    with replacing_folder(expanded(folder)) as unfinished:
        for index, frame in enumerate(frames):
            save_png(frame, unfinished / f"{index:05}.png", {**made_by, "frame": index})


def save_jpeg(image: Image.Image, path: Path | str, made_by: Mapping[str, Any], *, quality: float = 95) -> None:
    """Write `image` to the file `path` as JPEG, with the record `made_by` as JSON in a comment (EXIF), and a text
    `parameters` in the form of A1111; see `diffsynth.core.data.image_writer.save_jpeg`.
    """
    from diffsynth.core.data import image_writer

    image_writer.save_jpeg(image, path, quality=quality, **_texts(made_by, image))


def save_webp(
    images: Sequence[Image.Image],
    path: Path | str,
    made_by: Mapping[str, Any],
    *,
    fps: float | None = None,
    quality: float = 95,
) -> None:
    """Write an image, or the frames of an animation, to the file `path` as WebP, with texts as `save_jpeg` has them;
    see `diffsynth.core.data.image_writer.save_webp`.
    """
    from diffsynth.core.data import image_writer

    image_writer.save_webp(images, path, fps=fps, quality=quality, **_texts(made_by, images[0]))


def save_gif(images: Sequence[Image.Image], path: Path | str, made_by: Mapping[str, Any], *, fps: float) -> None:
    """Write frames to the file `path` as a GIF animation, with the record `made_by` as JSON in its comment; see
    `diffsynth.core.data.image_writer.save_gif`.
    """
    from diffsynth.core.data import image_writer

    image_writer.save_gif(images, path, fps=fps, comment=_as_text({KEY: made_by}))


def save_video(
    frames: Sequence[Image.Image], path: Path | str, made_by: Mapping[str, Any], *, fps: float, quality: float = 9
) -> None:
    """Write `frames` to the file `path` as a video of `fps` frames per second, with the record `made_by` as JSON in the
    file's comment; see `diffsynth.core.data.media_writer.save_video`.
    """
    from diffsynth.core.data import media_writer

    media_writer.save_video(frames, path, fps=fps, quality=quality, comment=_as_text({KEY: made_by}))


def save_audio(samples: Tensor, sample_rate: int, path: Path | str, made_by: Mapping[str, Any]) -> None:
    """Write `samples`, `channels samples` in [-1, 1], to the file `path` as WAV, with the record `made_by` as JSON in
    the file's comment; see `diffsynth.core.data.media_writer.save_audio`.
    """
    from diffsynth.core.data import media_writer

    media_writer.save_audio(samples, path, sample_rate, comment=_as_text({KEY: made_by}))


def save_tensors(tensors: Mapping[str, Tensor], path: Path | str, made_by: Mapping[str, Any]) -> None:
    """Write `tensors`, by name, to the file `path` as safetensors, with the record `made_by` as JSON in the metadata.
    An existing file is replaced in one step, so it is never half written.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    from safetensors.torch import save_file

    # save_file refuses tensors that share memory, such as views of one tensor, and some that are not contiguous.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with replacing(Path(path)) as unfinished:
        save_file(copies, unfinished, metadata={KEY: _as_text(made_by)})


def read(path: Path | str) -> dict[str, Any]:
    """Return the record of the call that made a file, a dict of JSON values; the suffix tells how it is stored.

    Args:
        path: ends in `.png`, `.jpg`, `.webp`, `.gif`, `.wav`, `.safetensors`, or the suffix of a video; or a folder of
            frames, whose first one is read.

    Raises:
        ValueError: the file has no record of diffsynth, or a PNG cannot be read; or a folder without PNG images.
        CheckpointError: the file does not exist, or is not what its suffix says.
        OSError: the file cannot be read.
        Unavailable: PyAV is not installed, which `.wav` and videos need.
    """
    if expanded(path).is_dir():
        return _read_frames(expanded(path))
    readers = {".png": read_png, ".wav": read_audio, ".safetensors": read_tensors, **dict.fromkeys(IMAGES, read_image)}
    return readers.get(expanded(path).suffix.lower(), read_video)(path)


def read_image(path: Path | str) -> dict[str, Any]:
    """Return the record of the call that made a JPEG, WebP or GIF image, a dict of JSON values stored in it; raise
    ValueError if it has none.

    Raises:
        ValueError: the image has no record of diffsynth.
        CheckpointError: the file does not exist, or is no image.
    """
    from diffsynth.core.data.image_writer import read_image_comment

    return _record_in(read_image_comment(path), path)


def read_video(path: Path | str) -> dict[str, Any]:
    """Return the record of the call that made a video, a dict of JSON values stored in its file; raise ValueError if it
    has none.

    Raises:
        ValueError: the video has no record of diffsynth.
        CheckpointError: the file does not exist, or is no video.
        Unavailable: PyAV is not installed.
    """
    return _read_comment(path, "video")


def read_audio(path: Path | str) -> dict[str, Any]:
    """Return the record of the call that made a WAV file, a dict of JSON values stored in it; raises like
    `read_video`.
    """
    return _read_comment(path, "audio")


def read_tensors(path: Path | str) -> dict[str, Any]:
    """Return the record of the call that made a safetensors file, a dict of JSON values in its metadata; raise
    ValueError if it has none.

    Raises:
        ValueError: the file has no record of diffsynth.
        CheckpointError: the file does not exist, or is no safetensors file.
    """
    from diffsynth.core.loader.header import read_safetensors

    text = read_safetensors(Path(path)).metadata.get(KEY)
    if text is None:
        raise ValueError(
            f"{path} has no {KEY!r} metadata; it is no result of a call. To identify a checkpoint: diffsynth recognize"
        )
    return _as_object(json.loads(text), path)


def read_png(path: Path | str) -> dict[str, Any]:
    """Return the record of the call that made a PNG image, a dict of JSON values stored in its file; raise ValueError
    if it has none.

    Raises:
        ValueError: the file is no PNG, or has no record of diffsynth.
        OSError: the file cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # PIL reads text chunks after the pixels only together with the pixels
            text = image.text.get(KEY)  # type: ignore[attr-defined]
    except UnidentifiedImageError:
        raise ValueError(f"{path} is not a PNG file; only PNG images carry a record") from None
    except (Image.DecompressionBombError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a PNG image: {error}") from error
    if text is None:
        raise ValueError(f"{path} has no {KEY!r} text; it was not written by diffsynth, or saved again by another tool")
    return _as_object(json.loads(text), path)


def _read_frames(folder: Path) -> dict[str, Any]:
    """Return the record of a folder of frames, without the number of the frame."""
    frames = sorted(folder.glob("*.png"))
    if not frames:
        raise ValueError(f"{folder} has no PNG images; expected a folder of frames, or a file")
    return {name: value for name, value in read_png(frames[0]).items() if name != "frame"}


def _read_comment(path: Path | str, kind: str) -> dict[str, Any]:
    from diffsynth.core.data.media_writer import read_comment

    return _record_in(read_comment(path, kind), path)


def _record_in(comment: str | None, path: Path | str) -> dict[str, Any]:
    try:
        made_by = json.loads(comment or "")[KEY]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} carries no {KEY!r} record; it was not written by diffsynth, or saved again") from None
    return _as_object(made_by, path)


def _as_object(made_by: Any, path: Path | str) -> dict[str, Any]:
    if not isinstance(made_by, dict):
        raise ValueError(f"{path}: the {KEY!r} record is no JSON object: {str(made_by)[:80]!r}")
    return made_by


def _texts(made_by: Mapping[str, Any], image: Any) -> dict[str, str]:
    """Return the texts of an image file; none of A1111 for what is no image, which the writer refuses."""
    size = getattr(image, "size", None)
    texts = {"comment": _as_text({KEY: made_by})}
    return texts | ({"parameters": parameters_text(made_by, size)} if isinstance(size, tuple) else {})


def _as_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _versions(pipe: Any) -> dict[str, str]:
    reference = f"{type(pipe).__module__}:{type(pipe).__qualname__}"
    providers = {
        declared.distribution: declared.version
        for declared in _discovery.catalog().models
        if declared.spec.pipeline == reference
    }
    ours = {name: importlib.metadata.version(name) for name in ("diffsynth-core", "torch")}
    return dict(sorted((ours | providers).items()))


def _quantization(pipe: Any) -> dict[str, dict[str, int]]:
    """Return a dict role -> method -> number of layers, of the components that are quantized."""
    found = {role: quantization_of(part) for role, part in pipe.parts.items() if part is not None}
    return {role: methods for role, methods in found.items() if methods}


def _lora(lora: Any) -> dict[str, Any]:
    paths = {"paths": [str(path) for path in lora.files]} if lora.files else {}
    found = {"role": lora.role, "alpha": lora.alpha, "hot": lora.hot, "files": identities(lora.files), **paths}
    return found | ({"call_defaults": dict(lora.call_defaults)} if lora.call_defaults else {})


def identities(paths: Iterable[Path]) -> dict[str, str]:
    """Return a dict file name -> identity of its content, of files and of all files in folders.

    Args:
        paths: files and folders.

    Raises:
        OSError: a file cannot be read.
    """
    from diffsynth.core.loader.identity import file_identity

    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {file.name: file_identity(file) for file in files if file.is_file()}


def _strings_in(text: str) -> list[str]:
    """Return a list of a text and of all texts in the value that it is in JSON or Python, if it is one."""
    found = [text]
    for read in (json.loads, ast.literal_eval):
        try:
            values = [read(text)]
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        while values:
            value = values.pop()
            if isinstance(value, str):
                found.append(value)
            elif isinstance(value, list | tuple | dict):
                values += value.values() if isinstance(value, dict) else value
        break
    return list(dict.fromkeys(found))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except (OSError, ValueError):  # a text that is no path: too long, or with a zero
        return False


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
