"""Methods by name."""

from __future__ import annotations

import pytest

from diffsynth.core.quant.methods import method_of, methods


def test_each_name_makes_a_method_of_that_name() -> None:
    for name in methods():
        method = method_of(name, {})
        assert method.name == name
        assert method_of(method.name, method.options) == method
    assert method_of("fp8_block", {"block": 64}).options == {"block": 64}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fp8_rows", {}, "method 'fp8_rows' is unknown; did you mean 'fp8_row'"),
        ("int8_block", {"blok": 64}, "has no option 'blok'; did you mean 'block'.* It takes block"),
        ("int8_row", {"block": 64}, "has no option 'block'.* It takes none"),
        ("int8_block", {"block": -1}, "block=-1"),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(name, options)
