"""Call each pipeline with every argument at every wrong value; print tried / clear / accepted / faulty.

Run:
    python benchmarks/fuzz_calls.py [--models flux.1-dev z-image-nano] [--json benchmarks/results/fuzz_calls.json]

"clear" is refused before the text encoder runs, by an error that names the argument; "accepted" ran to its end. The
rest is faulty and listed. Exit code 1 if there is any. `tests/fuzz/test_calls.py` is the short form.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from call_fuzz import ONCE_FAULTY, FuzzedPipeline, pipelines, wrong_values


def main() -> int:
    """Run the calls and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=pipelines())
    parser.add_argument("--json", type=Path, help="file for the counts")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = {}
    print(f"{'model':24} {'tried':>6} {'clear':>6} {'accepted':>8} {'faulty':>6}", flush=True)
    for model in options.models:
        fuzzed, counts = FuzzedPipeline(model), Counter()
        for name in fuzzed.arguments:
            for value in (*ONCE_FAULTY.get(name, ()), *wrong_values()):
                verdict = fuzzed.verdict({name: value})
                counts["faulty" if verdict.is_faulty else verdict.kind] += 1
                if verdict.is_faulty:
                    print(f"{model}: {verdict}", flush=True)
        rows[model] = {"tried": counts.total(), **{kind: counts[kind] for kind in ("clear", "accepted", "faulty")}}
        print(f"{model:24} {'{tried:6} {clear:6} {accepted:8} {faulty:6}'.format(**rows[model])}", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["faulty"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
