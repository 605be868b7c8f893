"""Find imports of heavy packages in a process that blocks them: `python -m diffsynth.testing.checks.light MODULE...`.

An attempted import is reported even if the module catches the error, because the package would be imported where it
is installed.
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

from diffsynth._plugin_loading import HEAVY


class _Blocker(importlib.abc.MetaPathFinder):
    """Import hook that blocks heavy packages and records the importing lines."""

    def __init__(self) -> None:
        self.attempts: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] not in HEAVY:
            return
        frame = sys._getframe(1)
        while frame.f_back is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        self.attempts.append(f"{frame.f_globals.get('__name__')}, line {frame.f_lineno}, imports {name}")
        raise ImportError(f"{name} is blocked")


def heavy_imports(modules: Sequence[str]) -> list[str]:
    """Import the named modules in a new process, and return a list of texts, without repetitions, one for each
    attempted import of torch, numpy or transformers: `"NAME, line N, imports torch"`; empty if there was none.
    """
    command = [sys.executable, "-P", "-m", __name__, *modules]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, f"importing {', '.join(modules)} ended the process:\n{result.stderr}"
    attempts: list[str] = json.loads(result.stdout.splitlines()[-1])
    return attempts


def main(modules: Sequence[str]) -> None:
    """Import the named modules with torch, numpy and transformers blocked, and print a JSON list of the attempts to
    import one, as texts without repetitions, as the last line of stdout; a module that fails is skipped.
    """
    blocker = _Blocker()
    sys.meta_path.insert(0, blocker)
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException:  # other failures of a module are reported by other checks
            continue
    sys.stdout.write(f"\n{json.dumps(list(dict.fromkeys(blocker.attempts)))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
