"""Description of the machine, a process for each measurement, and the JSON file: for benchmarks of whole networks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffsynth.core import device as devices


def machine(device: str, *packages: str) -> dict[str, Any]:
    """Return the device, the cores, and the versions of Python and of packages; torch and triton are always there."""
    return {
        "device": devices.card_name(torch.device(device)),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "triton", *packages)},
    }


def run_alone(script: str, *arguments: str) -> tuple[Any, str | None]:
    """Run a script in a new process; return the value of the last line that it prints, which is JSON, and None, or
    None and the reason of its failure.
    """
    result = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        return None, f"exit code {result.returncode}"
    return json.loads(result.stdout.splitlines()[-1]), None


def write(report: Mapping[str, Any], file: Path) -> None:
    """Write a report as JSON, and the folder of the file if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
