"""Written videos and sounds are read back: frames, their number, their rate, and the samples."""

import builtins
import tracemalloc
import wave
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from diffsynth.core.data.media import (
    Timeline,
    VideoData,
    count_frames,
    frame_rate_of,
    open_media,
    read_audio,
    read_frames,
)
from diffsynth.core.data.media_writer import (
    merge_video_audio,
    read_comment,
    save_audio,
    save_frames,
    save_video,
    save_video_with_audio,
)
from diffsynth.errors import CorruptFile, NoFiles, Unavailable


@pytest.mark.parametrize("name", ["clip.mp4", "new/folder/clip.mkv", "clip.mov"])
def test_round_trip(tmp_path, frames, levels, name):
    path = tmp_path / name
    save_video(frames, path, fps=12.5)
    read = list(read_frames(path))
    assert [image.size for image in read] == [(48, 32)] * 10
    np.testing.assert_allclose(levels(read), levels(frames), atol=2)
    assert (count_frames(path), frame_rate_of(path)) == (10, Fraction(25, 2))


def test_arrays_and_odd_sizes_keep_every_pixel(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (31, 47, 3)).astype(np.uint8)
    save_video([noise] * 3, tmp_path / "odd.mp4", fps=24, quality=10)
    (first, *_) = read_frames(tmp_path / "odd.mp4")
    assert first.size == (47, 31)
    assert np.abs(np.asarray(first, dtype=int) - noise).mean() < 2


def test_quality_and_encoder_options_reach_the_encoder(tmp_path):
    noise = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3)).astype(np.uint8) for seed in range(4)]
    sizes = []
    for number, settings in enumerate([{}, {"quality": 2}, {"ffmpeg_params": ["-crf", "50"]}]):
        save_video(noise, tmp_path / f"{number}.mp4", fps=8, **settings)
        sizes.append((tmp_path / f"{number}.mp4").stat().st_size)
    assert sizes[0] > 2 * sizes[1] > 2 * sizes[2]


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        ([], {}, "0 frames"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))], {}, "frame 1 is 8x16, the first one 8x8"),
        ([np.zeros((8, 8, 3))], {}, r"frame 0 is an array of float64 and shape \(8, 8, 3\); expected uint8"),
        ([np.zeros((8, 8, 2), np.uint8)], {}, r"shape \(8, 8, 2\); expected uint8 of \(h, w, 3\)"),
        ([Image.new("RGB", (8, 8))], {"fps": 0}, "fps=0: expected a positive number"),
        ([Image.new("RGB", (8, 8))], {"fps": "16"}, "fps='16': expected a positive number"),
        ([Image.new("RGB", (8, 8))], {"fps": None}, "fps=None: expected a positive number"),
        ([Image.new("RGB", (8, 8))], {"fps": float("inf")}, "fps=inf: expected a positive number"),
        (torch.full((3, 2, 8, 8), float("nan")), {}, "frame 0 has values that are not finite"),
        (torch.zeros(2, 3, 5, 8, 8), {}, r"shape \(2, 3, 5, 8, 8\); expected \(3, t, h, w\)"),
        (torch.zeros(5, 8, 8, 3), {}, r"shape \(5, 8, 8, 3\); expected \(3, t, h, w\)"),
        ([Image.new("RGB", (8, 8))], {"quality": 11}, "quality=11"),
        ([Image.new("RGB", (8, 8))], {"ffmpeg_params": ["-crf"]}, 'pairs of "-name"'),
        ([Image.new("RGB", (8, 8))], {"ffmpeg_params": ["-profile", "none"]}, "clip.mp4 cannot be written"),
    ],
)
def test_unfit_frames(tmp_path, images, settings, message):
    with pytest.raises(ValueError, match=message):
        save_video(images, tmp_path / "clip.mp4", **{"fps": 8, **settings})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["float", "batch", "uint8"])
def test_tensors(tmp_path, frames, levels, kind):
    bytes_ = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))
    video = bytes_.permute(3, 0, 1, 2) / 127.5 - 1
    tensor = {"float": video, "batch": video[None].bfloat16(), "uint8": bytes_}[kind]
    save_video(tensor, tmp_path / "clip.mp4")
    np.testing.assert_allclose(levels(read_frames(tmp_path / "clip.mp4")), levels(frames), atol=2)
    assert frame_rate_of(tmp_path / "clip.mp4") == 15


