"""Tests of `diffsynth recognize` on the layouts that ship with core, written as files without data."""

import gzip
import importlib.resources
import json
import struct
import subprocess
import sys

import pytest
from click.testing import CliRunner

from diffsynth import _discovery
from diffsynth.cli.group import program


def write_layout(path, layout, skip=0):
    package, _, name = layout.partition(":")
    data = json.loads(gzip.decompress(importlib.resources.files(package).joinpath(name).read_bytes()))
    write_shapes(path, dict(list(data["tensors"].items())[skip:]))


def write_shapes(path, shapes):
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 4
        for extent in shape:
            size *= extent
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)  # a sparse file, which takes no disk space


@pytest.fixture
def layout():
    found = [one.spec for one in _discovery.catalog().checkpoints if one.plugin == "core" and one.spec.layout]
    return min(found, key=lambda spec: spec.name)


def recognize(*arguments):
    return CliRunner().invoke(program, ["recognize", *map(str, arguments)])


def test_a_known_file(tmp_path, layout):
    write_layout(tmp_path / "a.safetensors", layout.layout)
    result = recognize(tmp_path / "a.safetensors")
    assert result.exit_code == 0, result.output
    assert layout.architecture in result.stdout
    assert "signature" in result.stdout
    (answer,) = json.loads(recognize("--json", tmp_path / "a.safetensors").stdout)
    assert answer["components"][0]["checkpoint"] == layout.name
    assert answer["error"] is None


def test_a_file_that_cannot_be_run_yet(tmp_path):
    """It is recognised, so the exit status is that of success, and a line says what it is."""
    shapes = {"positional_embedding": (32, 8), "prefer_value_embedder.0.weight": (8, 4)}
    write_shapes(tmp_path / "a.safetensors", shapes | {"prefer_value_embedder.2.weight": (8, 8)})
    result = recognize(tmp_path / "a.safetensors")
    assert result.exit_code == 0, result.output
    assert "flux_value_controller" in result.stdout
    assert "a.safetensors: recognised, not yet runnable: an attribute of AttriCtrl, which" in result.stderr
    (answer,) = json.loads(recognize("--json", tmp_path / "a.safetensors").stdout)
    assert answer["components"][0]["config"] == {}
    assert answer["components"][0]["not_runnable"].startswith("an attribute of AttriCtrl")


def test_a_folder_and_a_file_inside_it(tmp_path, layout):
    write_layout(tmp_path / "a.safetensors", layout.layout)
    assert layout.architecture in recognize(tmp_path).stdout


def test_nothing_matches(tmp_path, layout):
    write_layout(tmp_path / "a.safetensors", layout.layout)
    (tmp_path / "b.safetensors").write_bytes(
        struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + b"\0" * 4
    )
    result = recognize(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert result.exit_code == 3
    assert layout.architecture in result.stdout
    assert "b.safetensors" in result.stderr
    as_json = recognize("--json", tmp_path / "b.safetensors")
    assert as_json.exit_code == 3
    assert json.loads(as_json.stdout)[0]["error"]


def test_files_that_cannot_be_read_are_not_unknown_ones(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    result = recognize(tmp_path / "a.safetensors")
    assert result.exit_code == 2
    assert "is empty" in result.stderr
    assert recognize(tmp_path / "missing.safetensors").exit_code == 2
    assert recognize(tmp_path / "sub").exit_code == 2
    assert recognize().exit_code == 2


def test_one_bad_file_does_not_silence_the_others(tmp_path, layout):
    write_layout(tmp_path / "a.safetensors", layout.layout)
    (tmp_path / "page.safetensors").write_bytes(b"<html>")
    result = recognize(tmp_path / "page.safetensors", tmp_path / "missing", tmp_path / "a.safetensors")
    assert result.exit_code == 2
    assert layout.architecture in result.stdout
    assert "is a web page" in result.stderr
    assert "missing does not exist" in result.stderr
    answers = json.loads(recognize("--json", tmp_path / "page.safetensors", tmp_path / "a.safetensors").stdout)
    assert [answer["kind"] for answer in answers] == ["CorruptFile", None]
    assert "Traceback" in recognize("--traceback", tmp_path / "missing").stderr


def test_shards_of_one_set_are_answered_once(tmp_path, layout):
    first, second = (tmp_path / f"m-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_layout(first, layout.layout)
    write_layout(second, layout.layout)
    answers = json.loads(recognize("--json", first, second, tmp_path).stdout)
    assert [answer["files"] for answer in answers] == [[str(first), str(second)]]


def in_a_fresh_process(path):
    """Return the program's exit code, the heavy modules that it imported, and its stderr."""
    code = """
import sys
from diffsynth.cli import main

try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "numpy", "transformers", "safetensors") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, "recognize", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout.splitlines()[-1], result.stderr


def test_no_torch(tmp_path, layout):
    write_layout(tmp_path / "a.safetensors", layout.layout)
    assert in_a_fresh_process(tmp_path / "a.safetensors") == (0, "[]", "")


def test_no_torch_for_folders_shards_and_misses(tmp_path, layout):
    first, second = (tmp_path / f"m-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_layout(first, layout.layout)
    second.write_bytes(
        struct.pack("<Q", 64) + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(64) + b"\0" * 4
    )
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": first.name, "w": second.name}}))
    for path in (tmp_path, index, second):
        code, heavy, said = in_a_fresh_process(path)
        assert (code, heavy) == (0, "[]"), said
        assert "1 key that nothing uses: w" in said
    first.unlink()
    index.unlink()
    alone = second.rename(tmp_path / "alone.safetensors")
    code, heavy, said = in_a_fresh_process(alone)
    assert (code, heavy) == (3, "[]")
    assert "no installed architecture has keys like" in said
