import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.core.data import operators
from diffsynth.core.data.media_writer import merge_video_audio, save_video
from diffsynth.core.data.operators import (
    DataProcessingOperator,
    DataProcessingOperatorRaw,
    DataProcessingPipeline,
    FrameSamplerByRateMixin,
    ImageCropAndResize,
    LoadAudio,
    LoadAudioWithTorchaudio,
    LoadGIF,
    LoadPureAudioWithTorchaudio,
    LoadTorchPickle,
    LoadVideo,
    RouteByExtensionName,
    RouteByType,
    SequencialProcess,
    SequentialProcess,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
)
from diffsynth.core.data.unified_dataset import UnifiedDataset
from diffsynth.errors import CorruptFile, NoFiles


@pytest.mark.parametrize(
    ("operator", "given", "expected"),
    [
        (ToInt(), "7", 7),
        (ToFloat(), "7", 7.0),
        (ToStr(), 7, "7"),
        (ToStr("nothing"), None, "nothing"),
        (ToStr(), None, ""),
        (ToList(), 7, [7]),
        (DataProcessingOperatorRaw(), 7, 7),
        (ToAbsolutePath("/data"), "a/b.png", "/data/a/b.png"),
        (ToAbsolutePath("/data"), "/else/b.png", "/else/b.png"),
        (ToAbsolutePath("/data"), "https://example.org/b.png", "https://example.org/b.png"),
        (ToInt() >> ToList() >> ToStr(), "7", "[7]"),
        (ToInt() >> (ToList() >> ToStr()), "7", "[7]"),
        (SequentialProcess(ToInt()), ("7", 8.5), [7, 8]),
        (SequentialProcess(), ["7"], ["7"]),
        (RouteByType([(str, ToInt()), (type(None), ToStr("none")), (None, ToList())]), "7", 7),
        (RouteByType([(str, ToInt()), (type(None), ToStr("none")), (None, ToList())]), None, "none"),
        (RouteByType([(str, ToInt()), (type(None), ToStr("none")), (None, ToList())]), 7.5, [7.5]),
        (RouteByExtensionName([(("png",), ToList()), (None, ToStr())]), "a.PNG", ["a.PNG"]),
        (RouteByExtensionName([(("png",), ToList()), (None, ToStr())]), "a.png?size=8", ["a.png?size=8"]),
        (RouteByExtensionName([(("png",), ToList()), (None, ToStr())]), "a.txt", "a.txt"),
    ],
)
def test_operators(operator, given, expected):
    made = operator(given)
    assert (type(made), made) == (type(expected), expected)


@pytest.mark.parametrize(
    ("operator", "given", "error", "message"),
    [
        (SequentialProcess(ToInt()), "78", TypeError, "'78' is no list"),
        (ToAbsolutePath("/data"), None, TypeError, "None is no path"),
        (RouteByType([(str, ToInt())]), 7, ValueError, "7 is a int; expected one of str"),
        (RouteByExtensionName([(("png", "jpg"), ToInt())]), "a.txt", ValueError, "'txt'; expected one of png, jpg"),
    ],
)
def test_unfit_values(operator, given, error, message):
    with pytest.raises(error, match=message):
        operator(given)


def test_chains_are_flat_and_checked_when_built():
    chain = ToInt() >> ToList() >> ToStr()
    assert isinstance(chain, DataProcessingPipeline)
    assert [type(step) for step in chain.operators] == [ToInt, ToList, ToStr]
    assert DataProcessingPipeline()(7) == 7
    with pytest.raises(TypeError, match="'resize' is no data operator"):
        ToInt() >> "resize"


def test_the_old_spelling():
    assert SequencialProcess is SequentialProcess


def test_a_star_import_gives_the_operators():
    names: dict = {}
    exec("from diffsynth.core.data.operators import *", names)
    classes = {name for name, value in vars(operators).items() if isinstance(value, type)}
    made_here = {name for name in classes if issubclass(getattr(operators, name), DataProcessingOperator)}
    assert made_here | {"FrameSamplerByRateMixin"} == set(names) - {"__builtins__"}


