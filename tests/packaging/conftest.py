"""Wheels of all our packages, and environments in which our own code comes from nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_OURS = ("diffsynth", "_editable_impl_diffsynth", "__editable__")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """A folder with the wheel and the source distribution of each package, and the example's."""
    folder = tmp_path_factory.mktemp("dist")
    for command in (["--all-packages"], [str(ROOT / "examples" / "third_party_plugin"), "--wheel"]):
        subprocess.run(["uv", "build", "--quiet", "--out-dir", str(folder), *command], check=True, cwd=ROOT)
    return folder


@pytest.fixture(scope="session")
def third_party(tmp_path_factory) -> Path:
    """Links to everything that is installed here, but for what is ours: no editable finder, no metadata.

    A folder that a .pth file names is searched, but .pth files inside it are not read; they are left out all the same.
    """
    folder = tmp_path_factory.mktemp("third_party")
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not entry.name.startswith(_OURS) and entry.suffix != ".pth" and entry.name != "__pycache__":
                (folder / entry.name).symlink_to(entry)
    return folder


class Environment:
    """A new virtual environment."""

    def __init__(self, folder: Path, third_party: Path) -> None:
        self.folder = folder
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "third_party.pth").write_text(f"{third_party}\n")

    def install(self, *wheels: Path) -> None:
        """These wheels alone; what they depend on is there."""
        self._pip("install", "--no-deps", *map(str, wheels))

    def uninstall(self, name: str) -> None:
        """Remove a distribution."""
        self._pip("uninstall", name)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, in its folder."""
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
def environment(tmp_path, third_party) -> Environment:
    return Environment(tmp_path / "venv", third_party)


def _plain() -> dict[str, str]:
    """The caller's variables, without those that would let other code in."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
