"""How many frames are taken, and which."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from diffsynth.core.data.clip import FrameSamplerByRateMixin, LoadGIF, LoadVideo
from diffsynth.core.data.media_writer import save_video
from diffsynth.core.data.operators import LoadAudio, LoadAudioWithTorchaudio, LoadPureAudioWithTorchaudio
from diffsynth.errors import CorruptFile, NoFiles


@pytest.mark.parametrize(
    ("num_frames", "there", "expected"),
    [(5, 10, 5), (9, 9, 9), (81, 10, 9), (81, 12, 9), (81, 13, 13), (81, 3, 1), (6, 10, 6), (81, 0, 0)],
)
def test_the_first_frames_as_many_as_fit(num_frames, there, expected):
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


def test_gif_is_opened_once(tmp_path, frames, levels, monkeypatch):
    """The reference program read the whole file to count its frames, and then again to use them."""
    path = tmp_path / "clip.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    from PIL import Image

    opened, real_open = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args) or real_open(*args))
    assert levels(LoadGIF()(path)) == levels(frames[:9])
    assert len(opened) == 1
    assert levels(LoadGIF(3, frame_rate=10, fix_frame_rate=True)(path)) == levels(frames[:6:2])
    (tmp_path / "text.gif").write_text("no picture")
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
    from diffsynth.core.data.media_writer import merge_video_audio

    merge_video_audio(tmp_path / "clip.mkv", tone("long.wav", seconds=2.0))
    sound, rate = LoadAudioWithTorchaudio(num_frames=5)(tmp_path / "clip.mkv")
    assert sound.shape[1] == rate // 2
    assert isinstance(sound, torch.Tensor)
