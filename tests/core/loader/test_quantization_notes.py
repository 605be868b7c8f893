"""Notes on low-precision weights: each format is read as its writer meant it, and what is not read is refused."""

import functools
import json

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.core.loader import component, header, quantization_notes
from diffsynth.core.loader.pickled import of_state_dict
from diffsynth.core.loader.recognize import recognize
from diffsynth.errors import CorruptFile, KeyMismatch, Unrecognized

WIDTH = 64


@functools.cache
def hadamard(size):
    """The regular Hadamard matrix, built entry by entry: the product of the entries of H4 at each base-4 digit."""
    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    made = torch.ones(size, size)
    for row in range(size):
        for column in range(size):
            i, j = row, column
            for _ in range(round(size**0.5).bit_length() - 1):
                made[row, column] *= four[i % 4][j % 4]
                i, j = i // 4, j // 4
    return made / size**0.5


def int8(weight, rotation=0):
    if rotation:
        weight = (weight.unflatten(1, (-1, rotation)) @ hadamard(rotation).T).flatten(1)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


def fp8(weight, dtype=torch.float8_e4m3fn, *, bits=False):
    scale = weight.abs().max() / torch.finfo(dtype).max
    stored = (weight / scale).to(dtype)
    return stored.view(torch.uint8) if bits else stored, scale


