"""The page about attention: its blocks run, and its tables are what there is."""

import inspect
import re
from pathlib import Path

import pytest

from diffsynth.core.attention import attention, available_backends, registry
from diffsynth.runtime.acceleration import StepAttention
from diffsynth.runtime.request import LoopArguments

PAGE = (Path(__file__).parents[2] / "docs" / "attention.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def first_cells(header):
    """The first column of the table with that header."""
    (table,) = re.findall(rf"^\| {header} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE)
    return [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_runs(block):
    exec(block, {"__name__": "block", "pipe": lambda prompt, **arguments: LoopArguments(**arguments)})


def test_the_text_form_on_the_page_is_the_first_schedule():
    (text,) = re.findall(r"--set attention=(\S+)", PAGE)
    assert LoopArguments(attention=text).attention == StepAttention("triton_int8", first=2, last=2)


def test_every_argument_is_explained():
    assert set(first_cells("argument")) == set(inspect.signature(attention).parameters) - {"q", "k", "v"}


def test_every_backend_is_listed():
    assert set(first_cells("name")) == {*available_backends(), *registry.ALIASES}


def test_values_that_the_reference_knows():
    for name in ("auto", "torch", "xformers", "sage_attention", *(f"flash_attention_{n}" for n in (2, 3, 4))):
        registry.check_known(name)
