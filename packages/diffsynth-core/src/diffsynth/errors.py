"""Exceptions that the library raises on purpose.

DiffsynthError
├── RegistryError
│   ├── UnknownModel        no installed plugin declares the name
│   ├── AmbiguousModel      several plugins declare the name
│   └── BrokenPlugin        a plugin failed in registry.register(), or DIFFSYNTH_STRICT_PLUGINS is on
├── CheckpointError
│   ├── NoFiles             a path or pattern matches no file, or shards are missing
│   ├── DownloadFailed      the hub cannot be reached or refuses the request
│   ├── CorruptFile         a file is truncated or is not a checkpoint
│   ├── Unrecognized        no installed architecture matches the file
│   ├── NotRunnable         the file is recognised, and no installed package has its network
│   ├── KeyMismatch         keys or shapes do not fit the architecture
│   └── NotEnoughMemory     the weights would not fit; raised before any tensor is read
├── PipelineError
│   ├── InvalidPipeline     units, roles, components and velocity() of a pipeline do not fit each other
│   ├── MissingComponent    an argument or a stage needs a role that is not loaded
│   ├── Unplannable         the memory of a call cannot be computed without running it
│   ├── NotFinite           latents or decoded values hold NaN or infinity
│   └── Cancelled           the caller's `cancel` event was set
├── TrainingError           a recipe, a manifest or a checkpoint cannot be used, or training cannot continue
│   └── Diverged            the loss, a gradient or a weight holds NaN or infinity
└── BackendError
    ├── Unavailable         the backend's library or device is missing
    └── Refused             the backend does not support the call; the message gives the reason

Bad arguments raise plain `ValueError` and `TypeError`. `assert` is for internal invariants.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from itertools import islice

_UNPRINTABLE = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Characters that a terminal may obey instead of showing them, and lone surrogates, which no stream in UTF-8 takes."""


class DiffsynthError(Exception):
    """Base class of all exceptions of this library.

    Control characters in a message, which may come from a file's names, are shown as escapes; see `printable`.
    """

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in arguments))


class RegistryError(DiffsynthError):
    """Base class of errors in looking up or loading declarations."""


class UnknownModel(RegistryError):
    """Raised when no installed plugin declares the requested model name."""


class AmbiguousModel(RegistryError):
    """Raised when several plugins declare the requested model name; the message gives the exact spellings."""


class BrokenPlugin(RegistryError):
    """Raised when a plugin fails in `registry.register()`, or while DIFFSYNTH_STRICT_PLUGINS is on; otherwise the
    failure is only reported.
    """


class CheckpointError(DiffsynthError):
    """Base class of errors between a path and a loaded module."""


class NoFiles(CheckpointError):
    """Raised when a path or pattern matches no file, or numbered shards are missing."""


class DownloadFailed(CheckpointError):
    """Raised when the hub cannot be reached or refuses the request."""


class CorruptFile(CheckpointError):
    """Raised when a file is truncated or is not a checkpoint."""


class Unrecognized(CheckpointError):
    """Raised when a file is readable but no installed architecture matches it."""


class NotRunnable(CheckpointError):
    """Raised when a file is recognised as one whose network no installed package has."""


class KeyMismatch(CheckpointError):
    """Raised when keys or shapes of a file do not fit the module they are loaded into."""


class NotEnoughMemory(CheckpointError):
    """Raised when weights or a call would not fit into memory; no tensor has been read by then."""


class PipelineError(DiffsynthError):
    """Base class of errors in building or calling a pipeline."""


class InvalidPipeline(PipelineError):
    """Raised when units, roles, components and `velocity()` of a pipeline do not fit each other."""


class MissingComponent(PipelineError):
    """Raised when a call needs a role that is not loaded."""


class Unplannable(PipelineError):
    """Raised when the memory and time of a call cannot be computed without running it."""


class NotFinite(PipelineError):
    """Raised when the latents or the decoded values of a call hold NaN or infinity, so that no image can be made."""


class Cancelled(PipelineError):
    """Raised when the caller's `cancel` event was set during a call."""


class TrainingError(DiffsynthError):
    """Raised when a recipe, a manifest or a checkpoint cannot be used, or when training cannot continue."""


class Diverged(TrainingError):
    """Raised when the loss, a gradient or a weight of a training run holds NaN or infinity."""


class BackendError(DiffsynthError):
    """Base class of errors of attention and quantization backends."""


class Unavailable(BackendError):
    """Raised when the library or the device of a backend is missing."""


class Refused(BackendError):
    """Raised when a backend does not support a call; the message gives the reason."""


def shortened(items: Iterable[object], limit: int = 8) -> str:
    """Return at most `limit` items as text, with the number of the others, if any: "a, b and 3 more"; "a, b" for two.

    Args:
        items: shown by `str`, at most 200 characters of each, control characters as escapes.
        limit: how many are shown.
    """
    found = list(items)
    texts = [printable(str(item)) for item in found[:limit]]
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    return ", ".join(f"{text[:197]}..." if len(text) > 200 else text for text in texts) + more


def printable(text: str) -> str:
    """Return a text that is safe to show on a terminal: control characters, those that reverse the direction of text
    and lone surrogates are replaced by escapes such as `\\x1b`; line ends and tabs are kept.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(value: object, limit: int = 60) -> str:
    """Return `repr(value)` of at most `limit` characters, for a message; never raises.

    A long text, list or array is cut before it is formatted.
    """
    if isinstance(value, str):
        value = value[:limit]
    elif isinstance(value, list | tuple) and len(value) > limit:
        return f"a {type(value).__name__} of {len(value)} entries"
    elif isinstance(shape := getattr(value, "shape", None), tuple):
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4300 digits, or an object whose repr() fails
        return f"an object of {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate cannot be printed
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` with the known name nearest to `name`, or `""` if none is near. Ignores case.

    At most 5,000 known names are compared, with the first 200 characters of `name`: more would take seconds.
    """
    by_lower = {candidate.lower(): candidate for candidate in islice(known, 5000)}
    near = difflib.get_close_matches(name[:200].lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
