"""Wrong arguments of public functions and settings: each is taken, or refused by an error that names it."""

from __future__ import annotations

import pytest

from function_fuzz import faults, functions


@pytest.mark.parametrize("name", functions())
def test_each_wrong_argument_is_named(name):
    assert list(faults(name, functions()[name])) == []
