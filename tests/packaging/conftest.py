"""Fixtures: wheels of all our packages, and virtual environments with no other copy of our code."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_OURS = ("diffsynth", "_editable_impl_diffsynth", "__editable__")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution of each package, and the wheel of the example plugin."""
    folder = tmp_path_factory.mktemp("dist")
    for command in (["--all-packages"], [str(ROOT / "examples" / "third_party_plugin"), "--wheel"]):
        subprocess.run(["uv", "build", "--quiet", "--out-dir", str(folder), *command], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def third_party(tmp_path_factory) -> Path:
    """A folder of links to every installed package that is not ours, without our editable finders and metadata.

    Python searches a folder that a .pth file names, but reads no .pth files inside it; they are left out.
    """
    folder = tmp_path_factory.mktemp("third_party")
    for site_packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(site_packages).iterdir():
            if not entry.name.startswith(_OURS) and entry.suffix != ".pth" and entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A new virtual environment of the Python at a path."""

    def __init__(self, folder: Path, third_party: Path, python: str) -> None:
        self.folder = folder
        subprocess.run(["uv", "venv", "--quiet", "--python", python, str(folder)], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "third_party.pth").write_text(f"{third_party}\n")

    def install(self, *wheels: Path) -> None:
        """Install these wheels without their dependencies, which are linked."""
        self._pip("install", "--no-deps", *map(str, wheels))

    def uninstall(self, name: str) -> None:
        """Remove a distribution."""
        self._pip("uninstall", name)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, with its folder as working directory; failure is an error."""
        program = self.folder / "bin" / command[0]
        result = subprocess.run(
            [str(program), *command[1:]], capture_output=True, text=True, check=False, cwd=self.folder, env=_plain()
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def _pip(self, *command: str) -> None:
        python = str(self.folder / "bin" / "python")
        subprocess.run(["uv", "pip", command[0], "--quiet", "--python", python, *command[1:]], check=True)


@pytest.fixture
def environment_of(tmp_path, third_party) -> Callable[[str], Environment]:
    """A function that makes an environment of the Python at a path."""
    return lambda python: Environment(tmp_path / "venv", third_party, python)


@pytest.fixture
def environment(environment_of) -> Environment:
    return environment_of(sys.executable)


def _plain() -> dict[str, str]:
    """Return the environment variables without those through which Python finds other code."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
