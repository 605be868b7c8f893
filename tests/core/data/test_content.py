"""Recognition of files by their first bytes, and files that are not there."""

import os

import pytest

from diffsynth.core.data.content import describe, describe_file, existing_file
from diffsynth.errors import NoFiles


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n...", "a PNG image"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "a WebP image"),
        (b"RIFF\0\0\0\0WAVEfmt ", "a WAV file"),
        (b"\0\0\0\x18ftypheic", "a HEIC image; convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypisom", "an MP4 or MOV file"),
        (b"\n <!DOCTYPE html><html>", "a web page, not a file that was downloaded from it"),
        (b"<?xml version='1.0'?><svg>", "an SVG drawing; convert it to PNG"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS, not the file itself; run: git lfs pull",
        ),
        (b"[InternetShortcut]\nURL=https://example.org", "a link, not the file that it leads to"),
        (b"only a text\n", "a text that begins with 'only a text\\n'"),
        (b"\x1b[2J\xff\xfe\0\0", "unknown data"),
    ],
)
def test_what_a_file_is(tmp_path, content, name):
    assert describe(content) == name
    (tmp_path / "file").write_bytes(content)
    assert describe_file(tmp_path / "file") == name


def test_a_file_must_exist(tmp_path):
    (tmp_path / "link.png").symlink_to("gone.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "here.png").touch()
    assert existing_file(str(tmp_path / "here.png"), "image") == tmp_path / "here.png"
    for name, message in [
        ("gone.png", "image .*gone.png does not exist"),
        ("", "is a folder"),
        ("link.png", "is a link to gone.png, which does not exist"),
        ("pipe.png", "is not a file, but a device or a pipe"),
        ("a" * 300, "cannot be looked up: File name too long"),
    ]:
        with pytest.raises(NoFiles, match=message):
            existing_file(tmp_path / name, "image")
    for path in (None, 3, b"a.png", ["a.png"]):
        with pytest.raises(TypeError, match="the path of an image is .*; expected a text or a Path"):
            existing_file(path, "image")