@pytest.mark.parametrize("fps", [np.float32(12.5), np.float64(12.5), Fraction(25, 2)])
def test_a_rate_of_any_library(tmp_path, frames, fps):
    save_video(frames, tmp_path / "clip.mp4", fps=fps)
    assert frame_rate_of(tmp_path / "clip.mp4") == Fraction(25, 2)
    assert VideoData(str(tmp_path / "clip.mp4"), fps=fps).frame_rate == Fraction(25, 2)


def test_the_home_folder(tmp_path, frames, monkeypatch):
    """`~` within quotes is not expanded by a shell: it became a folder of this name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    save_video(frames, "~/clips/a.mp4")
    save_frames(frames, "~/frames")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert len(list((tmp_path / "home").rglob("*.*"))) == 1 + len(frames)


@pytest.mark.parametrize(("frames", "message"), [("a.png", "are str"), (["a.png"], "frame 0 is str"), (3, "are int")])
def test_what_is_no_frame(tmp_path, frames, message):
    with pytest.raises(TypeError, match=message):
        save_video(frames, tmp_path / "clip.mp4")


def test_frames_of_other_modes(tmp_path):
    grey = Image.fromarray(np.full((16, 16), 65535, np.uint16))
    save_video([Image.new("RGBA", (16, 16), (0, 200, 0, 0)), grey], tmp_path / "clip.mp4")
    assert [frame.getpixel((8, 8)) for frame in read_frames(tmp_path / "clip.mp4")] == [(255, 255, 255)] * 2


def test_frames_are_written_while_they_are_made(tmp_path, levels):
    """A decoder that hands over frame after frame must not have them gathered in a list first."""
    alive = []

    def frames():
        for level in range(0, 250, 5):
            frame = Image.new("RGB", (48, 32), (level,) * 3)
            alive.append(weakref.ref(frame))
            yield frame
            del frame
            assert sum(each() is not None for each in alive) <= 3

    save_video(frames(), tmp_path / "clip.mp4", fps=10)
    np.testing.assert_allclose(levels(read_frames(tmp_path / "clip.mp4")), range(0, 250, 5), atol=2)


def test_a_comment(tmp_path, frames):
    text = '{"prompt": "eine Straße, 雨"}' + "x" * 5000
    save_video(frames, tmp_path / "said.mp4", comment=text)
    save_video(frames, tmp_path / "unsaid.mp4")
    assert (read_comment(tmp_path / "said.mp4"), read_comment(tmp_path / "unsaid.mp4")) == (text, None)


def test_a_frame_that_cannot_be_written_leaves_the_earlier_one(tmp_path, frames, monkeypatch):
    save_frames(frames[:2], tmp_path)
    save = Image.Image.save

    def cut(image, path):
        save(image, path)
        path.write_bytes(path.read_bytes()[:20])
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", cut)
    with pytest.raises(OSError, match="No space left"):
        save_frames(frames[5:7], tmp_path)
    monkeypatch.undo()
    assert Image.open(tmp_path / "0.png").convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]


def test_a_suffix_of_no_container(tmp_path, frames):
    with pytest.raises(ValueError, match=r"clip.webm ends in '.webm'; expected one of .mp4"):
        save_video(frames, tmp_path / "clip.webm", fps=8)


def test_video_data_in_any_order(tmp_path, frames, levels):
    save_video(frames, tmp_path / "clip.mp4", fps=10)
    video = VideoData(str(tmp_path / "clip.mp4"))
    assert len(video) == 10
    order = [7, 7, 8, 2, -1]
    np.testing.assert_allclose(levels(video[index] for index in order), [175, 175, 200, 50, 225], atol=2)
    np.testing.assert_allclose(levels(video[1:4]), [25, 50, 75], atol=2)
    assert len(video.raw_data()) == len(list(video)) == 10
    with pytest.raises(IndexError, match="frame 10 of 10"):
        _ = video[10]


def test_video_data_of_a_size(tmp_path, frames):
    save_video(frames, tmp_path / "clip.mp4", fps=10)
    video = VideoData(tmp_path / "clip.mp4", height=20, width=20)
    assert {frame.size for frame in video} == {(20, 20)}


def test_a_variable_frame_rate_is_told_and_helped(irregular, levels):
    """A recording whose frames come when something moves runs at another speed if each is taken for the next one."""
    with pytest.raises(CorruptFile, match="100 ms, the longest 500 ms. Give VideoData an fps"):
        VideoData(irregular)
    video = VideoData(irregular, fps=10)
    assert video.frame_rate == 10
    np.testing.assert_allclose(levels(video[:9]), [0, 50, 100, 100, 100, 100, 100, 150, 200], atol=3)


@pytest.mark.parametrize(
    ("fps", "expected"), [(5, [0, 50, 100, 150, 200]), (20, [0, 0, 25, 25, 50, 50]), (10, [0, 25])]
)
def test_video_data_at_another_rate_keeps_its_speed(tmp_path, frames, levels, fps, expected):
    save_video(frames, tmp_path / "clip.mp4", fps=10)
    video = VideoData(tmp_path / "clip.mp4", fps=fps)
    assert len(video) == fps
    np.testing.assert_allclose(levels(video[: len(expected)]), expected, atol=3)


def test_mixed_sizes_in_a_folder(tmp_path):
    for index, size in enumerate([(48, 32), (48, 32), (32, 48)]):
        Image.new("RGB", size).save(tmp_path / f"{index}.png")
    with pytest.raises(
        ValueError, match=r"images of 2 sizes in .*: 0.png of 48x32, 2.png of 32x48; make them one size"
    ):
        VideoData(image_folder=tmp_path)
    assert {frame.size for frame in VideoData(image_folder=tmp_path, height=16, width=16)} == {(16, 16)}


def test_a_damaged_file(tmp_path, frames):
    save_video(frames, tmp_path / "clip.mp4")
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "clip.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptFile, match="clip.mp4 cannot be read as video"):
        VideoData(tmp_path / "clip.mp4")


def test_one_frame_is_held_at_a_time(tmp_path):
    """Two minutes of 1080p are 18 GB as images."""
    save_video((np.full((270, 480, 3), level, dtype=np.uint8) for level in range(60)), tmp_path / "clip.mp4")
    video = VideoData(tmp_path / "clip.mp4")
    tracemalloc.start()
    for frame in video:
        assert frame.size == (480, 270)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 480 * 270 * 3


def test_the_sound_of_another_video(tmp_path, frames, tone):
    save_video_with_audio(frames, tmp_path / "first.mp4", tone(seconds=1), fps=10)
    save_video_with_audio(frames, tmp_path / "second.mp4", tmp_path / "first.mp4", fps=10)
    sound, _ = read_audio(tmp_path / "second.mp4")
    spectrum = torch.fft.rfft(sound[0]).abs()
    assert abs(int(spectrum.argmax()) * 48_000 / sound.shape[1] - 440) < 3


def test_a_missing_sound_raises_before_frames_are_generated(tmp_path):
    def frames():
        raise AssertionError("made a frame")
        yield

    with pytest.raises(NoFiles, match="gone.wav does not exist"):
        save_video_with_audio(frames(), tmp_path / "clip.mp4", tmp_path / "gone.wav")


def test_frames_in_a_folder_are_in_the_order_of_their_numbers(tmp_path, frames, levels):
    """Eleven saved frames came back as 0, 1, 10, 2, ... when they were sorted as text."""
    images = [*frames, Image.new("RGB", (48, 32), (250,) * 3)]
    save_frames(images, tmp_path / "frames")
    assert levels(VideoData(image_folder=tmp_path / "frames")) == levels(images)


def test_frames_in_a_folder_are_in_natural_order(tmp_path):
    """All digits of a name in one number put shot2_frame10 behind shot10_frame2."""
    names = ["cover", "frame2", "Frame10", "shot2_frame3", "shot2_frame10", "shot10_frame2", "x9", "x010"]
    for level, name in enumerate(names):
        Image.new("RGB", (4, 4), (level,) * 3).save(tmp_path / f"{name}.png")
    (tmp_path / "._frame1.png").write_bytes(b"a file of macOS beside each file on other disks")
    assert [frame.getpixel((0, 0))[0] for frame in VideoData(image_folder=tmp_path)] == list(range(len(names)))


def test_frames_in_a_folder_are_upright_and_over_the_background(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGBA", (6, 4), (9, 9, 9, 0)).save(tmp_path / "1.png", exif=exif)
    Image.new("L", (4, 6), 255).save(tmp_path / "2.tif")
    assert [(frame.size, frame.getpixel((0, 0))) for frame in VideoData(image_folder=tmp_path)] == [
        ((4, 6), (255, 255, 255))
    ] * 2
    assert VideoData(image_folder=tmp_path, background="red")[0].getpixel((0, 0)) == (255, 0, 0)
    (tmp_path / "3.png").write_bytes(b"<html>")
    with pytest.raises(CorruptFile, match="3.png is not an image .* it is a web page"):
        VideoData(image_folder=tmp_path)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "flv"])
def test_a_video_that_is_cut_off_is_named(tmp_path, suffix):
    """A container whose index is at its beginning, or that has none, can be opened when its end is missing."""
    noise = (np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8) for _ in range(30))
    path = tmp_path / f"cut.{suffix}"
    with av.open(str(path), "w", options={"movflags": "faststart"} if suffix == "mp4" else {}) as container:
        stream = container.add_stream("h264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for pixels in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(VideoData(path)) == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(CorruptFile, match=f"cut.{suffix} .*(is cut off|damaged|cannot be read)"):
        VideoData(path)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "flac"])
def test_sound_that_is_cut_off_is_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    codec = {"wav": "pcm_s16le", "mp3": "libmp3lame", "flac": "flac"}[suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16_000, layout="mono")
        samples = np.random.default_rng(0).integers(-9999, 9999, (1, 48_000), dtype=np.int16)
        for part in np.split(samples, 60, axis=1):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), format="s16", layout="mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert abs(read_audio(path)[0].shape[1] - 48_000) < 2000
    whole = path.read_bytes()
    path.write_bytes(whole[: (len(whole) - 44) // 4 * 2 + 44])
    with pytest.raises(CorruptFile, match=f"cut.{suffix} (is cut off|cannot be read)"):
        read_audio(path)


@pytest.mark.parametrize("arguments", [{}, {"video_file": "a.mp4", "image_folder": "a"}])
def test_one_source(arguments):
    with pytest.raises(ValueError, match="one of them"):
        VideoData(**arguments)


def test_what_is_not_there_or_no_video(tmp_path, tone):
    with pytest.raises(NoFiles, match="gone.mp4 does not exist"):
        VideoData(tmp_path / "gone.mp4")
    with pytest.raises(NoFiles, match="has no images"):
        VideoData(image_folder=tmp_path)
    (tmp_path / "text.mp4").write_text("no video at all")
    with pytest.raises(CorruptFile, match="text.mp4 cannot be read as video"):
        list(read_frames(tmp_path / "text.mp4"))
    with pytest.raises(CorruptFile, match="has no video stream"):
        count_frames(tone(seconds=0.1))


def test_sound(tone):
    sound, rate = read_audio(tone(seconds=0.5, channels=2))
    assert (sound.shape, sound.dtype, rate) == ((2, 4000), torch.float32, 8000)
    torch.testing.assert_close(sound.abs().amax(1), torch.tensor([0.5, 0.25]), atol=2e-3, rtol=0)
    mono, rate = read_audio(tone(seconds=0.5, channels=2), 16_000, mono=True)
    assert rate == 16_000
    assert mono.shape[0] == 1
    assert abs(mono.shape[1] - 8000) <= 32
    spectrum = torch.fft.rfft(mono[0]).abs()
    assert abs(int(spectrum.argmax()) * 16_000 / mono.shape[1] - 440) < 3


@pytest.mark.parametrize(
    ("codec", "kind", "scale", "step"),
    [
        ("pcm_u8", "u8", 128, 1 / 128),
        ("pcm_s16le", "s16", 2**15, 2**-15),
        ("pcm_s24le", "s32", 2**31, 2**-23),
        ("pcm_s32le", "s32", 2**31, 2**-24),
        ("pcm_f32le", "flt", 1, 0),
        ("pcm_f64le", "dbl", 1, 2**-24),
    ],
)
def test_sample_formats_and_channels(tmp_path, codec, kind, scale, step):
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, (6, 300))
    stored = samples * scale + (128 if kind == "u8" else 0)
    dtype = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}[kind]
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream(codec, rate=11_025, layout="5.1")
        interleaved = np.ascontiguousarray(stored.T.reshape(1, -1).astype(dtype))
        frame = av.AudioFrame.from_ndarray(interleaved, format=kind, layout="5.1")
        frame.sample_rate = 11_025
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read, rate = read_audio(tmp_path / "a.wav")
    assert (read.shape, rate) == ((6, 300), 11_025)
    assert np.abs(read.numpy() - samples).max() <= step + 1e-7
    mono, _ = read_audio(tmp_path / "a.wav", mono=True)
    torch.testing.assert_close(mono, read.mean(dim=0, keepdim=True))
    with pytest.raises(ValueError, match="sample_rate=0: expected a positive number"):
        read_audio(tmp_path / "a.wav", 0)


def test_what_is_in_a_file(tmp_path, frames, irregular):
    """The command line and apps open a file by its content, whatever its name."""
    Image.new("LA", (6, 4), (9, 0)).save(tmp_path / "a.png")
    frames[0].save(tmp_path / "still.gif")
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=[50, 200] * 5)
    save_video(frames, tmp_path / "clip.mkv")
    (tmp_path / "clip.mkv").rename(tmp_path / "clip.bin")
    assert open_media(tmp_path / "a.png").mode == "LA"
    assert isinstance(open_media(str(tmp_path / "still.gif")), Image.Image)
    assert len(open_media(tmp_path / "clip.bin")) == 10
    assert (len(open_media(irregular)), len(open_media(tmp_path / "clip.gif"))) == (23, 10)
    (tmp_path / "frames").mkdir()
    frames[0].save(tmp_path / "frames" / "1.png")
    assert len(open_media(tmp_path / "frames")) == 1
    (tmp_path / "page.mp4").write_text("<html>")
    for name, message in [("page.mp4", "page.mp4 cannot be read as video.*a web page"), ("gone.png", "does not exist")]:
        with pytest.raises((CorruptFile, NoFiles), match=message):
            open_media(tmp_path / name)
    with pytest.raises(TypeError, match="the path of a file is ndarray"):
        open_media(np.zeros(3))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_a_clip_is_scanned_once(tmp_path, frames, monkeypatch, name):
    """Opening a clip scanned its packets, or decoded the animation, twice."""
    save_video(frames, tmp_path / name, fps=10) if name.endswith("mp4") else frames[0].save(
        tmp_path / name, save_all=True, append_images=frames[1:], duration=100
    )
    made = []
    of = Timeline.of
    monkeypatch.setattr(Timeline, "of", lambda path: made.append(path) or of(path))
    assert len(open_media(tmp_path / name)) == 10
    assert len(made) == 1
    assert len(VideoData(of(tmp_path / name), fps=5)) == 5


def test_a_cover_image_is_no_video(tmp_path, tone):
    cover = tmp_path / "cover.m4a"
    with av.open(str(cover), "w", format="mp4") as container:
        image = container.add_stream("mjpeg", rate=1)
        image.width, image.height, image.pix_fmt = 16, 16, "yuvj420p"
        image.disposition = 0x400
        container.mux(image.encode(av.VideoFrame.from_image(Image.new("RGB", (16, 16)))))
        container.mux(image.encode(None))
    with pytest.raises(CorruptFile, match="has no video stream"):
        VideoData(cover)


@pytest.mark.parametrize(("channels", "count"), [(1, 1), (2, 5), (2, 2**20 + 7), (3, 100), (6, 100), (8, 100)])
def test_saved_sound_has_the_rounded_samples(tmp_path, channels, count):
    samples = torch.rand(channels, count, generator=torch.Generator().manual_seed(0)) * 2 - 1
    save_audio(samples, tmp_path / "folder" / "sound.wav", 22_050)
    expected = (samples.double() * 32768).round().clamp(max=32767).short()
    if channels <= 2:  # Python 3.11 reads no extensible header
        with wave.open(str(tmp_path / "folder" / "sound.wav")) as file:
            shape = (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes())
            levels = np.frombuffer(file.readframes(count), "<i2").reshape(-1, channels)
        assert shape == (channels, 2, 22_050, count)
        np.testing.assert_array_equal(levels.T, expected.numpy())
    read, rate = read_audio(tmp_path / "folder" / "sound.wav")
    assert rate == 22_050
    torch.testing.assert_close(read, expected / 32768, atol=0, rtol=0)


def test_saved_sound_is_clipped_with_a_warning(tmp_path, caplog):
    save_audio(torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.5]], dtype=torch.bfloat16), tmp_path / "sound.wav", 8000)
    assert "a peak of 2.500 is clipped" in caplog.text
    read, _ = read_audio(tmp_path / "sound.wav")
    assert (read[0] * 32768).tolist() == [-32768, -32768, 0, 32767, 32767]
    caplog.clear()
    save_audio(torch.tensor([[1.0, -1.0]]), tmp_path / "sound.wav", 8000)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (torch.zeros(5), 8000, r"shape \(5,\); expected \(channels, samples\) of floating point"),
        (torch.zeros(9, 5), 8000, r"shape \(9, 5\); .* with 1 to 8 channels"),
        (torch.zeros(1, 0), 8000, "at least one sample"),
        (torch.zeros(1, 5, dtype=torch.int16), 8000, "a tensor of torch.int16"),
        (torch.tensor([[0.0, float("nan")]]), 8000, "not finite"),
        (torch.zeros(1, 5), 0, "sample_rate=0: expected a positive integer"),
        (torch.zeros(1, 5), 44_100.0, "sample_rate=44100.0: expected a positive integer"),
    ],
)
def test_unfit_samples(tmp_path, samples, rate, message):
    with pytest.raises(ValueError, match=message):
        save_audio(samples, tmp_path / "sound.wav", rate)
    with pytest.raises(ValueError, match=r"sound.mp3 ends in '.mp3'; expected one of .wav"):
        save_audio(torch.zeros(1, 5), tmp_path / "sound.mp3", 8000)
    assert list(tmp_path.iterdir()) == []


def test_a_comment_of_sound(tmp_path, tone):
    text = '{"prompt": "eine Straße, 雨"}' + "x" * 5000
    save_audio(torch.zeros(2, 50), tmp_path / "said.wav", 8000, comment=text)
    assert read_comment(tmp_path / "said.wav", "audio") == text
    assert read_comment(tone(seconds=0.1), "audio") is None
    with pytest.raises(CorruptFile, match="has no video stream"):
        read_comment(tmp_path / "said.wav")


@pytest.mark.parametrize(("seconds", "heard"), [(3.0, 1.0), (0.4, 0.4)])
def test_a_video_gets_its_sound(tmp_path, frames, levels, tone, seconds, heard):
    path = tmp_path / "clip.mp4"
    save_video_with_audio(frames, path, tone(seconds=seconds), fps=10)
    np.testing.assert_allclose(levels(read_frames(path)), levels(frames), atol=2)
    sound, rate = read_audio(path)
    assert rate == 48_000
    # The codec fills its last packet, of 1024 samples, and begins with one of silence.
    assert abs(sound.shape[1] - heard * rate) <= 2048
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clip.mp4", "tone.wav"]
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]


def test_a_sound_that_cannot_be_read_leaves_the_video_alone(tmp_path, frames):
    """The reference program caught every error of merging: the video came out silent, and nothing said why."""
    path = tmp_path / "clip.mp4"
    save_video(frames, path, fps=10)
    before = path.read_bytes()
    (tmp_path / "tone.wav").write_text("no sound")
    with pytest.raises(CorruptFile, match="tone.wav cannot be read as audio"):
        merge_video_audio(path, tmp_path / "tone.wav")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_without_pyav(tmp_path, frames, monkeypatch):
    real_import = builtins.__import__

    def without_av(name, *rest):
        if name == "av":
            raise ImportError("No module named 'av'")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(Unavailable, match="pip install av"):
        save_video(frames, tmp_path / "clip.mp4", fps=8)
