"""Tests of the page on guidance: its blocks run, and its table has the names and settings of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffsynth import _discovery
from diffsynth.runtime.guidance import parse_guidance

PAGE = (Path(__file__).parents[2] / "docs" / "guidance.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
ROWS = re.findall(r"^\| `(\w+\(.*?\))` \| `(.+?)` \| .+ \| (.+) \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block):
    used = []
    exec(block, {"__name__": "block", "pipe": lambda prompt, guidance, **others: used.append(parse_guidance(guidance))})
    assert len(used) == block.count("pipe(")


def test_the_table_lists_the_guidances_of_core():
    declared = {one.spec.name: one.spec for one in _discovery.catalog().guidance if one.plugin == "core"}
    assert [text.partition(":")[0] for _, text, _ in ROWS] == list(declared)
    for shown, text, reference in ROWS:
        name = text.partition(":")[0]
        assert repr(parse_guidance(name)) == shown
        assert type(parse_guidance(text)) is type(parse_guidance(name))
        assert declared[name].paper in reference