def test_pickles_hold_values(tmp_path):
    sample = ({"latents": torch.randn(2, 3), "steps": [1, 2], "name": "a"}, {}, None)
    torch.save(sample, tmp_path / "a.pth")
    shared, *rest = LoadTorchPickle()(tmp_path / "a.pth")
    assert torch.equal(shared["latents"], sample[0]["latents"])
    assert (shared["steps"], shared["name"], rest) == ([1, 2], "a", [{}, None])
    with pytest.raises(NoFiles, match="gone.pth does not exist"):
        LoadTorchPickle()(tmp_path / "gone.pth")


class Runs:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_runs_no_code(tmp_path):
    torch.save({"sample": Runs(tmp_path / "written")}, tmp_path / "a.pth")
    with pytest.raises(CorruptFile, match="a.pth is not a pickle of tensors"):
        LoadTorchPickle()(tmp_path / "a.pth")
    assert not (tmp_path / "written").exists()
    with (tmp_path / "b.pth").open("wb") as file:
        pickle.dump(Runs(tmp_path / "written"), file, protocol=2)
    with pytest.raises(CorruptFile):
        LoadTorchPickle()(tmp_path / "b.pth")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((100, 50), {"height": 32, "width": 48}, (48, 32)),
        ((100, 50), {"max_pixels": 10_000, "height_division_factor": 16, "width_division_factor": 16}, (96, 48)),
        ((100, 50), {"max_pixels": 1250}, (50, 25)),
        ((100, 50), {"max_pixels": 1250, "height_division_factor": 8, "width_division_factor": 16}, (48, 24)),
        ((3, 5), {}, (3, 5)),
    ],
)
def test_sizes(size, settings, expected):
    assert ImageCropAndResize(**settings)(Image.new("RGB", size)).size == expected


def test_the_centre_is_kept_and_nothing_is_stretched():
    array = np.zeros((40, 80), dtype=np.uint8)
    array[:, 20:60] = 255
    found = np.asarray(ImageCropAndResize(height=20, width=20)(Image.fromarray(array)))
    assert found[:, 1:-1].min() == 255
    found = np.asarray(ImageCropAndResize(height=20, width=40)(Image.fromarray(array)))
    assert abs(int((found > 127).sum(axis=1)[0]) - 20) <= 1


def test_unfit_sizes():
    with pytest.raises(ValueError, match="height=8 and width=None"):
        ImageCropAndResize(height=8)
    with pytest.raises(ValueError, match="10x10 pixels is smaller than the factors 16x16"):
        ImageCropAndResize(height_division_factor=16, width_division_factor=16)(Image.new("RGB", (10, 10)))


@pytest.mark.parametrize(
    ("num_frames", "there", "expected"),
    [(5, 10, 5), (9, 9, 9), (81, 10, 9), (81, 12, 9), (81, 13, 13), (81, 3, 1), (6, 10, 6), (81, 0, 0)],
)
def test_the_first_frames_with_a_valid_number(num_frames, there, expected):
    assert FrameSamplerByRateMixin(num_frames).take(range(there), Fraction(30)) == list(range(expected))


@pytest.mark.parametrize(
    ("raw", "rate", "expected"),
    [(24, 12, [0, 2, 4, 6, 8]), (12, 24, [0, 0, 1, 1, 2]), (30, 24, [0, 1, 2, 3, 5]), (24, 24, [0, 1, 2, 3, 4])],
)
def test_a_fixed_rate_keeps_the_speed(raw, rate, expected):
    sampler = FrameSamplerByRateMixin(5, frame_rate=rate, fix_frame_rate=True)
    assert sampler.take(range(50), Fraction(raw)) == expected


