"""Damaged, unusual and hostile files: each gives a clear error or loads correctly, and raises no other exception."""

import contextlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from diffsynth.core.loader import header
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import find
from diffsynth.core.loader.reader.source import read_tensors
from diffsynth.errors import CheckpointError, CorruptFile, NoFiles

VALID = save({"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(5, dtype=torch.bfloat16)}, {"note": "x"})

fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path, entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "x.safetensors"


def fails(file, message, kind=CorruptFile):
    with pytest.raises(kind, match=message) as caught:
        read_files([file])
    assert str(file) in str(caught.value)


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'


@pytest.mark.parametrize("bit", range(64))
def test_a_flipped_bit_of_the_length(file, bit):
    data = bytearray(VALID)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    fails(file, "truncated|damaged|does not parse|no header|is not a safetensors file|is JSON|web page")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a": tensor(), "b": tensor(offsets=(4, 12))}, "tensors 'a' and 'b' overlap at byte"),
        ({"a": tensor(), "b": tensor()}, "overlap"),
        (TWICE, "it has 'a' twice"),
        (b'{"a":{"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}', "it has 'shape' twice"),
        ({"a": tensor("F32_X")}, "'a' has dtype 'F32_X'; expected one of .*BF16"),
        ({"a": tensor(["F32"])}, "'a' has dtype"),
        ({"a": tensor(shape=(-2,))}, r"'a' has shape \[-2\]; expected extents from 0 up"),
        ({"a": tensor(shape=(2.0,))}, "'a' has shape"),
        ({"a": tensor(shape=(True, 2))}, "'a' has shape"),
        ({"a": tensor(shape=(2**63,))}, "'a' has shape"),
        ({"a": {**tensor(), "shape": 2}}, "'a' has shape 2"),
        ({"a": tensor(offsets=(8, 0))}, "begins at byte"),
        ({"a": tensor(offsets=(-8, 0))}, "'a' has data_offsets"),
        ({"a": tensor(offsets=(0, 4, 8))}, "'a' has data_offsets"),
        ({"a": tensor(shape=(2**62, 2**62), offsets=(0, 8))}, "spans 8 bytes, expected"),
        ({"a": tensor(shape=(2**40,), offsets=(0, 2**42))}, r"its header says 4398\d+ bytes, the file has \d+"),
        ({"a": {"dtype": "F32"}}, "entry of 'a' lacks data_offsets, shape"),
        ({"a": [1]}, "entry of 'a' is a list"),
        (b'{"a":NaN}', "NaN is no JSON"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "does not parse"),
        (b'{"a\xff":1}', "does not parse"),
        (b'{"a":' * 50_000, "nested too deeply|does not parse"),
        ({"__metadata__": {"step": 3}}, "its metadata has 3 under 'step', and safetensors allows only text. Write the"),
        ({"__metadata__": [1]}, "its __metadata__ is a list"),
    ],
)  # fmt: skip
def test_headers_that_say_what_cannot_be(file, entries, message):
    fails(write(file, entries, bytes(16)), message)


@pytest.mark.parametrize("length", [2**63, 2**40, header.HEADER_LIMIT + 1])
def test_a_header_that_announces_too_much_allocates_nothing(file, length):
    write(file, {"a": tensor()}, bytes(8), length=length)
    os.truncate(file, min(length + 8, 2**40))  # a hole: the file is as long as it says, and takes no disk
    tracemalloc.start()
    fails(file, f"damaged: it announces a header of {length} bytes, and the format allows 100000000")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000


def test_tensors_that_announce_too_much_allocate_nothing(file):
    write(file, {f"a{i}": tensor(shape=(2**45,), offsets=(i * 2**47, (i + 1) * 2**47)) for i in range(4)})
    tracemalloc.start()
    fails(file, "truncated")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 500_000


def test_a_length_that_looks_like_the_start_of_a_web_page(file):
    """A header of 60 bytes starts with the byte of `<`; such files were once taken for web pages."""
    for first in (0x3C, 0x7B):  # "<" and "{"
        text = json.dumps({"a": tensor()}, separators=(",", ":")).encode()
        write(file, text.ljust(first), bytes(8))
        assert file.read_bytes()[0] == first
        assert read_files([file]).shapes == {"a": (2,)}


def read_all(file):
    return read_tensors(read_files([file]), device="cpu")


def test_gaps_and_bytes_behind_the_last_tensor_do_no_harm(file):
    values = torch.tensor([1.0, 2.0])
    data = bytes(16) + values.numpy().tobytes() + bytes(3) + values.neg().numpy().tobytes() + b"more"
    write(file, {"late": tensor(offsets=(27, 35)), "early": tensor(offsets=(16, 24))}, data)
    read = read_all(file)
    assert torch.equal(read["early"], values)
    assert torch.equal(read["late"], -values)


def test_tensors_without_elements_and_without_axes(file):
    entries = {
        "none": tensor(shape=(0, 4), offsets=(0, 0)),
        "scalar": tensor(shape=(), offsets=(0, 4)),
        "also none": tensor(shape=(3, 0), offsets=(4, 4)),
        "inside": tensor(shape=(0,), offsets=(2, 2)),
    }
    read = read_all(write(file, entries, torch.tensor(2.5).numpy().tobytes()))
    assert {key: tuple(value.shape) for key, value in read.items()} == read_files([file]).shapes
    assert read["scalar"].item() == 2.5


