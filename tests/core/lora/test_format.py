"""LoRA files: all usual key names are read, other files are refused by name, and what is saved is read to the bit."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lora_networks as small
from diffsynth.core.loader import lora_keys
from diffsynth.core.lora import fit, parse, read_lora, save_lora
from diffsynth.core.lora import format as lora_format
from diffsynth.core.lora.format import to_state_dict
from diffsynth.errors import CorruptFile, KeyMismatch

SPELLINGS = {
    "bare": "{}.lora_{A,B}.weight",
    "of an adapter": "{}.lora_{A,B}.default.weight",
    "down and up": "{}.lora_{down,up}.weight",
    "old diffusers": "transformer.{}.lora.{down,up}.weight",
    "comfy": "diffusion_model.{}.lora_{A,B}.weight",
    "diffusers": "transformer.{}.lora_{A,B}.weight",
    "peft": "base_model.model.{}.lora_{A,B}.weight",
    "peft of a transformer": "base_model.model.transformer.{}.lora_{A,B}.default.weight",
    "kohya": "lora_unet_[].lora_{down,up}.weight",
    "of a pipeline": "pipe.dit.{}.lora_{A,B}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    made = small.factors()
    lora = fit(parse(small.state_dict(SPELLINGS[spelling], made)), small.network())
    assert lora.layers.keys() == made.keys()
    for name, (down, up) in made.items():
        assert torch.equal(lora.layers[name].down, down)
        assert torch.equal(lora.layers[name].up, up)
        assert lora.layers[name].scale == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(tmp_path, value):
    tensors = small.state_dict("{}.lora_{A,B}.weight", small.factors())
    key = sorted(tensors)[0]
    tensors[key] = tensors[key].clone()
    tensors[key][0, 0] = value
    with pytest.raises(CorruptFile, match=rf"the given state_dict: 1 of \d+ tensors hold NaN or infinity: {key}"):
        read_lora(tensors, strict=False)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CorruptFile, match=r"x\.safetensors: 1 of"):
        read_lora(tmp_path / "x.safetensors")


def test_an_alpha_that_is_a_plain_number_in_a_pickle(tmp_path):
    tensors = small.state_dict("{}.lora_{A,B}.weight", small.factors())
    key = sorted(tensors)[0].replace("lora_A.weight", "alpha")
    torch.save({"state_dict": {**tensors, key: 6}}, tmp_path / "x.pt")
    assert read_lora(tmp_path / "x.pt").layers[key.removesuffix(".alpha")].alpha == 6


def test_an_alpha_that_is_not_finite():
    tensors = small.state_dict("{}.lora_{A,B}.weight", small.factors())
    key = sorted(tensors)[0].replace("lora_A.weight", "alpha")
    with pytest.raises(CorruptFile, match=key):
        parse({**tensors, key: float("inf")})


def test_alpha_is_each_layers_own():
    """DiffSynth-Studio applied the first alpha to all layers."""
    alphas = {name: float(1 + number) for number, name in enumerate(small.TARGETS)}
    keys = small.state_dict(SPELLINGS["kohya"], alpha=alphas, alpha_key="lora_unet_[].alpha")
    layers = fit(parse(keys), small.network()).layers
    assert {name: layer.scale for name, layer in layers.items()} == {name: alpha / 3 for name, alpha in alphas.items()}


def test_a_linear_layer_written_as_a_convolution_of_one_pixel():
    made = {name: (a[..., None, None], b[..., None, None]) for name, (a, b) in small.factors().items()}
    layer = parse(small.state_dict(made=made)).layers[small.TARGETS[0]]
    assert torch.equal(layer.down, small.factors()[small.TARGETS[0]][0])


NAME = small.TARGETS[0]
REFUSED = {
    "no LoRA": (lambda _: {"blocks.0.attn.to_q.weight": torch.ones(2, 2)}, "holds no LoRA: none of its 1 keys"),
    "nothing": (lambda _: {}, "holds no LoRA: none of its 0 keys"),
    "magnitudes": (
        lambda keys: keys | {f"{NAME}.dora_scale": torch.ones(5)},
        r"dora_scale has shape \(5,\); it does no",
    ),
    "magnitudes alone": (lambda keys: keys | {"a.dora_scale": torch.ones(8)}, "a magnitude but no matrices for a"),
    "half a LoKr": (lambda keys: {f"{NAME}.lokr_w1": torch.ones(2, 2)}, "lacks lokr_w2_a, lokr_w2_b; it has lokr_w1"),
    "two LoKrs": (
        lambda keys: {f"{NAME}.lokr_{slot}": torch.ones(2, 2) for slot in ("w1", "w1_a", "w2")},
        "has lokr_w1 and lokr_w1_a; expected one of them",
    ),
    "half a LoHa": (lambda keys: {f"{NAME}.hada_w1_a": torch.ones(2, 2)}, "the LoHa of .* lacks hada_w1_b"),
    "two kinds": (
        lambda keys: keys | {f"{NAME}.lokr_{slot}": torch.ones(2, 2) for slot in ("w1", "w2")},
        "is changed as LoRA and as LoKr; expected one",
    ),
    "a bias alone": (lambda keys: keys | {"a.lora_B.bias": torch.ones(8)}, "a bias but no matrices for a"),
    "OFT": (lambda keys: keys | {"a.oft_blocks": torch.ones(2, 2, 2)}, "a.oft_blocks: OFT"),
    "integers": (
        lambda keys: keys | {f"{NAME}.lora_A.weight": torch.ones(3, 8, dtype=torch.int8)},
        "stored as torch.int8; expected floating numbers",
    ),
    "unknown": (lambda keys: keys | {"text_projection": torch.ones(8)}, "text_projection: no part of a LoRA"),
    "half": (lambda keys: {k: v for k, v in keys.items() if "lora_B" not in k}, "the down matrix of blocks.0.*alone"),
    "two ranks": (lambda keys: keys | {f"{NAME}.lora_B.weight": torch.ones(8, 5)}, "rank 3, and the up .*rank 5"),
    "a vector": (lambda keys: keys | {f"{NAME}.lora_A.weight": torch.ones(3)}, "expected 2 axes each"),
    "no rank": (
        lambda keys: {f"{NAME}.lora_A.weight": torch.ones(0, 8), f"{NAME}.lora_B.weight": torch.ones(8, 0)},
        "has rank 0",
    ),
    "two adapters": (
        lambda keys: keys | small.state_dict("{}.lora_{A,B}.style.weight"),
        "several adapters: '', 'style'",
    ),
    "twice": (lambda keys: keys | small.state_dict("{}.lora_{down,up}.weight"), "the same matrix under another"),
    "alpha alone": (lambda keys: keys | {"blocks.9.alpha": torch.tensor(1.0)}, "alpha but no matrices for blocks.9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    break_it, message = REFUSED[name]
    with pytest.raises(KeyMismatch, match=message):
        parse(break_it(small.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_what_is_saved_is_read_to_the_bit(dtype, alpha, tmp_path):
    made = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in small.factors().items()}
    lora = parse(small.state_dict(made=made, alpha=alpha))
    save_lora(lora, tmp_path / "before.safetensors")
    lora = read_lora(tmp_path / "before.safetensors")  # its names have the prefix already
    file = save_lora(lora, tmp_path / "new" / "style.safetensors", metadata={"rank": "3"})
    again = fit(read_lora(file), small.network())
    assert again.where == str(file)
    found, expected = to_state_dict(again), small.state_dict(made=made, alpha=alpha)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)
    with safe_open(file, "pt") as opened:
        assert set(opened.keys()) == {f"diffusion_model.{key}" for key in expected}
        assert opened.metadata() == {"rank": "3", "format": "pt"}


def test_metadata_is_text(tmp_path):
    with pytest.raises(ValueError, match=r"metadata\['rank'\] is 3; expected text"):
        save_lora(small.state_dict(), tmp_path / "a.safetensors", metadata={"rank": 3})
    assert list(tmp_path.iterdir()) == []


def test_a_lora_of_more_modules_than_any_network_has_is_refused_by_its_header(tmp_path, monkeypatch):
    """50,000 layers took 16 s, because all their tensors were read before they were counted."""
    entries, end = {}, 0
    for index in range(21):
        for side in "AB":
            entries[f"layers.{index}.lora_{side}.weight"] = {
                "dtype": "F32",
                "shape": [1, 1],
                "data_offsets": [end, end + 4],
            }
            end += 4
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))
    for module in (lora_keys, lora_format):
        monkeypatch.setattr(module, "MAX_MODULES", 20)
    monkeypatch.setattr(lora_format, "load_state_dict", None)
    with pytest.raises(KeyMismatch, match="changes more than 20 modules, which no network has; it is not read"):
        read_lora(tmp_path / "a.safetensors")
