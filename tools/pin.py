"""Write the pinned closure of the workspace into pyproject.toml: every package, direct or not, with its version.

    uv lock && uv run --all-packages tools/pin.py

reads `uv.lock` and rewrites `[tool.uv] constraint-dependencies`. `uv.lock` itself is not committed, because it records
the download addresses of whichever mirror made it; names and versions are the same everywhere. To move to newer
versions, empty the list, `uv lock --upgrade`, run this, `uv sync --all-packages`, and run the tests.
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
    """`name==version`, sorted, for all packages and groups on all platforms.

    A pin has a marker only where a package is locked at two versions (numpy on Python 3.11 and later). Elsewhere a
    marker would say nothing, as a constraint installs nothing by itself, and would split uv's resolution in many.
    """
    command = ["uv", "export", "--frozen", "--all-packages", "--all-groups", "--no-emit-workspace"]
    command += ["--no-hashes", "--no-annotate", "--no-header"]
    lines = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    pins = [tuple(re.split(r"\s*;\s*", line, maxsplit=1)) for line in lines]
    versions = Counter(pin.split("==")[0] for pin, *_ in pins)
    return sorted("; ".join(parts) if versions[parts[0].split("==")[0]] > 1 else parts[0] for parts in pins)


def with_pins(pyproject: str, pins: list[str]) -> str:
    """The text of pyproject.toml with these pins in place of the old ones.

    Raises:
        ValueError: the text does not hold exactly one list of pins.
    """
    block = "constraint-dependencies = [\n" + "".join(f"    {json.dumps(pin)},\n" for pin in pins) + "]"
    text, count = LIST.subn(lambda _: block, pyproject)
    if count != 1:
        raise ValueError(f"pyproject.toml has {count} lists `constraint-dependencies`; expected one under [tool.uv]")
    return text


def main() -> None:
    """Rewrite the list."""
    path, pins = ROOT / "pyproject.toml", locked()
    path.write_text(with_pins(path.read_text(encoding="utf-8"), pins), encoding="utf-8")
    print(f"{len(pins)} pins in {path.name}")


if __name__ == "__main__":
    main()
