"""Copies of declarations are equal to them and share no dict or list with them."""

import dataclasses
from types import MappingProxyType

import pytest

from diffsynth import _discovery, spec
from diffsynth._plain_values import plain_copy
from diffsynth._plugin_loading import KINDS


def containers(value):
    """Yield each mutable value inside a declaration."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, dict | list):
        yield value
        value = value.values() if isinstance(value, dict) else value
    for each in value if isinstance(value, list | tuple) or hasattr(value, "mapping") else ():
        yield from containers(each)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_declaration_is_copied(kind):
    required = {
        field.name: {} if "Mapping" in field.type else () if "tuple" in field.type else "x"
        for field in dataclasses.fields(KINDS[kind])
        if field.default is field.default_factory is dataclasses.MISSING
    }
    declared = [one.spec for one in getattr(_discovery.catalog(), kind)]
    for one in (KINDS[kind](**required), *declared):
        copied = plain_copy(one)
        assert copied == one
        assert type(copied) is KINDS[kind]
        assert not {id(each) for each in containers(one)} & {id(each) for each in containers(copied)}


def test_lists_in_place_of_tuples_and_read_only_mappings():
    given = spec.CheckpointSpec(name="a", architecture="b", files=["o/r:*"], config=MappingProxyType({"x": [1, (2,)]}))
    copied = plain_copy(given)
    assert copied.files == ("o/r:*",)
    assert type(copied.config) is dict
    assert copied.config == {"x": [1, (2,)]}


def test_nested_declarations():
    spelling = spec.LoRASpelling(name="a", layers=("x", 5))
    one = next(each.spec for each in _discovery.catalog().architectures)
    given = dataclasses.replace(one, name="a", lora_spellings=(spelling,))
    with pytest.raises(TypeError, match=r"'a': lora_spellings\[0\]\.layers\[1\] is 5, a int; expected a str"):
        plain_copy(given)
