"""Files that take the place of others: whole after a kill at any point, and writable or refused beforehand."""

import os
import re

import pytest

from diffsynth.core.replacing import (
    check_new_folder,
    check_writable,
    is_unfinished,
    remove_unfinished,
    replace_files,
    replacing,
    replacing_folder,
)
from killed import killed_at_every_write


def test_the_content_reaches_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr("os.fsync", lambda fd: (order.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr("os.replace", lambda a, b: (order.append(str(b)), replace(a, b)))
    files = {tmp_path / name: lambda partial: partial.write_text("x") for name in ("a.txt", "b.txt", "index.json")}
    replace_files(files)
    assert [is_unfinished(tmp_path / os.path.basename(each)) for each in order] == [True] * 3 + [False] * 5
    assert order[3:] == [str(tmp_path / n) for n in ("a.txt", "b.txt")] + [str(tmp_path)] + [
        str(tmp_path / "index.json"),
        str(tmp_path),
    ]


def test_a_kill_leaves_the_old_content_or_the_new_one(tmp_path):
    file = tmp_path / "a.txt"

    def write(text):
        with replacing(file) as partial:
            partial.write_text(text)

    write("old")
    seen = [file.read_text() for _ in killed_at_every_write(lambda: write("new"))]
    assert seen[0] == "old"
    assert seen[-1] == "new"
    assert set(seen) == {"old", "new"}


def test_an_error_leaves_everything_as_it_was(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), replacing(tmp_path / "a.txt") as partial:
        fail(partial)
    with pytest.raises(OSError, match="No space"):
        replace_files({tmp_path / "a.txt": lambda partial: partial.write_text("new"), tmp_path / "b.txt": fail})
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}


def test_files_that_were_new_go_again_when_a_later_one_fails(tmp_path, monkeypatch):
    replace = os.replace

    def failing(a, b):
        if str(b).endswith("b.txt"):
            raise OSError(5, "Input/output error")
        replace(a, b)

    monkeypatch.setattr("os.replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        replace_files({tmp_path / name: lambda partial: partial.write_text("x") for name in ("a.txt", "b.txt")})
    assert list(tmp_path.iterdir()) == []


def test_a_name_at_the_limit_of_the_file_system(tmp_path):
    file = tmp_path / f"{'n' * 250}.txt"
    with replacing(file) as partial:
        partial.write_text("x")
    assert file.read_text() == "x"


def test_what_an_interrupted_process_left_is_removed_by_name(tmp_path):
    for name in ("a", "other"):
        (tmp_path / f".{name}.0123abcd.partial.txt").touch()
    (tmp_path / ".a.txt").touch()
    remove_unfinished(tmp_path, re.compile("a"))
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.txt", ".other.0123abcd.partial.txt"]


class TestCheckWritable:
    def test_what_can_be_written(self, tmp_path):
        check_writable(tmp_path / "a.txt")
        check_writable(tmp_path / "new" / "folder" / "a.txt")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder(self, tmp_path):
        with pytest.raises(ValueError, match="it is a folder"):
            check_writable(tmp_path)

    def test_a_file_in_place_of_a_folder(self, tmp_path):
        (tmp_path / "a").touch()
        with pytest.raises(ValueError, match="a is not a folder|Not a directory"):
            check_writable(tmp_path / "a" / "b.txt")

    def test_a_name_too_long(self, tmp_path):
        with pytest.raises(ValueError, match="File name too long"):
            check_writable(tmp_path / ("n" * 300))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
    def test_no_right_to_write(self, tmp_path):
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="Permission denied"):
            check_writable(tmp_path / "a.txt")

    def test_a_folder_of_the_system_that_takes_no_files(self):
        with pytest.raises(ValueError, match="cannot be written"):
            check_writable(__import__("pathlib").Path("/proc/a.txt"))

    def test_what_another_file_must_not_replace(self, tmp_path):
        """`os.replace` puts a new file in the place of a read-only one, or of a pipe, without an error."""
        (tmp_path / "a.txt").touch(mode=0o400)
        with pytest.raises(ValueError, match="it is read-only"):
            check_writable(tmp_path / "a.txt")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="it is no regular file"):
            check_writable(tmp_path / "pipe")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        check_new_folder(tmp_path / name)
        with replacing_folder(tmp_path / name) as partial:
            (partial / "a").write_text("a")
            assert not (tmp_path / name / "a").exists()
        assert [file.name for file in (tmp_path / name).iterdir()] == ["a"]
        with pytest.raises(ValueError, match="the folder is not empty. Name a new one, or empty it"):
            check_new_folder(tmp_path / name)
    with pytest.raises(IsADirectoryError), replacing_folder(tmp_path / "failed") as partial:
        partial.write_text("a")
    with pytest.raises(OSError, match="not empty"), replacing_folder(tmp_path / "new") as partial:
        (partial / "b").write_text("b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="as a folder: a file is there"):
        check_new_folder(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a", "empty", "file", "new"]
