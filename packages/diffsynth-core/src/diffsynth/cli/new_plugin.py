"""`diffsynth new-plugin`: write a working plugin package with a small model and a test. Imports no torch."""

from __future__ import annotations

import importlib.resources
import json
import re
import string
import struct
from pathlib import Path

import click

from diffsynth.cli.output import UserError, echo, traceback_option

WEIGHTS = "dit.safetensors"
_FILES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "test.yml": ".github/workflows/test.yml",
    "test_plugin.py": "tests/test_plugin.py",
    **{
        name: f"src/{{package}}/{name}"
        for name in ("__init__.py", "plugin.py", "config.py", "dit.py", "units.py", "pipeline.py", WEIGHTS)
    },
}
"""File name in `templates/`, without its suffix -> path in the package."""


@click.command("new-plugin")
@click.argument("name")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="Folder to write to; diffsynth-NAME by default."
)
@traceback_option
def new_plugin(name: str, output: Path | None) -> None:
    """Write a plugin called NAME: a package with a small model, tests and a CI file."""
    _check_name(name)
    folder = output if output is not None else Path(f"diffsynth-{name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; nothing was written. Choose another --output")
    from diffsynth.core.replacing import check_writable

    files = render(name)
    check_writable(folder / "pyproject.toml")
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    echo(f"{folder}: {len(files)} files. Next: pip install -e '{folder}[test]' && pytest {folder}")


def render(name: str) -> dict[str, bytes]:
    """Return a dict path in the package -> file content as bytes, for the package of a plugin called `name`."""
    identifier = name.replace("-", "_")
    names = {
        "name": name,
        "identifier": identifier,
        "distribution": f"diffsynth-{name}",
        "package": f"diffsynth_{identifier}",
        "title": "".join(word.capitalize() for word in name.split("-")),
    }
    templates = importlib.resources.files("diffsynth.cli") / "templates"
    files = {f"src/{names['package']}/py.typed": b""}
    for template, path in _FILES.items():
        content = (templates / f"{template}.template").read_bytes()
        files[path.format(package=names["package"])] = (
            _with_architecture(content, f"{identifier}_dit")
            if template == WEIGHTS
            else string.Template(content.decode("utf-8")).substitute(names).encode("utf-8")
        )
    return files


def _check_name(name: str) -> None:
    if name.startswith(("diffsynth-", "diffsynth_")):
        raise UserError(f"{name!r}: expected the name alone, {name[10:]!r}; the package is called diffsynth-NAME")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UserError(f"{name!r}: expected lower-case letters and digits, with single hyphens between (my-model)")
    from diffsynth import _discovery

    catalog = _discovery.catalog()
    taken = {(one.plugin, one.distribution) for one in catalog.problems}
    taken |= {(one.name, one.distribution) for one in catalog.plugins}
    for plugin, distribution in sorted(taken):
        if name == plugin or f"diffsynth-{name}" == distribution:
            raise UserError(f"{name!r} is the plugin of {distribution}, which is installed; choose another name")


def _with_architecture(weights: bytes, architecture: str) -> bytes:
    """Return the safetensors file `weights` (bytes) with `architecture` as the architecture name in its metadata."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    header["__metadata__"]["diffsynth.architecture"] = architecture
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data section starts at a multiple of 8 bytes
    return struct.pack("<Q", len(text)) + text + weights[8 + length :]
