"""Every exception that the library raises on purpose.

DiffsynthError
├── RegistryError
│   ├── UnknownModel        no installed plugin declares that name
│   ├── AmbiguousModel      two plugins declare it
│   └── BrokenPlugin        a plugin failed, and DIFFSYNTH_STRICT_PLUGINS=1
├── CheckpointError
│   ├── NoFiles             a path or pattern matched nothing, or shards are missing
│   ├── DownloadFailed      the hub could not be reached, or refused
│   ├── CorruptFile         truncated, or not a checkpoint at all
│   ├── Unrecognized        readable, but no architecture claims it
│   ├── KeyMismatch         claimed, but keys or shapes do not fit
│   └── NotEnoughMemory     found out before the first tensor was read
├── PipelineError
│   ├── InvalidPipeline     units, roles and velocity() do not fit together
│   ├── MissingComponent    an argument or a stage needs a role that is not loaded
│   ├── Unplannable         what a call would take cannot be told without making it
│   └── Cancelled           the caller's `cancel` event was set
├── TrainingError
└── BackendError
    ├── Unavailable         the backend is not installed or has no device
    └── Refused             the backend cannot do this call; the reason is in the message

Bad arguments are plain `ValueError` and `TypeError`. `assert` is for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffsynthError(Exception):
    """Root of everything below."""


class RegistryError(DiffsynthError):
    """A name could not be resolved to exactly one declaration."""


class UnknownModel(RegistryError):
    """No installed plugin declares that name."""


class AmbiguousModel(RegistryError):
    """Two plugins declare that name; the message gives the exact spellings."""


class BrokenPlugin(RegistryError):
    """A plugin failed to load and strict mode is on."""


class CheckpointError(DiffsynthError):
    """Something between a path and a loaded module went wrong."""


class NoFiles(CheckpointError):
    """A path or pattern matched no file, or numbered shards are missing."""


class DownloadFailed(CheckpointError):
    """The hub could not be reached, or refused."""


class CorruptFile(CheckpointError):
    """Truncated, or not a checkpoint."""


class Unrecognized(CheckpointError):
    """A readable file that no installed architecture claims."""


class KeyMismatch(CheckpointError):
    """Keys or shapes of a file do not fit the module they are meant for."""


class NotEnoughMemory(CheckpointError):
    """Loading would not fit; raised before any tensor is read."""


class PipelineError(DiffsynthError):
    """A pipeline cannot be built, or cannot serve this call."""


class InvalidPipeline(PipelineError):
    """Units, roles and velocity() of a pipeline class do not fit together."""


class MissingComponent(PipelineError):
    """A role that this call needs is not loaded."""


class Unplannable(PipelineError):
    """What a call would take cannot be told without making it."""


class Cancelled(PipelineError):
    """The caller asked to stop."""


class TrainingError(DiffsynthError):
    """A recipe, a manifest or a run cannot go on."""


class BackendError(DiffsynthError):
    """An attention or quantization backend cannot serve."""


class Unavailable(BackendError):
    """The backend's library or device is missing."""


class Refused(BackendError):
    """The backend cannot do this call; the message says why."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or an empty string when nothing is near. Ignores case."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""
