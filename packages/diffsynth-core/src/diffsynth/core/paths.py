"""Paths as users write them. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a `Path` with the user's home folder for `~` at its start, which a shell does not expand within quotes or
    after `=`; `~name` of an unknown user stays as it is.
    """
    return Path(os.path.expanduser(path))
