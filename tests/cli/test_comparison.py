import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffsynth.cli.comparison import compare_files
from diffsynth.core.data.media_writer import save_audio, save_frames, save_video


def test_images(tmp_path):
    for name, level in (("a.png", 100), ("b.png", 100), ("c.png", 110)):
        Image.new("RGB", (10, 10), (level, 0, 0)).save(tmp_path / name)
    assert compare_files(tmp_path / "a.png", tmp_path / "b.png")[0]
    equal, text = compare_files(tmp_path / "a.png", tmp_path / "c.png")
    assert not equal
    # A third of the levels differ by 10 of 255: 10 log10(255^2 / (100 / 3)).
    assert text == "different: 100 of 300 levels of 0 to 255 (33.33%) differ, by at most 10, PSNR 32.9 dB"
    Image.new("RGB", (10, 20)).save(tmp_path / "d.png")
    assert "a.png has an array 10x10x3 where" in compare_files(tmp_path / "a.png", tmp_path / "d.png")[1]


def test_videos_and_folders(tmp_path):
    frames = [Image.new("RGB", (16, 16), (level,) * 3) for level in (0, 100, 200)]
    save_frames(frames, tmp_path / "a")
    save_frames(frames[:2], tmp_path / "b")
    save_video(frames, tmp_path / "a.mp4", fps=8)
    assert compare_files(tmp_path / "a", tmp_path / "a")[0]
    assert compare_files(tmp_path / "a.mp4", tmp_path / "a.mp4")[0]
    assert "has an array 16x16x3 where" in compare_files(tmp_path / "a", tmp_path / "b")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_and_sound(tmp_path, dtype):
    for name, value in (("a", 0.5), ("b", 0.25)):
        save_file({"x": torch.full((4,), value, dtype=dtype)}, tmp_path / f"{name}.safetensors")
        save_audio(torch.full((1, 4), value, dtype=dtype), tmp_path / f"{name}.wav", 8000)
    for suffix in ("safetensors", "wav"):
        assert compare_files(tmp_path / f"a.{suffix}", tmp_path / f"a.{suffix}")[0]
        equal, text = compare_files(tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}")
        assert (equal, text) == (False, "different: 4 of 4 values (100.00%) differ, by at most 0.25")
