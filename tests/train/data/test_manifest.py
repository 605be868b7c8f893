import json

import pytest

from diffsynth.errors import TrainingError
from diffsynth_train.data.manifest import read_manifest

ROWS = [{"image": "a.png", "prompt": "Äpfel, rot"}, {"image": "b.png", "prompt": "日本"}]


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def written(path, rows=ROWS):
    if path.suffix == ".csv":
        text = "image,prompt\n" + "\n".join(f'{row["image"]},"{row["prompt"]}"' for row in rows)
    elif path.suffix == ".json":
        text = json.dumps(rows, ensure_ascii=False)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["m.csv", "m.json", "m.jsonl"])
def test_three_formats_hold_the_same(folder, name):
    manifest = read_manifest(written(folder / name), columns=("image", "prompt"), files=("image",))
    assert [dict(row) for row in manifest.rows] == ROWS
    assert manifest.file(1, "image") == folder / "b.png"


@pytest.mark.parametrize("name", ["m.csv", "m.json", "m.jsonl"])
def test_byte_order_mark(folder, name):
    path = folder / name
    path.write_bytes(b"\xef\xbb\xbf" + written(path).read_bytes())
    assert len(read_manifest(path, columns=("image",), files=())) == 2


def test_all_missing_files_are_told_at_once(folder):
    rows = [{"image": f"{i}.png", "prompt": ""} for i in range(12)]
    with pytest.raises(TrainingError, match=r"12 of 12 files are missing: .*0\.png.* and 2 more"):
        read_manifest(written(folder / "m.jsonl", rows), columns=("image", "prompt"), files=("image",))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.txt", "", "expected .csv, .json, .jsonl"),
        ("m.json", "{}", "expected a list"),
        ("m.json", "[", "cannot be read as UTF-8 json"),
        ("m.csv", "image,prompt\n", "has no rows"),
        ("m.jsonl", '{"image": "a.png"}', "row 1 lacks 'prompt'; it has image"),
        ("m.jsonl", '{"prompt": null, "image": "a.png"}', "row 1 lacks 'prompt'; it has image$"),
    ],
)
def test_unfit(folder, name, text, message):
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(TrainingError, match=message):
        read_manifest(folder / name, columns=("image", "prompt"), files=("image",))
