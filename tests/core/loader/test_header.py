import gzip
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.core.loader import header, pickled
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.errors import CorruptFile, KeyMismatch

LAYOUTS = sorted((Path(__file__).parents[2] / "data" / "layouts").glob("*.json.gz"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_signature_equals_the_published_hash(layout):
    facts = json.loads(gzip.decompress(layout.read_bytes()))
    assert header.signature(facts["tensors"]) == facts["signature"]


def test_header_equals_what_was_saved(tmp_path):
    tensors = {"a.weight": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"note": "hello"})
    read = header.read([tmp_path / "x.safetensors"])
    assert read.shapes == {"a.weight": (2, 3), "b": (), "c": (0, 4)}
    assert read.tensors["b"].dtype == "BF16"
    assert read.metadata["note"] == "hello"
    info = read.tensors["a.weight"]
    assert info.end - info.start == 24


def test_shards_merge_and_contradictions_raise(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "2.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "3.safetensors")
    files = [tmp_path / f"{i}.safetensors" for i in (1, 2, 3)]
    assert set(header.read(files[:2]).tensors) == {"a", "b"}
    with pytest.raises(KeyMismatch, match=r"'b' is \(2,\).*\(3,\).*not parts of one checkpoint"):
        header.read(files)


def test_truncated(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 10])
    with pytest.raises(CorruptFile, match=f"truncated: its header says {size} bytes, the file has {size - 10}"):
        header.read([file])
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CorruptFile, match="truncated"):
        header.read([file])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.example/spec/v1\n", "Git-LFS pointer"),
        (b"GGUF\x03\x00\x00\x00....", "GGUF"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04aaaaaaaa", "zip archive"),
        (b"abc", "not a safetensors file"),
        (struct.pack("<Q", 5) + b"hello", "has no header"),
        (struct.pack("<Q", 6) + b"{hello", "header does not parse"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CorruptFile, match=message):
        header.read([file])


def test_a_tensor_whose_bytes_do_not_fit_its_shape(tmp_path):
    text = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CorruptFile, match="spans 8 bytes, expected 16"):
        header.read([file])


def test_pickles_are_unwrapped_and_flattened(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(2), "b": {"c": torch.zeros(3)}}}, tmp_path / "x.pth")
    read = read_files([tmp_path / "x.pth"])
    assert read.shapes == {"a": (2,), "b.c": (3,)}
    assert read.nested == {"a": (2,), "b": {"c": (3,)}}


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"a": Evil()}, tmp_path / "x.pth")
    with pytest.raises(CorruptFile, match="not a torch checkpoint of tensors alone"):
        read_files([tmp_path / "x.pth"])


def test_a_state_dict_in_memory():
    assert pickled.of_state_dict({"a": torch.zeros(2, 1)}).shapes == {"a": (2, 1)}
