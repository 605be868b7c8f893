"""The page for users of DiffSynth-Studio: its blocks run, its first table is true, and so is its last."""

import importlib
import json
import re
from pathlib import Path

import pytest

from diffsynth import core
from diffsynth.core.data.annotator import DETECTORS, PROCESSORS
from diffsynth.testing import tiny_hub

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "coming-from-diffsynth-studio.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
_, WORKS, NOT_YET = re.split(r"^## (?:Where things are|Not here yet)$", PAGE, flags=re.MULTILINE)


def old_names(section):
    """The dotted names in the first column of a section's table."""
    cells = re.findall(r"^\| (`.+?) \|", section, flags=re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(diffsynth\.[\w.]+)`", cell)]


def resolve(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_hub(root, ["z-image-turbo"])
    return root


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[-1][:40] for block in BLOCKS])
def test_every_block_runs(block, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(models))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    # In bf16 a megapixel takes minutes on a CPU without instructions for it, and seconds in fp32.
    exec(block.replace("torch.bfloat16", "torch.float32"), {"__name__": "block"})


def test_what_the_page_says_is_there_is_there():
    names = old_names(WORKS)
    assert len(names) > 40
    assert all(resolve(name) is not None for name in names)


def test_every_name_of_core_is_on_the_page():
    named = re.findall(r"`diffsynth\.core\.(\w+)`", WORKS.partition("## What differs")[0])
    assert set(core.__all__) <= set(named)


@pytest.mark.parametrize("name", old_names(NOT_YET))
def test_what_the_page_says_is_missing_is_missing(name):
    """When it arrives, this fails, and the name moves to the other table."""
    with pytest.raises((AttributeError, ImportError)):
        resolve(name)


def test_the_figures_of_rounded_times_are_those_of_the_benchmark():
    report = json.loads((DOCS.parent / "benchmarks" / "results" / "rounded-times.json").read_text(encoding="utf-8"))
    for name, figures in report["models"].items():
        assert f"| {name} | " + " | ".join(f"{100 * value:.2f}" for value in figures.values()) + " |" in PAGE
    assert f"after {report['steps']} steps" in PAGE


def test_the_annotators_of_the_manual():
    page = (DOCS / "inputs.md").read_text(encoding="utf-8").partition("## Condition images")[2]
    named = re.findall(r"^\| (`.+?`) \|", page, flags=re.MULTILINE)
    kinds = [name for row in named for name in re.findall(r"`(\w+)`", row)]
    assert sorted(kinds) == sorted(PROCESSORS)
    assert set(re.findall(r"`(\w+)`", named[-1])) == set(DETECTORS)
