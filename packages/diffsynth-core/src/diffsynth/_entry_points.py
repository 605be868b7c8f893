"""Entry points of plugins, found in the metadata of the installed distributions. Imports no torch.

`importlib.metadata.entry_points()` raises if one distribution of all is damaged. Here each is read by itself: one file,
`entry_points.txt`, and METADATA only of those with a plugin. As there, the first distribution of a name on `sys.path`
counts. Zip files and finders of other libraries are left to `importlib.metadata`.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Any

from diffsynth.errors import shown

GROUP = "diffsynth"
"""Name of the entry-point group."""

_LARGEST = 1 << 20
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
"""A pipe in place of a file is opened without waiting for its writer."""

_NAME = re.compile(r"\w[\w.-]{0,99}")
_VALUE = re.compile(r"(?P<module>\w+(?:\.\w+)*)\s*(?::\s*(?P<attribute>\w+(?:\.\w+)*))?\s*(?:\[.*\])?")
_DISTRIBUTION = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?", re.ASCII)
_METADATA = ("METADATA", "PKG-INFO")

_Reader = Callable[[str], bytes | None]
"""Function that returns the content of a metadata file by its name, None if there is none; raises OSError."""


@dataclass(frozen=True)
class EntryPoint:
    """A line `name = value` in the group `diffsynth`, and the distribution that has it.

    Args:
        name: name of the plugin.
        value: module of the plugin, `"package.module"`, or an attribute, `"package.module:attribute"`.
        distribution: name of the installed distribution.
        version: its version.
    """

    name: str
    value: str
    distribution: str
    version: str

    @property
    def module(self) -> str:
        """Name of the module; the whole value if it names none."""
        found = _VALUE.fullmatch(self.value)
        return found["module"] if found else self.value

    def check(self) -> None:
        """Raise ValueError for a name or a value that cannot be used.

        Raises:
            ValueError: the name has other characters than letters, digits, '_', '-' and '.', or the value names no
                module.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"entry point {shown(self.name)}: expected a name of letters, digits, '_', '-' and '.'")
        if not _VALUE.fullmatch(self.value):
            raise ValueError(f"entry point {self.name} = {shown(self.value)}: expected 'package.module'")

    def load(self) -> Any:
        """Import and return the module or the attribute that the value names.

        Raises:
            ValueError: the value names no module.
            AttributeError: the module lacks the attribute.
        """
        self.check()
        found = _VALUE.fullmatch(self.value)
        assert found is not None
        loaded: Any = importlib.import_module(found["module"])
        for name in filter(None, (found["attribute"] or "").split(".")):
            loaded = getattr(loaded, name)
        return loaded


@dataclass(frozen=True)
class DamagedDistribution:
    """A distribution whose metadata cannot be read.

    Args:
        distribution: name, from that of its folder.
        version: version, from the name of its folder; empty if it has none.
        error: what is wrong, with the command that mends it.
        plugins: names of its plugins; empty if it has none, or if they cannot be read.
    """

    distribution: str
    version: str
    error: str
    plugins: tuple[str, ...] = ()


def plugin_entries() -> tuple[list[EntryPoint], list[DamagedDistribution]]:
    """Return a pair of what is installed: (list of the `EntryPoint`s of plugins, list of the `DamagedDistribution`s, of
    any kind), in the order of `sys.path`.
    """
    entries: list[EntryPoint] = []
    damaged: list[DamagedDistribution] = []
    by_name: dict[str, list[tuple[str, str, str, _Reader]]] = {}
    for found in _distributions():
        by_name.setdefault(normalized(found[0]), []).append(found)
    for several in by_name.values():
        name, version, folder, read = several[0] if len(several) == 1 else _first(several)
        pairs: list[tuple[str, str]] = []
        try:
            content = read("entry_points.txt")
            pairs = list(_pairs(content)) if content else []
            if pairs:
                if name.startswith("~"):
                    raise ValueError("is what an interrupted uninstallation has left")
                provider = _name_and_version(read)
                entries += [EntryPoint(*pair, *provider) for pair in dict.fromkeys(pairs)]
        except (OSError, ValueError) as error:  # UnicodeDecodeError is a ValueError
            spelled = re.sub(r"[-_.]+", "-", name)
            remedy = f"Run: pip install --force-reinstall --no-deps {spelled}; or delete {folder}"
            plugins = tuple(plugin for plugin, _ in pairs)
            damaged.append(DamagedDistribution(spelled, version, f"{_reason(error)}. {remedy}", plugins))
    return entries, damaged


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution; None if it is not installed, "" if its metadata cannot be read."""
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution) or ""
    except importlib.metadata.PackageNotFoundError:
        return None
    except Exception:  # UnicodeDecodeError, KeyError: whatever its parser raises for a damaged file
        return ""


def normalized(name: str) -> str:
    """Return the form of a distribution's or a plugin's name by which names are compared: lower case, "-" for each
    run of '-', '_' and '.'.
    """
    import unicodedata

    plain = name if name.isascii() else unicodedata.normalize("NFKC", name)
    return re.sub(r"[-_.]+", "-", plain).casefold()


def _distributions() -> Iterator[tuple[str, str, str, _Reader]]:
    """Yield (name, version, folder, reader) of each distribution; name and version are those of the folder's name."""
    for finder in list(sys.meta_path):
        if finder is PathFinder:
            for root in dict.fromkeys(sys.path):
                if isinstance(root, str):
                    yield from _in_path(root)
        elif find := getattr(finder, "find_distributions", None):
            yield from _of_finder(find)


