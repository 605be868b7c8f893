"""Count the files and lines that a conditioning of a pipeline touches, in the sources that git tracks.

    uv run --all-packages tools/conditioning_cost.py                          Wan's camera path, in the working tree
    uv run --all-packages tools/conditioning_cost.py --commit 321ed6c         also as it was in a commit
    uv run --all-packages tools/conditioning_cost.py --word 'speed_control' --package diffsynth-wan

A file whose name has the word is the conditioning's own, and all of its lines count. In other files, lines count that
have the word in code, a comment or a docstring, apart from names of published models; that is the least that somebody
who adds the conditioning must write there. Files of networks and published models (`NETWORK`) are left out: a layer of
a published network is no cost of the conditioning.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORD = r"(?<!Control-)camera"
"""Camera path of Wan; `Control-Camera` is in the names of models."""

NETWORK = ("checkpoints.py", "config.py", "dit.py", "extension.py", "models.py", "tiny.py")


@dataclass(frozen=True)
class Cost:
    """The lines of a file that a conditioning touches.

    Args:
        lines: their number.
        is_own: whether the file is the conditioning's own.
    """

    lines: int
    is_own: bool


def touched(sources: Mapping[str, str], word: str, *, leave_out: Iterable[str] = NETWORK) -> dict[str, Cost]:
    """Return a dict path -> `Cost` of the files that a conditioning touches.

    Args:
        sources: path -> text of each file.
        word: regular expression of the conditioning's names; case is ignored.
        leave_out: names of files that do not count.
    """
    pattern, costs = re.compile(word, re.IGNORECASE), {}
    for path, text in sources.items():
        name, lines = path.rpartition("/")[2], text.splitlines()
        is_own = bool(pattern.search(name))
        count = len(lines) if is_own else sum(bool(pattern.search(line)) for line in lines)
        if count and name not in tuple(leave_out):
            costs[path] = Cost(count, is_own)
    return costs


def tracked_sources(package: str, commit: str | None = None) -> dict[str, str]:
    """Return a dict path -> text of a package's modules that git tracks, with paths from the package's module folder.

    Args:
        package: its folder in `packages/`.
        commit: the commit; None is the working tree.

    Raises:
        CalledProcessError: git does not know the commit, or this is no checkout.
    """
    folder = f"packages/{package}/src/{package.replace('-', '_')}/"
    listing = ["ls-files"] if commit is None else ["ls-tree", "-r", "--name-only", commit]
    names = [name for name in _git(*listing, "--", folder).splitlines() if name.endswith(".py")]
    if commit is None:
        return {name.removeprefix(folder): (ROOT / name).read_text(encoding="utf-8") for name in names}
    return {name.removeprefix(folder): _git("show", f"{commit}:{name}") for name in names}


def table(columns: Mapping[str, Mapping[str, Cost]]) -> str:
    """Return a Markdown table: a row for each file, a column of lines for each of `columns` (title -> path -> cost)."""
    paths = sorted({path for costs in columns.values() for path in costs})
    rows = [["lines in", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[f"`{path}`", *(_cell(costs.get(path)) for costs in columns.values())] for path in paths]
    shared = [[cost.lines for cost in costs.values() if not cost.is_own] for costs in columns.values()]
    rows.append(
        ["own files", *(str(len(costs) - len(each)) for costs, each in zip(columns.values(), shared, strict=True))]
    )
    rows.append(["shared files", *(str(len(each)) for each in shared)])
    rows.append(["lines in shared files", *(str(sum(each)) for each in shared)])
    rows.append(["lines", *(str(sum(cost.lines for cost in costs.values())) for costs in columns.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--word", default=WORD, help="regular expression of the conditioning's names")
    parser.add_argument("--package", default="diffsynth-wan")
    parser.add_argument("--commit", action="append", default=[], help="a commit to count, too; may be repeated")
    options = parser.parse_args()
    columns = {commit: touched(tracked_sources(options.package, commit), options.word) for commit in options.commit}
    columns["working tree"] = touched(tracked_sources(options.package), options.word)
    print(table(columns))


def _cell(cost: Cost | None) -> str:
    return "" if cost is None else f"{cost.lines} (own)" if cost.is_own else str(cost.lines)


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout


if __name__ == "__main__":
    main()
