"""Compile every kernel, in every configuration of its table, without a GPU, and record the resources they use.

    python benchmarks/kernels/compile.py                    all: minutes to an hour; compiled.json and README.md
    python benchmarks/kernels/compile.py --only flash_fwd --target 90 --changed
    python benchmarks/kernels/compile.py --default --complete --dry     what CI compiles and checks; writes nothing

Exits with 1 if a kernel spills or needs more shared memory than a block can have. Modules `*_cases.py` beside this file
list the kernels. Nothing here runs a kernel: speed is measured by `benchmarks/attention.py`, on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when kernels are defined, at the import of `*_cases`

import triton
from offline import Case, Report

HERE = Path(__file__).parent
RESULTS = HERE / "compiled.json"
COLUMNS = (
    "kernel",
    "sm",
    "blocks",
    "warps",
    "stages",
    "registers",
    "spilled",
    "shared",
    "matrix instructions",
    "timed",
)

_BLOCKS = ("BLOCK", *(f"BLOCK_{axis}" for axis in "MNRTEFH"))


def main() -> int:
    """Return 0 if every compiled kernel may be launched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="substring of the case's name")
    parser.add_argument("--target", type=int, help="compute capability, 90 for sm_90")
    parser.add_argument("--default", action="store_true", help="only the default configurations")
    parser.add_argument("--changed", action="store_true", help="skip configurations that compiled.json has")
    parser.add_argument(
        "--complete",
        action="store_true",
        help="also fail if compiled.json lacks a case, or has one that must not be launched",
    )
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text())["cases"] if RESULTS.exists() else {}
    every = {f"{case.name} @ {case.target}": case for case in listed()}
    known = {key: row for key, row in known.items() if key in every}
    bad = problems_of_table(every, known) if args.complete else []
    for key, case in every.items():
        skipped = args.only not in case.name or args.target not in (None, case.target)
        if skipped or (args.default and not case.is_default) or (args.changed and is_known(case, known.get(key))):
            continue
        report = case.report()
        known[key] = {**dataclasses.asdict(report), "blocks": blocks(case), "tuned": case.tuned}
        print(f"{key}: {report.registers} registers, {report.spilled} spilled, {report.shared} B shared", flush=True)
        bad += report.problems()
        if not args.dry:
            write({key: known[key] for key in every if key in known})
    for problem in bad:
        print(f"PROBLEM {problem}", file=sys.stderr)
    return int(bool(bad))


def listed() -> list[Case]:
    """Return the cases of all modules `*_cases.py`."""
    names = sorted(path.stem for path in HERE.glob("*_cases.py"))
    return [case for name in names for case in importlib.import_module(name).cases()]


def problems_of_table(every: dict[str, Case], known: dict[str, dict[str, Any]]) -> list[str]:
    """Return the cases that compiled.json lacks, and those that must not be launched."""
    found = [
        f"compiled.json lacks {key} in its current configuration"
        for key, case in every.items()
        if not is_known(case, known.get(key))
    ]
    for row in known.values():
        found += Report(**{field.name: row[field.name] for field in dataclasses.fields(Report)}).problems()
    return found


def blocks(case: Case) -> str:
    """Return the block sizes of a case, `128 x 64`."""
    return " x ".join(str(value) for name, value in case.constexprs.items() if name in _BLOCKS)


def is_known(case: Case, row: dict[str, object] | None) -> bool:
    """Return whether a row is of this configuration; changes of the kernel's code are not detected."""
    wanted = (blocks(case), case.num_warps, case.num_stages)
    return row is not None and (row["blocks"], row["num_warps"], row["num_stages"]) == wanted


def write(rows: dict[str, dict[str, object]]) -> None:
    """Write `compiled.json`, and the table of README.md made from it."""
    RESULTS.write_text(json.dumps({"triton": triton.__version__, "cases": rows}, indent=1) + "\n")
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for key, row in rows.items():
        mma = ", ".join(f"{count} {name}" for name, count in row["mma"].items()) or "none"
        timed = "yes" if row["tuned"] else "untuned"
        cells = (key.rpartition(" @ ")[0], row["arch"], row["blocks"], row["num_warps"], row["num_stages"])
        cells += (row["registers"], row["spilled"], row["shared"], mma, timed)
        lines.append(" | ".join(str(cell) for cell in cells))
    readme = HERE / "README.md"
    head, mark, _ = readme.read_text(encoding="utf-8").partition("<!-- made by compile.py -->\n")
    table = "\n".join(f"| {line} |" for line in lines)
    readme.write_text(f"{head}{mark}\nTriton {triton.__version__}.\n\n{table}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
