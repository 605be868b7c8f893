"""The choice of layers and methods."""

from __future__ import annotations

import json

import pytest

from diffsynth.core.quant.config import MixedQuantizeConfig, QuantizeConfig, assignments, quantize_config

NAMES = ("embed", "blocks.0.attn.to_q", "blocks.0.ff", "blocks.1.attn.to_q", "blocks.1.ff", "norm_out")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, NAMES[:5]),
        ({"target_modules": ["to_q"]}, ("blocks.0.attn.to_q", "blocks.1.attn.to_q")),
        ({"target_modules": ["attn.to_q", "embed"]}, ("embed", "blocks.0.attn.to_q", "blocks.1.attn.to_q")),
        ({"target_modules": ["blocks.*.ff"]}, ("blocks.0.ff", "blocks.1.ff")),
        ({"exclude_modules": ["to_q", "blocks.1.*"]}, ("embed", "blocks.0.ff")),
        ({"target_modules": ["norm_out"]}, ("norm_out",)),
    ],
)
def test_layers_by_name(fields, expected) -> None:
    config = QuantizeConfig("fp8_row", **fields)
    assert tuple(assignments(config, NAMES, high_precision=("norm*",))) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["to_qq"]}, "target_modules has 'to_qq', the name of no linear layer; did you mean 'to_q'"),
        ({"exclude_modules": ["block.*"]}, r"exclude_modules has 'block.\*'"),
        ({"exclude_modules": ["*"]}, "leaves no linear layer"),
    ],
)
def test_names_of_no_layer_are_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        assignments(QuantizeConfig("fp8_row", **fields), NAMES)


def test_methods_by_layer() -> None:
    mixed = MixedQuantizeConfig(
        [QuantizeConfig("int8_row", target_modules=["ff"]), QuantizeConfig("fp8_row", exclude_modules=["ff"])]
    )
    found = {name: config.method for name, config in assignments(mixed, NAMES).items()}
    assert found["blocks.0.ff"] == "int8_row"
    assert found["embed"] == "fp8_row"
    twice = MixedQuantizeConfig([QuantizeConfig("int8_row"), QuantizeConfig("fp8_row")])
    with pytest.raises(ValueError, match="two configs quantize embed: int8_row and fp8_row"):
        assignments(twice, NAMES)
    with pytest.raises(ValueError, match="the modes dequant_once and dynamic"):
        MixedQuantizeConfig([QuantizeConfig("a"), QuantizeConfig("b", mode="dequant_once")])


def test_configs_are_written_in_several_ways(tmp_path) -> None:
    fields = {"method": "int8_block", "backend_config_kwargs": {"block": 64}}
    file = tmp_path / "quantize.json"
    file.write_text(json.dumps([fields, {"method": "fp8_row", "target_modules": ["embed"]}]))
    assert quantize_config("fp8_row") == QuantizeConfig("fp8_row")
    assert quantize_config(fields) == QuantizeConfig("int8_block", backend_config_kwargs={"block": 64})
    assert quantize_config(file) == quantize_config(str(file))
    assert [each.method for each in quantize_config(file).configs] == ["int8_block", "fp8_row"]


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (3, TypeError, "quantize=3: expected the name of a method"),
        ({"metod": "fp8_row"}, ValueError, "quantize has 'metod'; did you mean 'method'"),
        ({"mode": "dynamic"}, ValueError, "names no method"),
        ({"method": "fp8_row", "mode": "dynamc"}, ValueError, "mode='dynamc': expected .* did you mean 'dynamic'"),
        ({"method": "fp8_row", "target_modules": "to_q"}, TypeError, "target_modules='to_q': expected a list"),
        ({"method": 8}, TypeError, "method=8"),
        ([], ValueError, "expected a list of QuantizeConfigs"),
    ],
)
def test_bad_configs_are_refused(value, error, message) -> None:
    with pytest.raises(error, match=message):
        quantize_config(value)
