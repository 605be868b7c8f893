"""Writers of results to files: the declared writer of a file name's suffix, and the suffixes for a kind of result.

Imports no torch; `builtin_writers` has the writers of core.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth._models import ModelRecord
from diffsynth.errors import RegistryError, did_you_mean
from diffsynth.spec import WriterSpec, resolve

TENSORS = "tensors"
"""The kind of the writers that can be used with every pipeline."""

FOLDER = "/"
"""The suffix of the writer of folders."""


def declared_writers() -> dict[str, Declared[WriterSpec]]:
    """Return a dict suffix -> declaration of its writer, sorted; of several plugins that declare one suffix the first,
    which is core or else the first by name.
    """
    found = {one.spec.suffix.lower(): one for one in reversed(_discovery.catalog().writers)}
    return dict(sorted(found.items()))


def find_writer(path: Path | str) -> Declared[WriterSpec]:
    """Return the declaration of the writer of a file, by the longest suffix that its name ends in, case ignored; that
    of "/" for a text that ends in "/", and for a folder whose name has no suffix of a writer.

    Raises:
        ValueError: no writer has the suffix; the message lists all suffixes and broken plugins.
    """
    known, name = declared_writers(), Path(path).name.lower()
    fitting = [suffix for suffix in known if name.endswith(suffix) and name != suffix]
    if FOLDER in known and (str(path).endswith(("/", os.sep)) or (not fitting and Path(path).is_dir())):
        return known[FOLDER]
    if fitting:
        return known[max(fitting, key=len)]
    suffix = Path(path).suffix
    broken = _discovery.broken_plugins()
    raise ValueError(
        f"{str(path)!r} ends in {repr(suffix) if suffix else 'no suffix'}, which no writer has"
        f"{did_you_mean(suffix, known) or '.'} Expected one of "
        + ", ".join(f"{suffix} ({one.spec.kind})" for suffix, one in known.items())
        + (f"  {_discovery.describe(broken)}" if broken else "")
    )


def load_writer(declared: Declared[WriterSpec]) -> Callable[..., None]:
    """Import and return the function of a writer; a plugin's is named under `plugins` in the records that it gets.

    Raises:
        RegistryError: it cannot be imported, or is no function; the message names the plugin.
    """
    spec = declared.spec
    try:
        function = resolve(spec.writer)
    except Exception as error:
        raise RegistryError(f"{_title(declared)} cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise RegistryError(f"{_title(declared)}: {spec.writer!r} is {function!r:.80}; expected a function")
    if declared.distribution == _discovery.CORE[1]:
        return function  # type: ignore[no-any-return]

    @functools.wraps(function)
    def write_as(output: Any, path: Path, *, record: Mapping[str, Any], **settings: Any) -> None:
        from diffsynth.runtime.taking_part import named  # it imports torch, as writing does

        plugins = dict(sorted({**record.get("plugins", {}), **named(declared)}.items()))
        function(output, path, record={**record, "plugins": plugins}, **settings)

    return write_as


def _title(declared: Declared[WriterSpec]) -> str:
    provider = f"{declared.plugin} ({declared.distribution} {declared.version})"
    return f"writer {declared.spec.suffix!r} of plugin {provider}"


def output_kind(record: ModelRecord) -> str | None:
    """Return the kind of what a model returns, such as "image": `output_kind` of its pipeline class, else the last word
    of its task if a writer has that kind, else None.

    Args:
        record: of the model.

    Raises:
        ImportError: the code of its pipeline cannot be imported.
    """
    stated = getattr(resolve(record.pipeline), "output_kind", None)
    if stated is not None:
        return str(stated)
    last = record.task.rpartition("-")[2].lower()
    return last if any(one.spec.kind == last for one in declared_writers().values()) else None


def check_kind(path: Path | str, spec: WriterSpec, kind: str | None, *, name: str) -> None:
    """Raise ValueError if a writer cannot write what a model returns.

    Args:
        path: the file, for the message.
        spec: of the writer.
        kind: of what the model returns; None if it is not known, which every writer fits.
        name: of the model, for the message.

    Raises:
        ValueError: another kind; the message lists the suffixes that fit.
    """
    if kind is None or {kind, TENSORS} & {spec.kind, *spec.also}:
        return
    known = {suffix: {one.spec.kind, *one.spec.also} for suffix, one in declared_writers().items()}
    fitting = [suffix for suffix, kinds in known.items() if {kind, TENSORS} & kinds]
    raise ValueError(
        f"{str(path)!r}: {name} returns {kind}, and {spec.suffix} is for {spec.kind}; "
        f"expected a name that ends in {' or '.join(fitting)}"
    )


def check_alpha(path: Path | str, spec: WriterSpec, pipe: Any) -> None:
    """Raise ValueError if a pipeline returns images with transparency, and the format of a writer holds none.

    Args:
        path: the file, for the message.
        spec: of the writer.
        pipe: the pipeline, also one without weights.

    Raises:
        ValueError: it decodes four channels; the message lists the suffixes that fit.
    """
    modes = {getattr(getattr(part, "config", None), "pixel_mode", None) for part in pipe.parts.values()}
    if spec.alpha or "RGBA" not in modes:
        return
    known = declared_writers().items()
    fitting = [suffix for suffix, one in known if one.spec.kind in (spec.kind, TENSORS) and one.spec.alpha]
    raise ValueError(
        f"{str(path)!r}: {pipe.model_name or type(pipe).__name__} returns images with transparency, which "
        f"{spec.suffix} cannot hold; expected a name that ends in {' or '.join(fitting)}"
    )


def write(output: Any, path: Path | str, *, record: Mapping[str, Any], **settings: Any) -> None:
    """Write one result of a pipeline to a file, with the writer that is declared for the file's suffix.

    Args:
        output: what the pipeline returned for one result: a PIL image, a list of frames, an `Audio`, tensors, ...
        path: the file; its folder exists.
        record: of the call, see `diffsynth.provenance.record`; stored in the file where its format can hold it.
        settings: of the writer: `fps` of a video, `quality` of 1 to 100, `sample_rate` of a tensor of sound.

    Raises:
        TypeError, ValueError: no writer has the suffix, or the writer cannot write this output.
        RegistryError: the writer's code cannot be imported, or raises SystemExit or the like.
    """
    declared = find_writer(path)
    writer = load_writer(declared)
    try:
        writer(output, Path(path), record=record, **settings)
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:  # a plugin's writer does not end the program
        raise RegistryError(f"{_title(declared)} failed: {type(error).__name__}: {error}") from error
