"""Imports modules with torch and its like blocked, in a process of its own: `python -m <this> MODULE...`.

A blocked package that is asked for counts even where the module catches the error: with the package there, it would be
imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from diffsynth._discovery import HEAVY


class _Blocker(importlib.abc.MetaPathFinder):
    """Refuses heavy packages, and remembers who asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] not in HEAVY:
            return
        frame = sys._getframe(1)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        self.asked.append(f"{frame.f_globals.get('__name__')}, line {frame.f_lineno}, imports {name}")
        raise ImportError(f"{name} is blocked")


def heavy_imports(modules: Sequence[str]) -> list[str]:
    """Every import of a heavy package while these modules are imported in a fresh process, as sentences."""
    command = [sys.executable, "-P", "-m", __name__, *modules]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, f"importing {', '.join(modules)} ended the process:\n{result.stderr}"
    asked: list[str] = json.loads(result.stdout.splitlines()[-1])
    return asked


def main(modules: Sequence[str]) -> None:
    """Import them; the last line on stdout is a JSON list of what was asked for."""
    blocker = _Blocker()
    sys.meta_path.insert(0, blocker)
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:  # why else a module fails, other checks say
            continue
    sys.stdout.write(f"\n{json.dumps(list(dict.fromkeys(blocker.asked)))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