def _first(several: list[tuple[str, str, str, _Reader]]) -> tuple[str, str, str, _Reader]:
    """Return the first that has metadata: a folder that an uninstallation has left hides no distribution."""
    for found in several:
        with suppress(OSError):
            if any(found[3](file) for file in ("entry_points.txt", *_METADATA)):
                return found
    return several[0]


def _in_path(root: str) -> Iterator[tuple[str, str, str, _Reader]]:
    try:
        children = os.listdir(root or ".")
    except OSError:
        if os.path.isfile(root):
            yield from _of_finder(PathFinder.find_distributions, path=[root])
        return
    is_egg = root.lower().endswith(".egg")
    for child in children:
        stem, dot, suffix = child.rpartition(".")
        if suffix.lower() in ("dist-info", "egg-info") and dot:
            pass
        elif is_egg and child.lower() == "egg-info":
            stem = os.path.basename(root)[: -len(".egg")]
        else:
            continue
        name, _, version = stem.partition("-")
        folder = os.path.join(root, child)
        yield name or child, version, folder, functools.partial(_read, folder)


def _of_finder(find: Callable[..., Any], **where: Any) -> Iterator[tuple[str, str, str, _Reader]]:
    """Yield what `_distributions` does for the distributions that a finder of `sys.meta_path` knows."""
    import importlib.metadata

    try:
        found = list(find(importlib.metadata.DistributionFinder.Context(**where)))
    except Exception as error:  # a finder of another library
        text = f"its finder of distributions fails: {type(error).__name__}: {error}"
        package = str(getattr(find, "__module__", "unknown")).partition(".")[0]
        yield package, "", "its package", _failing(text)
        return
    for distribution in found:
        try:
            name, version = str(distribution.metadata["Name"]), str(distribution.metadata["Version"])
        except Exception as error:  # whatever the parser of a damaged file or another library's class raises
            yield str(distribution), "", "it", _failing(f"its metadata cannot be read: {type(error).__name__}: {error}")
        else:
            yield name, version, name, _text_reader(distribution)


def _text_reader(distribution: Any) -> _Reader:
    def read(file: str) -> bytes | None:
        try:
            text = distribution.read_text(file)
        except Exception as error:
            raise OSError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
        return None if text is None else str(text).encode()

    return read


def _failing(text: str) -> _Reader:
    def read(file: str) -> bytes | None:
        raise OSError(text)

    return read


def _read(folder: str, file: str) -> bytes | None:
    path = f"{folder}{os.sep}{file}"
    try:
        descriptor = os.open(path, _FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):
            raise OSError(f"{file} is a link to a file that does not exist") from None
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{file} is no file")
        if status.st_size > _LARGEST:
            raise OSError(f"{file} has {status.st_size} bytes, expected at most {_LARGEST}")
        return os.read(descriptor, _LARGEST)
    finally:
        os.close(descriptor)


def _pairs(content: bytes) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of each line in our group.

    Raises:
        ValueError: a line of any group is malformed, or the content is no UTF-8.
    """
    group = None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"entry_points.txt is no UTF-8 text: {error}") from error
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip(" \t\r")
        if not line or line[0] in "#;":
            continue
        if line[0] == "[" and line[-1] == "]":
            group = line[1:-1]
            continue
        name, equals, value = line.partition("=")
        if group is None or not equals:
            raise ValueError(f"entry_points.txt, line {number} is {shown(line)}, expected 'name = module' in a [group]")
        if group == GROUP:
            yield name.strip(" \t"), value.strip(" \t")


def _name_and_version(read: _Reader) -> tuple[str, str]:
    """Return (name, version) of METADATA, whose header alone is parsed.

    Raises:
        ValueError: it is missing, no UTF-8, or lacks a plain name or version.
    """
    for file in _METADATA:
        if (content := read(file)) is not None:
            break
    else:
        raise ValueError("METADATA is missing")
    header = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[0]
    try:
        lines = header.decode().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from error
    fields = dict(line.split(": ", 1) for line in lines if ": " in line)
    name, version = (fields.get(field, "").strip() for field in ("Name", "Version"))
    if not _DISTRIBUTION.fullmatch(name):
        raise ValueError(f"{file} has the Name {shown(name)}, expected the name of a distribution")
    if not (version.isascii() and version.isprintable() and version):
        raise ValueError(f"{file} has the Version {shown(version)}, expected a version")
    return name, version


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{os.path.basename(str(error.filename))} cannot be read: {error.strerror}"
    return str(error)
