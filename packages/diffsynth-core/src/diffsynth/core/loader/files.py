"""From a `ModelConfig` to files on disk. Never an empty answer: what is not there is said, with what is."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from diffsynth.core.loader.config import ModelConfig
from diffsynth.errors import NoFiles
from diffsynth.spec import Source, parse_source

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


def find(config: ModelConfig, *, resolve: Callable[[str], list[Path] | None] | None = None) -> list[Path]:
    """Local files (or one folder) of a config, downloaded first if they are not there and the network is allowed.

    Args:
        resolve: asked for the files of a `scheme://` source that core does not know.

    Raises:
        NoFiles: nothing matches, or shards are missing; the message shows where it looked and what is there.
        DownloadFailed: the hub could not be reached.
    """
    if config.path is not None:
        return _from_paths(config.path)
    if config.source is not None:
        return _from_source(config.source, resolve)
    folder = config.root / str(config.model_id)
    found = _in_folder(folder, config.patterns)
    if (not found or missing_shards(found)) and not config.offline:
        from diffsynth.core.loader.download import download

        download(config)
        found = _in_folder(folder, config.patterns)
    if not found:
        how = "" if not config.offline else " Downloads are off (skip_download or DIFFSYNTH_SKIP_DOWNLOAD)."
        raise NoFiles(f"no file matches {config.patterns or 'anything'} in {folder}.{how} {_what_is_there(folder)}")
    _reject_missing_shards(found)
    return found


def weights_state(sources: Iterable[str], base_path: Path) -> str:
    """ "present", "partial" or "absent", by looking at names alone."""
    states = [_is_present(parse_source(source), base_path) for source in sources]
    if states and all(states):
        return "present"
    return "partial" if any(state is not False for state in states) else "absent"


def missing_shards(files: Iterable[Path]) -> list[str]:
    """Names of the shards that are numbered or indexed beside these files and not among them."""
    files = list(files)
    names = {file.name for file in files}
    missing: set[str] = set()
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            every = (
                f"{match['stem']}-{i:05d}-of-{match['count']}{match['suffix']}"
                for i in range(1, int(match["count"]) + 1)
            )
            missing.update(name for name in every if name not in names)
    for index in {index for file in files for index in file.parent.glob("*.safetensors.index.json")}:
        stem = index.name.removesuffix(".safetensors.index.json")
        if any(name.startswith(stem) for name in names):
            listed = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
            missing.update(listed - names)
    return sorted(missing)


def _from_paths(path: str | Path | Iterable[str | Path]) -> list[Path]:
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(each) for each in path]
    if not paths:
        raise NoFiles("path is an empty list; expected the files of one checkpoint")
    for each in paths:
        if not each.exists():
            raise NoFiles(f"{each} does not exist. {_what_is_there(each.parent)}")
    if len(paths) == 1 and paths[0].name.endswith(".index.json"):
        listed = sorted(set(json.loads(paths[0].read_text(encoding="utf-8"))["weight_map"].values()))
        paths = [paths[0].parent / name for name in listed]
        if missing := [each.name for each in paths if not each.exists()]:
            raise NoFiles(f"{len(missing)} of {len(paths)} shards are missing: {', '.join(missing)}")
    return paths


def _from_source(text: str, resolve: Callable[[str], list[Path] | None] | None) -> list[Path]:
    source = parse_source(text)
    if source.scheme == "package":
        path = _package_path(source)
        if not path.exists():
            raise NoFiles(f"{text}: {path} does not exist. {_what_is_there(path.parent)}")
        return [path]
    found = resolve(text) if resolve is not None else None
    if not found:
        raise NoFiles(
            f"no installed plugin resolves the source {text!r}; expected owner/repository:pattern or package://"
        )
    return found


def _package_path(source: Source) -> Path:
    package, _, inside = source.location.partition("/")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise NoFiles(f"{source.text}: package {package!r} is not installed")
    return Path(next(iter(found.submodule_search_locations))) / inside


def _in_folder(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    if not patterns:
        return [folder] if folder.is_dir() and any(folder.iterdir()) else []
    found: set[Path] = set()
    for pattern in patterns:
        if pattern.endswith("/"):
            if (folder / pattern).is_dir() and any((folder / pattern).iterdir()):
                found.add(folder / pattern)
        else:
            found.update(file for file in folder.glob(pattern) if file.is_file())
    return sorted(found)


def _is_present(source: Source, base_path: Path) -> bool | None:
    """True, False, or None for a part of it."""
    if source.scheme:
        return source.scheme == "package" and _package_path(source).exists()
    patterns = () if source.pattern in ("", "./") else (source.pattern,)
    found = _in_folder(base_path / source.model_id, patterns)
    if not found:
        return False
    return None if missing_shards(found) else True


def _reject_missing_shards(files: list[Path]) -> None:
    if missing := missing_shards(files):
        raise NoFiles(
            f"{len(missing)} shards are missing in {files[0].parent}: {', '.join(missing)}. "
            f"Download them again, or check that the copy was complete."
        )


def _what_is_there(folder: Path) -> str:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")
    return f"In {folder}: {shown or 'nothing'}."