def test_reading_stops_at_the_last_frame_taken():
    read = []
    FrameSamplerByRateMixin(5).take((read.append(index) for index in range(100)), Fraction(24))
    assert len(read) == 5


def test_video(tmp_path, frames, levels):
    save_video(frames, tmp_path / "clip.mp4", fps=24)
    np.testing.assert_allclose(levels(LoadVideo()(tmp_path / "clip.mp4")), levels(frames[:9]), atol=2)
    halved = LoadVideo(5, frame_rate=12, fix_frame_rate=True)(tmp_path / "clip.mp4")
    np.testing.assert_allclose(levels(halved), levels(frames[:10:2]), atol=2)
    assert LoadVideo(5, frame_processor=lambda frame: frame.size)(tmp_path / "clip.mp4") == [(48, 32)] * 5
    with pytest.raises(NoFiles, match="gone.mp4 does not exist"):
        LoadVideo()("gone.mp4")


def test_video_at_a_fixed_rate_by_its_times(irregular, levels):
    """A screen recording has frames when something moves; counted instead of timed, it ran five times as fast."""
    load = LoadVideo(9, frame_rate=10, fix_frame_rate=True)
    np.testing.assert_allclose(levels(load(irregular)), [0, 50, 100, 100, 100, 100, 100, 150, 200], atol=3)
    assert len(LoadVideo(9)(irregular)) == 5


def test_animations_at_a_fixed_rate_by_their_times(tmp_path, frames, levels):
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:4], duration=[100, 300, 100, 100])
    load = LoadGIF(6, 1, 0, frame_rate=10, fix_frame_rate=True)
    assert levels(load(tmp_path / "a.gif")) == [0, 25, 25, 25, 50, 75]
    assert levels(LoadVideo(6, 1, 0, frame_rate=10, fix_frame_rate=True)(tmp_path / "a.gif")) == [0, 25, 25, 25, 50, 75]


def test_animated_images_are_routed_by_their_content(tmp_path, frames):
    """An animated WebP gave its first frame only, because some WebP files are still images."""
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:5], duration=100)
    frames[0].save(tmp_path / "still.webp")
    load = UnifiedDataset.default_video_operator(tmp_path, height=16, width=16, num_frames=5)
    assert [frame.size for frame in load("clip.webp")] == [(16, 16)] * 5
    assert len(load("still.webp")) == 1
    with pytest.raises(NoFiles, match="gone.webp does not exist"):
        load("gone.webp")


def test_gif_is_opened_once(tmp_path, frames, levels, monkeypatch):
    """DiffSynth-Studio read the whole file to count its frames, and then again to use them."""
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    opened, real_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args) or real_open(*args))
    assert levels(LoadGIF()(path)) == levels(frames[:9])
    assert len(opened) == 1
    assert levels(LoadGIF(3, frame_rate=10, fix_frame_rate=True)(path)) == levels(frames[:6:2])
    (tmp_path / "text.gif").write_text("no image")
    with pytest.raises(CorruptFile, match="text.gif is not an image"):
        LoadGIF()(tmp_path / "text.gif")


def test_sound_operators(tmp_path, frames, tone):
    path = tone(seconds=0.5, channels=2)
    samples = LoadAudio(sr=8000)(path)
    assert samples.dtype == np.float32
    assert samples.shape == (4000,)
    sound, rate = LoadPureAudioWithTorchaudio(target_duration=0.75)(path)
    assert (tuple(sound.shape), rate) == ((2, 6000), 8000)
    assert sound[:, 4000:].abs().max() == 0
    save_video(frames, tmp_path / "clip.mkv", fps=10)
    merge_video_audio(tmp_path / "clip.mkv", tone("long.wav", seconds=2.0))
    sound, rate = LoadAudioWithTorchaudio(num_frames=5)(tmp_path / "clip.mkv")
    assert sound.shape[1] == rate // 2
    assert isinstance(sound, torch.Tensor)
