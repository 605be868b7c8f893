"""Entry points are found as `importlib.metadata` finds them, and a damaged distribution hides no other."""

import errno
import importlib.metadata
import os
import sys
import zipfile

import pytest

from diffsynth._entry_points import EntryPoint, plugin_entries

ENTRY = "[diffsynth]\ntoy = fake_toy.plugin\n"


def write(folder, name, *, entry_points=ENTRY, metadata="Metadata-Version: 2.1\nName: fake-toy\nVersion: 1.0\n"):
    """Write the metadata of a distribution; None leaves a file out."""
    info = folder / name
    info.mkdir(parents=True, exist_ok=True)
    for file, text in (("entry_points.txt", entry_points), ("METADATA", metadata)):
        if text is not None:
            (info / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return info


@pytest.fixture
def only(monkeypatch):
    """Return a function that makes some folders the whole of `sys.path` and returns what is found there."""

    def find(*folders):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [str(folder) for folder in folders])
            return plugin_entries()

    return find


def test_all_that_are_installed_are_those_of_importlib():
    known = importlib.metadata.entry_points(group="diffsynth")
    expected = {(each.name, each.value, each.dist.name, each.dist.version) for each in known}
    found, damaged = plugin_entries()
    assert {(each.name, each.value, each.distribution, each.version) for each in found} == expected
    assert len(found) >= 6
    assert damaged == []


def test_the_first_distribution_of_a_name_counts(only, tmp_path):
    for version in ("1.0", "2.0"):
        write(tmp_path / version, f"Fake.Toy-{version}.dist-info", metadata=f"Name: fake_toy\nVersion: {version}\n")
    for order in (("1.0", "2.0"), ("2.0", "1.0")):
        ((found,), damaged) = only(*(tmp_path / version for version in order))
        assert (found, damaged) == (EntryPoint("toy", "fake_toy.plugin", "fake_toy", order[0]), [])


def test_what_an_uninstallation_left_hides_no_distribution(only, tmp_path):
    (tmp_path / "old" / "fake_toy-0.9.dist-info").mkdir(parents=True)
    write(tmp_path / "new", "fake_toy-1.0.dist-info")
    assert [each.version for each in only(tmp_path / "old", tmp_path / "new")[0]] == ["1.0"]
    write(tmp_path / "new", "~ake_toy-0.9.dist-info")
    found, (damaged,) = only(tmp_path / "new")
    assert [each.version for each in found] == ["1.0"]
    assert damaged.error.startswith("is what an interrupted uninstallation has left. Run: ")
    assert damaged.error.endswith("~ake_toy-0.9.dist-info")


def test_eggs_zip_files_and_other_finders(only, tmp_path, monkeypatch):
    info = write(tmp_path / "develop", "fake_toy.egg-info", metadata=None)
    (info / "PKG-INFO").write_text("Name: fake-toy\nVersion: 1.0\n")
    info = write(tmp_path / "fake_toy-1.0-py3.egg", "EGG-INFO", metadata=None)
    (info / "PKG-INFO").write_text("Name: fake-toy\nVersion: 1.0\n")
    with zipfile.ZipFile(tmp_path / "toy.zip", "w") as file:
        file.writestr("fake_toy-1.0.dist-info/METADATA", "Name: fake-toy\nVersion: 1.0\n")
        file.writestr("fake_toy-1.0.dist-info/entry_points.txt", ENTRY)
    expected = [EntryPoint("toy", "fake_toy.plugin", "fake-toy", "1.0")], []
    for place in ("develop", "fake_toy-1.0-py3.egg", "toy.zip"):
        assert only(tmp_path / place) == expected, place

    class Finder(importlib.metadata.DistributionFinder):
        def find_spec(self, *arguments):
            return None

        def find_distributions(self, context=None):
            where = importlib.metadata.DistributionFinder.Context(path=[str(tmp_path / "develop")])
            return importlib.metadata.MetadataPathFinder.find_distributions(where)

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    assert only() == expected
    monkeypatch.setattr(Finder, "find_distributions", lambda self, context: 1 / 0)
    found, (damaged,) = only(tmp_path / "develop")
    assert (found, damaged.distribution) == (expected[0], __name__.partition(".")[0].replace("_", "-"))
    assert "its finder of distributions fails: ZeroDivisionError" in damaged.error


