import csv
import json

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffsynth.core.data import UnifiedDataset
from diffsynth.core.data.media_writer import save_video
from diffsynth.core.data.operators import ToFloat, ToStr
from diffsynth.errors import TrainingError

ROWS = [{"image": f"{index}.png", "prompt": f"Äpfel, {index}", "speed": str(index / 4)} for index in range(3)]


@pytest.fixture
def folder(tmp_path, frames):
    for index in range(3):
        frames[index + 1].save(tmp_path / f"{index}.png")
    return tmp_path


def table(folder, suffix=".csv", rows=ROWS):
    path = folder / f"metadata{suffix}"
    if suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def images(folder, **settings):
    operator = UnifiedDataset.default_image_operator(folder, height=16, width=16)
    settings = {"data_file_keys": ("image", "video"), "main_data_operator": operator, **settings}
    return UnifiedDataset(str(folder), str(table(folder)), **settings)


def test_rows_with_their_images(folder, levels):
    dataset = images(folder, special_operator_map={"speed": ToFloat()})
    assert not dataset.load_from_cache
    assert len(dataset) == 3
    sample = dataset[2]
    assert list(sample) == ["image", "prompt", "speed"]
    assert (sample["image"].size, levels([sample["image"]])) == ((16, 16), [75])
    assert (sample["prompt"], sample["speed"]) == ("Äpfel, 2", 0.5)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_three_formats_and_values_as_they_stand(folder, suffix):
    """A csv's cells stay text: a prompt of "1984" is no number."""
    rows = [{"prompt": "1984", "note": ""}]
    dataset = UnifiedDataset(folder, table(folder, suffix, rows))
    assert dataset[0] == rows[0]


def test_a_special_operator_is_used_for_any_column(folder):
    """The reference program used it only for columns that were also in data_file_keys, and said nothing."""
    dataset = images(folder, special_operator_map={"prompt": ToStr() >> str.upper, "image": ToStr()})
    assert dataset[0]["prompt"] == "ÄPFEL, 0"
    assert dataset[0]["image"] == "0.png"


def test_length_and_order(folder):
    assert len(images(folder, repeat=4)) == 12
    longer, shorter = images(folder, max_data_items=7), images(folder, repeat=4, max_data_items=2)
    assert (len(longer), len(shorter)) == (7, 2)
    assert [sample["prompt"][-1] for sample in longer] == list("0120120")
    assert longer[-1]["prompt"] == longer[6]["prompt"]
    with pytest.raises(IndexError, match="sample 7 of 7"):
        _ = longer[7]
    loaded = [sample["prompt"] for sample in DataLoader(images(folder), shuffle=True, collate_fn=lambda rows: rows[0])]
    assert sorted(loaded) == [row["prompt"] for row in ROWS]


def test_a_missing_image_names_row_and_path(folder):
    (folder / "1.png").unlink()
    with pytest.raises(TrainingError, match=r"metadata.csv, row 2, column 'image': image .*/1.png does not exist"):
        _ = images(folder)[1]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data_file_keys": ("photo",)}, TrainingError, "none of the columns photo; it has image, prompt, speed"),
        ({"data_file_keys": "image,video"}, TypeError, "split"),
    ],
)
def test_wrong_columns_are_told_at_once(folder, settings, error, message):
    with pytest.raises(error, match=message):
        images(folder, **settings)


def test_a_row_with_too_many_cells(folder):
    (folder / "m.csv").write_text("image,prompt\n0.png,an apple, red\n")
    with pytest.raises(TrainingError, match="row 1 has more cells than the header"):
        UnifiedDataset(folder, folder / "m.csv")


def test_lines_of_json_may_hold_any_separator(folder):
    text = json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False)
    (folder / "m.jsonl").write_text(f"{text}\n\n{text}\n", encoding="utf-8")
    assert [row["prompt"] for row in UnifiedDataset(folder, folder / "m.jsonl")] == ["one\u2028two"] * 2


def test_cached_samples(tmp_path):
    for index in range(3):
        (tmp_path / str(index % 2)).mkdir(exist_ok=True)
        torch.save(({"latents": torch.full((2,), float(index))}, {}, {}), tmp_path / str(index % 2) / f"{index}.pth")
    dataset = UnifiedDataset(str(tmp_path), repeat=2)
    assert dataset.load_from_cache
    assert [float(sample[0]["latents"][0]) for sample in dataset] == [0, 2, 1, 0, 2, 1]
    with pytest.raises(TrainingError, match="no .pth file below"):
        UnifiedDataset(tmp_path / "0" / "none")


def test_default_operators(folder, frames):
    save_video(frames, folder / "clip.mp4", fps=24)
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:4], duration=50)
    video = UnifiedDataset.default_video_operator(str(folder), num_frames=5)
    assert [frame.size for frame in video("clip.mp4")] == [(48, 32)] * 5
    assert len(video("clip.gif")) == 1
    assert [frame.size for frame in video("0.png")] == [(48, 32)]
    image = UnifiedDataset.default_image_operator(str(folder), max_pixels=1000)
    assert [each.size for each in image(["0.png", "1.png"])] == [(32, 16)] * 2
    with pytest.raises(ValueError, match="expected one of jpg"):
        video("clip.txt")


def test_comparing_samples():
    first = {"a": torch.ones(2), "b": [1], "c": Image.new("RGB", (2, 2))}
    same = {"a": torch.ones(2), "b": [1], "c": Image.new("RGB", (2, 2))}
    assert UnifiedDataset.check_data_equal(first, same)
    for name, other in {"a": torch.zeros(2), "b": [2], "c": None}.items():
        assert not UnifiedDataset.check_data_equal(first, {**same, name: other})
    assert not UnifiedDataset.check_data_equal(first, {"a": torch.ones(2)})
