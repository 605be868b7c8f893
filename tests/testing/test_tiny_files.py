"""Tests of the tiny hub's weight files: keys, shapes, file names and values."""

from __future__ import annotations

import pytest
import torch

from diffsynth.core.loader.convert import Apply, Constant, Dequantize, Drop, Fuse, Rename, Reshape, Split
from diffsynth.core.loader.layouts import layout_of
from diffsynth.errors import KeyMismatch
from diffsynth.models import config as models_config
from diffsynth.models.checkpoints import CHECKPOINTS
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.spec import CheckpointSpec
from diffsynth.testing import tiny_files
from diffsynth.testing.tiny_files import TinyTensor, file_names, random_tensors, tiny_shapes

PUBLISHED = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}
TOY = CheckpointSpec(name="toy", architecture="toy")


def wanted(module, config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(tensor.shape) for key, tensor in module(config).state_dict().items()}


def test_a_published_head_is_written_and_dropped_again():
    checkpoint = PUBLISHED["qwen3_text_encoder/with_head"]
    own = wanted(Qwen3TextEncoder, models_config.TINY_QWEN3_TEXT_ENCODER)
    shapes = tiny_shapes(checkpoint, own)
    assert shapes["lm_head.weight"] == (120, 48) == shapes["model.embed_tokens.weight"]
    assert set(shapes) == {"lm_head.weight", *own}
    assert list(shapes) == [key for key in layout_of(checkpoint) if key in shapes]


def test_an_autoencoder_under_the_names_of_its_first_publisher():
    own = wanted(FluxAutoencoder, models_config.TINY_FLUX_AUTOENCODER)
    shapes = tiny_shapes(PUBLISHED["flux_autoencoder/original"], own)
    assert len(shapes) == len(own)
    assert shapes["encoder.mid.attn_1.q.weight"] == (128, 128, 1, 1)
    # The published names count the decoder's levels in the opposite order.
    assert shapes["decoder.up.3.block.0.conv1.weight"] == own["decoder.up_blocks.0.resnets.0.conv1.weight"]


@pytest.fixture
def layout(monkeypatch):
    """Return a function that sets layout and rules of the toy checkpoint."""

    def give(shapes, *rules):
        monkeypatch.setattr(tiny_files, "layout_of", lambda checkpoint: shapes)
        monkeypatch.setattr(tiny_files, "rules_of", lambda checkpoint: rules)

    return give


QKV = Split("blocks.{n}.qkv", tuple(f"layers.{{n}}.{part}" for part in "qkv"))
ONE_LAYER = {"layers.0.q": (8, 8), "layers.0.k": (8, 8), "layers.0.v": (8, 8)}
GATED = Apply(sum, ("w", "g"), "x", lambda weight, gate: weight)

CASES = {
    "layers beyond the tiny depth": (
        Rename("b.{n}", "a.{n}"), {f"b.{n}": (64, 32) for n in range(9)}, {"a.0": (8, 4), "a.1": (8, 4)},
        {"b.0": (8, 4), "b.1": (8, 4)},
    ),
    "split": (QKV, {f"blocks.{n}.qkv": (192, 64) for n in range(3)}, ONE_LAYER, {"blocks.0.qkv": (24, 8)}),
    "fuse": (
        Fuse(("a", "b"), "ab", 1), {"a": (5, 64), "b": (5, 32)}, {"ab": (5, 12)}, {"a": (5, 8), "b": (5, 4)},
    ),
    "reshape": (Reshape("conv", "linear", (-1, 6)), {"conv": (64, 6, 1)}, {"linear": (8, 6)}, {"conv": (8, 6, 1)}),
    "scale": (
        Dequantize("w", "s", "x"), {"w": (64, 32), "s": (64, 1)}, {"x": (16, 8)}, {"w": (16, 8), "s": (16, 1)},
    ),
    "apply": (GATED, {"w": (64, 32), "g": (64,)}, {"x": (8, 4)}, {"w": (8, 4), "g": (8,)}),
    "drop": (
        Drop("unread"), {"unread": (64, 7), "own": (64, 32)}, {"own": (8, 4)}, {"unread": (8, 7), "own": (8, 4)},
    ),
    "constant": (Constant("one", (1,)), {"own": (64,)}, {"own": (8,), "one": (1,)}, {"own": (8,)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_shapes_go_forward_through_a_rule(case, layout):
    rule, published, small, expected = CASES[case]
    layout(published, rule)
    assert tiny_shapes(TOY, small) == expected


def test_a_rule_that_names_a_size_has_no_small_file(layout):
    layout({"conv": (64, 64, 1, 1)}, Reshape("conv", "linear", (64, 64)))
    with pytest.raises(ValueError, match=r"key 'conv': no small shape in place of \(64, 64, 1, 1\).*Reshape"):
        tiny_shapes(TOY, {"linear": (8, 8)})


def test_a_wrong_rule_cannot_write_the_file_that_excuses_it(layout):
    layout({"a": (64, 64), "b": (64, 64)}, Split("a", ("q", "k")))
    with pytest.raises(KeyMismatch, match=r"the tiny file of .* does not fit: 1 missing \(v\)"):
        tiny_shapes(TOY, {"q": (4, 8), "k": (4, 8), "b": (8, 8), "v": (8, 8)})


def test_rules_without_a_layout():
    checkpoint = CheckpointSpec(name="toy", architecture="toy", rules="diffsynth.models.convert:QWEN3_WITH_HEAD")
    with pytest.raises(ValueError, match="'toy' has rules and no layout"):
        tiny_shapes(checkpoint, {"a": (1,)})


def test_neither_rules_nor_a_layout():
    assert tiny_shapes(TOY, {"own": (8, 4)}) == {"own": (8, 4)}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("vae/model.safetensors", ["vae/model.safetensors"]),
        ("*.safetensors", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        ("high/part*.safetensors", ["high/part-00001-of-00002.safetensors", "high/part-00002-of-00002.safetensors"]),
        ("model-*.bin", ["model-00001-of-00002.bin", "model-00002-of-00002.bin"]),
        ("t5.pth", ["t5.pth"]),
    ],
)
def test_file_names(pattern, names):
    found, index = file_names(pattern, "model", shards=2)
    assert found == names
    assert bool(index) is ("*" in pattern)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("transformer/", "expected a file"),
        ("*/model.safetensors", "expected a file"),
        ("model_[ab].safetensors", "expected a file"),
        ("a*b.safetensors", "set file_stem"),
    ],
)
def test_patterns_that_name_no_file(pattern, message):
    with pytest.raises(ValueError, match=message):
        file_names(pattern, "model", shards=2)


def test_nothing_is_neutral():
    bf16 = torch.bfloat16
    shapes = {"x.weight": (300, 200), "norm.weight": (200,), "x.bias": (200,), "token": (1, 200), "gain": ()}
    tensors = random_tensors({key: TinyTensor(shape, bf16) for key, shape in shapes.items()}, seed="a")
    assert float(tensors["x.weight"].float().std()) == pytest.approx(200**-0.5, rel=0.05)
    assert float(tensors["token"].float().std()) == pytest.approx(1, rel=0.2)
    assert 0.89 < tensors["norm.weight"].min() < 0.95 < 1.05 < tensors["norm.weight"].max() < 1.11
    assert 0.05 < float(tensors["x.bias"].float().std()) < 0.15
    assert tensors["gain"] != 1
    counter = random_tensors({"n": TinyTensor((), torch.int64)}, seed="a")["n"]
    assert (counter.dtype, int(counter)) == (torch.int64, 1)