UNREADABLE = {
    "is no UTF-8 text": {"entry_points": b"[diffsynth]\ntoy = \xff\xfe\n"},
    "line 2 is 'nonsense', expected 'name = module' in a [group]": {"entry_points": "[other]\nnonsense\n"},
    "line 1 is 'a = b', expected": {"entry_points": "a = b\n"},
    "has 2000000 bytes, expected at most": {"entry_points": b"#" * 2_000_000},
    "METADATA is no UTF-8 text": {"metadata": b"Name: fake\xff\nVersion: 1.0\n"},
    "METADATA has the Name ''": {"metadata": "Version: 1.0\n"},
    "METADATA has the Name 'a\\x1b[2J'": {"metadata": "Name: a\x1b[2J\nVersion: 1.0\n"},
    "METADATA has the Version ''": {"metadata": "Name: fake-toy\n"},
    "METADATA is missing": {"metadata": None},
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_damaged_content(only, tmp_path, reason):
    write(tmp_path, "fake_bad-0.1.dist-info", **UNREADABLE[reason])
    write(tmp_path, "fake_toy-1.0.dist-info")
    found, (damaged,) = only(tmp_path)
    assert [each.distribution for each in found] == ["fake-toy"]
    assert (damaged.distribution, damaged.version) == ("fake-bad", "0.1")
    assert damaged.plugins == (("toy",) if reason.startswith("METADATA") else ())
    assert reason in damaged.error
    assert "Run: pip install --force-reinstall --no-deps fake-bad; or delete " in damaged.error


@pytest.mark.parametrize("file", ["entry_points.txt", "METADATA"])
@pytest.mark.parametrize("kind", ["folder", "dangling link", "circular link", "pipe", "no permission"])
def test_damaged_files(only, tmp_path, monkeypatch, file, kind):
    bad = write(tmp_path, "fake_bad-0.1.dist-info") / file
    write(tmp_path, "fake_toy-1.0.dist-info")
    bad.unlink()
    if kind == "folder":
        bad.mkdir()
    elif kind == "pipe":
        os.mkfifo(bad)
    elif kind == "no permission":  # raised here, because root may read every file
        bad.write_text("")
        opened = os.open

        def refuse(path, *arguments, **options):
            if str(path) == str(bad):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return opened(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refuse)
    else:
        bad.symlink_to(bad if kind == "circular link" else tmp_path / "nowhere")
    found, (damaged,) = only(tmp_path)
    assert [each.distribution for each in found] == ["fake-toy"]
    assert damaged.distribution == "fake-bad"
    assert damaged.error.startswith(file)


@pytest.mark.parametrize("name", ["", "a b", "a\x1bb", "a,b", "a:b", "a/b", "-a", "x" * 101, "a\u202eb"])
def test_names_that_cannot_be_used(name):
    with pytest.raises(ValueError, match="expected a name of letters, digits"):
        EntryPoint(name, "fake_toy.plugin", "fake-toy", "1.0").check()
    EntryPoint("wan2.1-漢字", "fake_toy.plugin", "fake-toy", "1.0").check()


@pytest.mark.parametrize("value", ["", "a b", "a..b", "a:", "../a", "a:b:c"])
def test_values_that_name_no_module(value):
    with pytest.raises(ValueError, match=r"expected 'package\.module'"):
        EntryPoint("toy", value, "fake-toy", "1.0").load()
    assert EntryPoint("toy", "os.path:join [extra]", "fake-toy", "1.0").load() is os.path.join
