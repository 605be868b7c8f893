"""Try many damaged checkpoint files, and print how many end in a clear error, load, or show a fault.

    python benchmarks/fuzz_files.py [--examples 5000] [--seed 0] [--json FILE]

The long form of `tests/fuzz/test_files.py`: the corpus of files that once failed, then files drawn from the same
strategy. A fault is an exception of another library, an error that does not name the file, control characters in a
message, or more than 5 seconds for one file. The exit code is 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))


def run(examples: int, seed_value: int) -> dict[str, Any]:
    """Return the counts of outcomes by kind of file, and the distinct faults with the bytes that led to them."""
    import hypothesis

    from damaged_files import CORPUS, edits, outcome

    counts: dict[str, Counter[str]] = {"corpus": Counter(), "drawn": Counter()}
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:

        def note(kind: str, suffix: str, content: bytes) -> None:
            file = Path(folder, f"x{suffix}")
            file.write_bytes(content)
            result, _ = outcome(file)
            counts[kind]["tried"] += 1
            counts[kind][result if result in ("clear", "accepted") else "faulty"] += 1
            if result not in ("clear", "accepted"):
                faults.setdefault(result.splitlines()[0][:200], content[:400].hex())

        for suffix, make, _ in CORPUS.values():
            note("corpus", suffix, make())

        @hypothesis.seed(seed_value)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate],
        )
        @hypothesis.given(content=edits())
        def drawn(content: bytes) -> None:
            note("drawn", ".safetensors", content)

        drawn()
    return {"counts": {kind: dict(found) for kind, found in counts.items()}, "faults": faults}


def main() -> int:
    """Run the files, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = run(arguments.examples, arguments.seed)
    columns = ("tried", "clear", "accepted", "faulty")
    sys.stdout.write(f"{'files':10}" + "".join(f"{name:>10}" for name in columns) + "\n")
    for kind, found in report["counts"].items():
        sys.stdout.write(f"{kind:10}" + "".join(f"{found.get(name, 0):>10}" for name in columns) + "\n")
    for fault, content in report["faults"].items():
        sys.stdout.write(f"FAULT {fault}\n      {content[:120]}\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
