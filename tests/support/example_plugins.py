"""Install packages of `examples/` for tests without pip, and run what their READMEs and tests say."""

from __future__ import annotations

import re
import runpy
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffsynth import _discovery
from source_tree import ROOT

EXAMPLES = ROOT / "examples"


@contextmanager
def installed(*examples: str, folder: Path, beside: Sequence[str] = ()) -> Iterator[None]:
    """Install packages of `examples/` while the block runs: their sources are importable, and `folder` has the metadata
    that pip would write. Of other plugins, only those in `beside` are discovered.
    """
    plugins, before = list(beside), set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for example in examples:
            project = tomllib.loads((EXAMPLES / example / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            name, entries = project["name"], project["entry-points"]["diffsynth"]
            information = folder / f"{name.replace('-', '_')}-{project['version']}.dist-info"
            information.mkdir()
            lines = f"Metadata-Version: 2.1\nName: {name}\nVersion: {project['version']}\n"
            (information / "METADATA").write_text(lines)
            lines = "".join(f"{plugin} = {target}\n" for plugin, target in entries.items())
            (information / "entry_points.txt").write_text(f"[diffsynth]\n{lines}")
            patch.syspath_prepend(str(EXAMPLES / example / "src"))
            plugins += entries
        patch.setenv("DIFFSYNTH_PLUGINS", ",".join(plugins))
        assert _discovery.refresh().problems == ()
        yield
    for name in set(sys.modules) - before:
        if any((EXAMPLES / example / "src" / name.partition(".")[0]).is_dir() for example in examples):
            del sys.modules[name]
    _discovery.refresh()


def run_conformance(example: str, *, calls: bool = True) -> list[str]:
    """Run the test file of an installed example; return the names of its checks.

    Args:
        example: name of its folder.
        calls: whether the checks that call a model run, too.
    """
    run = runpy.run_path(str(EXAMPLES / example / "tests" / "test_plugin.py"))["test_plugin"]
    checks = [case.values[0] for case in run.pytestmark[0].args[1]]
    checks = [check for check in checks if calls or not check.name.startswith("model ")]
    for check in checks:
        run(check)
    return [check.name for check in checks]


def run_readme(example: str, *, steps: int = 2) -> dict[str, Any]:
    """Run the Python block of an installed example's README with few steps; return its names."""
    text = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(
        re.sub(r", num_inference_steps=\d+", "", code).replace("seed=0", f"seed=0, num_inference_steps={steps}"), names
    )
    return names


def make_weights(example: str, file: Path, **options: Any) -> bytes:
    """Run the `make_weights.py` of an installed example, with these options of its `main`; return the content of the
    file that it writes.
    """
    runpy.run_path(str(EXAMPLES / example / "make_weights.py"))["main"](file, **options)
    return file.read_bytes()
