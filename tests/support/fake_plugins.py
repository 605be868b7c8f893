"""Write distributions for tests of discovery: a package, its entry point and its metadata in one folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from diffsynth import _discovery

GOOD = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ModelSpec

DIFFSYNTH_API = 2


@hookimpl
def register_models(register):
    register(ModelSpec(name="{model}", family="toy", task="text-to-image", hub_id="Owner/{model}",
                       pipeline="{package}.pipeline:ToyPipeline", components={{"dit": "Owner/{model}:*.safetensors"}}))
"""


def good(package: str, model: str) -> str:
    """Return the source of a plugin that declares one model."""
    return GOOD.format(package=package, model=model)


def install(folder: Path, name: str, code: str, *, version: str = "1.0", target: str = "", package: str = "") -> None:
    """Write a distribution `fake-<name>` with the plugin `name`, whose source is `code`."""
    package = package or f"fake_{name}"
    distribution = package.replace("_", "-")
    (folder / package).mkdir(exist_ok=True)
    (folder / package / "__init__.py").write_text("")
    (folder / package / "pipeline.py").write_text("class ToyPipeline:\n    pass\n")
    (folder / package / "plugin.py").write_text(code)
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(f"[diffsynth]\n{name} = {target or f'{package}.plugin'}\n")


class Site:
    """A folder of fake distributions on `sys.path`; discovery reads these and core, and no others."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch, self._names = folder, monkeypatch, []

    def install(self, name: str, code: str, **options: str) -> None:
        """Write a distribution, see the function `install`, and add its plugin to the allow-list."""
        install(self.folder, name, code, **options)
        self._names.append(name)
        self._monkeypatch.setenv("DIFFSYNTH_PLUGINS", ",".join(self._names))

    def discover(self) -> _discovery.Catalog:
        """Run discovery again and return the new catalog."""
        return _discovery.refresh()


def forget(modules_before: set[str]) -> None:
    """Remove the imported fake modules and the result of discovery."""
    for name in set(sys.modules) - modules_before:
        if name.startswith("fake_"):
            del sys.modules[name]
    _discovery._discovered = None
