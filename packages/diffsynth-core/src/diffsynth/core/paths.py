"""Paths as users write them. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from diffsynth.errors import shown


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a `Path` with the user's home folder for `~` at its start, which a shell does not expand within quotes or
    after `=`; `~name` of an unknown user stays as it is.

    Raises:
        TypeError: `path` is neither a text nor a path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path={shown(path)}: expected a text or a Path")
    return Path(os.path.expanduser(path))