def mxfp8(weight, *, bits=False):
    """Blocks of 32 with one exponent each, written into the tiles of 128 x 4 number by number."""
    rows, columns = weight.shape[0], weight.shape[1] // 32
    largest = weight.unflatten(1, (columns, 32)).abs().amax(2)
    exponents = (largest.log2().floor() - 8 + 127).clamp(0, 254)
    tall, wide = -(-rows // 128), -(-columns // 4)
    tiles = torch.zeros(tall * wide * 512, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = (row // 128) * wide + column // 4
            within = (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4
            tiles[tile * 512 + within] = int(exponents[row, column])
    stored = (weight.unflatten(1, (columns, 32)) / torch.exp2(exponents - 127).unsqueeze(2)).flatten(1)
    stored = stored.clamp(-448, 448).to(torch.float8_e4m3fn)
    return stored.view(torch.uint8) if bits else stored, tiles.reshape(tall * 128, wide * 4)


FORMATS = {
    "int8, a scale a row": ({"format": "int8_tensorwise"}, int8),
    "int8, rotated in 16": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
        lambda weight: int8(weight, 16),
    ),
    "int8, rotated in 64": (
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64, "per_row": True},
        lambda weight: int8(weight, 64),
    ),
    "fp8": ({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}, fp8),
    "fp8 bits": ({"format": "float8_e4m3fn"}, lambda weight: fp8(weight, bits=True)),
    "e5m2 bits": ({"format": "float8_e5m2"}, lambda weight: fp8(weight, torch.float8_e5m2, bits=True)),
    "mxfp8": ({"format": "mxfp8", "group_size": 32}, mxfp8),
    "mxfp8 bits": ({"format": "mxfp8"}, lambda weight: mxfp8(weight, bits=True)),
}


def quantised(toy, note, make, *, width=WIDTH, fused=False, in_metadata=False):
    """Return the state dict of a random network, and tensors and metadata of a file with its layers quantised."""
    net = toy.Net(toy.NetConfig(width=width))
    torch.manual_seed(0)
    true = {k: torch.randn(v.shape) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    file = {key: value for key, value in true.items() if not key.startswith("layers.")}
    matrices = {key: value for key, value in true.items() if key.startswith("layers.")}
    if fused:
        file["final_norm.weight"], file["final_norm.bias"] = file.pop("norm.weight"), file.pop("norm.bias")
        matrices = {
            f"blocks.{n}.qkv.weight": torch.cat([true[f"layers.{n}.{part}.weight"] for part in "qkv"]) for n in range(2)
        }
    notes = {}
    for key, value in matrices.items():
        layer = key.removesuffix(".weight")
        file[key], file[f"{layer}.weight_scale"] = make(value)
        notes[layer] = note
    if in_metadata:
        return true, file, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": notes})}
    for layer, each in notes.items():
        file[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(each).encode()), dtype=torch.uint8)
    return true, file, {}


def loaded(toy, tensors):
    (found,) = recognize(tensors, toy.ARCHITECTURES, toy.CHECKPOINTS)
    assert found.extra == ()
    return component.load_component(found, tensors, device="cpu", dtype=torch.float32).state_dict()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["tensors", "metadata", "memory"])
def test_weights_are_what_their_writer_meant(toy, tmp_path, name, fused, where):
    note, make = FORMATS[name]
    true, file, metadata = quantised(toy, note, make, fused=fused, in_metadata=where == "metadata")
    if where == "memory":
        tensors = of_state_dict(file)
    else:
        save_file(file, tmp_path / "x.safetensors", metadata)
        tensors = header.read([tmp_path / "x.safetensors"])
    for key, value in loaded(toy, tensors).items():
        error = (value.float() - true[key].float()).norm() / true[key].float().norm().clamp(min=1e-9)
        # int8 rows, E4M3 and E5M2 keep 7, 3 and 2 bits of a number; anything read as something else is off by 100%.
        assert error < (0.08 if "e5m2" in name else 0.04), key


def test_shards_with_notes_of_their_own(toy, tmp_path):
    note, make = FORMATS["fp8 bits"]
    true, file, metadata = quantised(toy, note, make, in_metadata=True)
    layers = json.loads(metadata["_quantization_metadata"])["layers"]
    for number in range(2):
        part = {key: value for key, value in file.items() if key.startswith("layers.1.") == bool(number)}
        own = {layer: each for layer, each in layers.items() if f"{layer}.weight" in part}
        text = json.dumps({"layers": own})
        save_file(part, tmp_path / f"{number}.safetensors", {"_quantization_metadata": text})
    found = loaded(toy, header.read([tmp_path / "0.safetensors", tmp_path / "1.safetensors"]))
    assert all(torch.allclose(found[key].float(), true[key].float(), atol=0.3) for key in true)


REFUSED = {
    "nvfp4": ({"format": "nvfp4"}, "its format is 'nvfp4'"),
    "packed int4": ({"format": "asym_w4a8_int8", "group_size": 16}, "its format is 'asym_w4a8_int8'"),
    "no format": ({}, "its format is None"),
    "another rotation": ({"format": "int8_tensorwise", "hadamard_quip": True}, "hadamard_quip.*may change"),
    "an odd group": ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 48}, "groups of 48"),
    "too large a group": ({"format": "int8_tensorwise", "convrot": True}, "groups of 256, which do not divide"),
    "another dtype": ({"format": "float8_e4m3fn"}, "says float8_e4m3fn, and it is I8"),
    "other blocks": ({"format": "mxfp8", "group_size": 16}, "says mxfp8, and it is I8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_name(toy, name):
    note, message = REFUSED[name]
    _, file, _ = quantised(toy, note, int8)
    with pytest.raises(Unrecognized, match=rf"(?s)layers\.0\.q\.weight is quantised.*{message}.*Use a file in bf16"):
        loaded(toy, of_state_dict(file))


def test_bits_and_exponents_without_a_note_are_refused(toy):
    for make in (lambda weight: fp8(weight, bits=True), mxfp8):
        _, file, _ = quantised(toy, {}, make)
        bare = {key: value for key, value in file.items() if not key.endswith("comfy_quant")}
        with pytest.raises(Unrecognized, match="and no note .* says which"):
            loaded(toy, of_state_dict(bare))


def test_integers_without_a_scale_are_refused(toy):
    _, file, _ = quantised(toy, {}, int8)
    bare = {key: value for key, value in file.items() if not key.endswith(("comfy_quant", "weight_scale"))}
    with pytest.raises(KeyMismatch, match=r"layers\.0\.q\.weight is int8.*and 3 more, without a scale or a note"):
        loaded(toy, of_state_dict(bare))


def test_a_note_without_its_scale_or_weight(toy):
    note, make = FORMATS["int8, a scale a row"]
    _, file, _ = quantised(toy, note, make)
    del file["layers.1.q.weight_scale"]
    with pytest.raises(Unrecognized, match=r"layers\.1\.q\.weight is quantised .* and there is no weight_scale"):
        loaded(toy, of_state_dict(file))
    del file["layers.1.q.weight"]
    with pytest.raises(Unrecognized, match=r"how layers\.1\.q\.weight is quantised, and the file has no such tensor"):
        loaded(toy, of_state_dict(file))


@pytest.mark.parametrize("text", [b"", b"[1]", b"{", b"\xff", b'{"a":' * 5000])
def test_notes_that_do_not_parse(tmp_path, text):
    note = torch.tensor(list(text), dtype=torch.uint8)
    save_file({"a.weight": torch.zeros(2, 2), "a.comfy_quant": note}, tmp_path / "x.safetensors")
    with pytest.raises(CorruptFile, match=r"a\.comfy_quant does not parse as JSON"):
        header.read([tmp_path / "x.safetensors"])
    with pytest.raises(CorruptFile, match="does not parse as JSON|not notes by layer"):
        quantization_notes.in_metadata("x", {"_quantization_metadata": text.decode(errors="replace")})


def test_metadata_of_another_form():
    with pytest.raises(CorruptFile, match="not notes by layer"):
        quantization_notes.in_metadata("x", {"_quantization_metadata": '{"layers": [1]}'})
    assert quantization_notes.in_metadata("x", {}) == {}


def test_a_note_too_long_to_be_one(tmp_path):
    save_file({"a.comfy_quant": torch.zeros(70000, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    with pytest.raises(CorruptFile, match="70000 bytes; expected a note, U8 of at most 65536"):
        header.read([tmp_path / "x.safetensors"])
