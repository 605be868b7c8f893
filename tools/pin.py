"""Write the versions of all direct and transitive dependencies of the workspace as pins into pyproject.toml.

    uv lock && uv run --all-packages tools/pin.py

reads `uv.lock` and rewrites `[tool.uv] constraint-dependencies`. `uv.lock` is not committed, because it contains the
download addresses of the mirror that wrote it; names and versions are the same everywhere. To upgrade, empty the list,
run `uv lock --upgrade`, this script and `uv sync --all-packages`, then the tests.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIST = re.compile(r"^constraint-dependencies = \[(?:\]|.*?^\])", flags=re.MULTILINE | re.DOTALL)


def locked() -> list[str]:
    """Return sorted pins `name==version` for all packages and groups on all platforms.

    A pin has a marker only if a package is locked at two versions (numpy on Python 3.11 and later). Other markers are
    unnecessary, because a constraint installs nothing by itself, and they would split uv's resolution.
    """
    command = ["uv", "export", "--frozen", "--all-packages", "--all-groups", "--no-emit-workspace"]
    command += ["--no-hashes", "--no-annotate", "--no-header"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    pins = [tuple(re.split(r"\s*;\s*", line, maxsplit=1)) for line in lines]
    versions = Counter(pin.split("==")[0] for pin, *_ in pins)
    return sorted("; ".join(parts) if versions[parts[0].split("==")[0]] > 1 else parts[0] for parts in pins)


def with_pins(pyproject: str, pins: list[str]) -> str:
    """Return the text of pyproject.toml with its pins replaced.

    Raises:
        ValueError: the text does not contain exactly one list of pins.
    """
    block = "constraint-dependencies = [\n" + "".join(f"    {json.dumps(pin)},\n" for pin in pins) + "]"
    text, count = LIST.subn(lambda _: block, pyproject)
    if count != 1:
        raise ValueError(f"pyproject.toml has {count} lists `constraint-dependencies`; expected one under [tool.uv]")
    return text


def main() -> None:
    """Rewrite the list of pins in pyproject.toml."""
    path, pins = ROOT / "pyproject.toml", locked()
    path.write_text(with_pins(path.read_text(encoding="utf-8"), pins), encoding="utf-8")
    print(f"{len(pins)} pins in {path.name}")


if __name__ == "__main__":
    main()