def test_keys_in_every_script(file):
    names = ["größe.weight", "重み", "вес.0", "🙂", "a b", 'quote"d', "new\nline", "{n}", "..", ""]
    entries = {name: tensor(shape=(1,), offsets=(4 * i, 4 * i + 4)) for i, name in enumerate(names)}
    read = read_all(write(file, entries, torch.arange(float(len(names))).numpy().tobytes()))
    assert {name: value.item() for name, value in read.items()} == dict(zip(names, range(len(names)), strict=True))
    assert header.signature(read_files([file]).shapes)


def test_links(tmp_path, file):
    file.symlink_to(file)
    fails(file, "is a link to .*, which leads back to itself", NoFiles)
    with pytest.raises(NoFiles, match="which leads back to itself"):
        find(ModelConfig(file))
    gone = tmp_path / "gone.safetensors"
    gone.symlink_to(tmp_path / "nowhere")
    fails(gone, "is a link to .*nowhere, which leads to nothing", NoFiles)
    kept = tmp_path / "blob"
    kept.write_bytes(VALID)
    good = tmp_path / "good.safetensors"
    good.symlink_to(kept)
    assert set(read_files([good]).tensors) == {"a.weight", "b"}


def test_a_folder_that_contains_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    folder = tmp_path / "owner" / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x.safetensors").write_bytes(VALID)
    (folder / "sub" / "again").symlink_to(folder)
    (folder / "loop").symlink_to(folder / "loop")
    config = ModelConfig(model_id="owner/model", origin_file_pattern="**/*.safetensors", skip_download=True)
    assert find(config) == [folder / "sub" / "x.safetensors"]


def test_neither_a_pipe_nor_a_folder(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    fails(tmp_path / "pipe.safetensors", "is no regular file", NoFiles)
    with pytest.raises(NoFiles, match="does not exist"):
        read_files([tmp_path / "missing.safetensors"])


class TestChanged:
    @pytest.fixture
    def read(self, file):
        file.write_bytes(VALID)
        return read_files([file])

    def test_untouched(self, read, file):
        read.check_unchanged(file)
        with file.open("rb") as stream:
            read.check_unchanged(file, stream.fileno())

    def test_replaced_by_one_of_the_same_size_and_time(self, read, file, tmp_path):
        stat = file.stat()
        (tmp_path / "new").write_bytes(VALID)
        os.utime(tmp_path / "new", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(tmp_path / "new", file)
        with pytest.raises(CorruptFile, match="changed since its header was read. Load it again"):
            read.check_unchanged(file)

    def test_written_to(self, read, file):
        file.write_bytes(VALID + b"more")
        with pytest.raises(CorruptFile, match=f"it had {len(VALID)} bytes and has {len(VALID) + 4} now"):
            read.check_unchanged(file)

    def test_gone(self, read, file):
        file.unlink()
        with pytest.raises(CorruptFile, match="is gone since its header was read"):
            read.check_unchanged(file)

    def test_a_file_that_was_opened_before_it_was_replaced_is_still_the_one(self, read, file, tmp_path):
        with file.open("rb") as stream:
            (tmp_path / "new").write_bytes(VALID)
            os.replace(tmp_path / "new", file)
            read.check_unchanged(file, stream.fileno())

    def test_every_part_is_remembered(self, tmp_path):
        (tmp_path / "1.safetensors").write_bytes(save({"a": torch.ones(1)}))
        torch.save({"b": torch.ones(1)}, tmp_path / "2.pth")
        paths = [tmp_path / "1.safetensors", tmp_path / "2.pth"]
        assert set(read_files(paths).stamps) == set(paths)


def only_checkpoint_errors(file, content):
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        header.signature(read_files([file]).shapes)


@fuzz
@given(st.binary(max_size=200))
def test_arbitrary_bytes(tmp_path, content):
    only_checkpoint_errors(tmp_path / "x.safetensors", content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
near_entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I128"]) | json_values,
        "shape": st.lists(st.integers(-1, 2**65), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40) | st.integers(), max_size=3) | json_values,
        "__metadata__": json_values,
    },
)


@fuzz
@given(st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), near_entries | json_values, max_size=3))
def test_arbitrary_headers(tmp_path, entries):
    text = json.dumps(entries).encode()
    only_checkpoint_errors(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + bytes(40))


@fuzz
@given(st.data())
def test_mutated_files(tmp_path, data):
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content)))
        length = data.draw(st.integers(0, 8))
        content[at : at + length] = data.draw(st.binary(max_size=8))
    only_checkpoint_errors(tmp_path / "x.safetensors", bytes(content))


@settings(fuzz, max_examples=60)
@given(st.data())
def test_mutated_pickles(tmp_path, data):
    whole = Path(tmp_path / "whole.pth")
    if not whole.exists():
        torch.save({"state_dict": {"a": torch.ones(3), "b": {"c": torch.zeros(2)}}}, whole)
    content = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, len(content)))
    content[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    only_checkpoint_errors(tmp_path / "x.pth", bytes(content))


def test_pickles_that_are_no_state_dict(tmp_path):
    file = tmp_path / "x.pth"
    torch.save([torch.ones(1)], file)
    fails(file, "holds a list; expected a dict of tensors")
    torch.save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)}, file)
    with pytest.raises(CorruptFile, match=r"two tensors are called 'a\.b'"):
        read_files([file])
    torch.save({"a": torch.eye(2).to_sparse()}, file)
    with pytest.raises(CorruptFile, match=r"'a' is a torch\.sparse_coo tensor; expected a dense one"):
        read_files([file])
    file.write_bytes(b"")
    fails(file, "is empty")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n")
    fails(file, "Git-LFS pointer, not the weights of 12,345 bytes")
