"""Finding the files of a `ModelConfig`, or of the checkpoint at a path.

The result is never empty: a file that is missing raises an error that shows the folder's contents.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import re
from collections.abc import Callable, Container, Iterable, Sequence
from pathlib import Path

from diffsynth.core.loader import file_kinds
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.paths import expanded
from diffsynth.core.replacing import is_unfinished
from diffsynth.errors import CorruptFile, NoFiles, shortened
from diffsynth.spec import Source, parse_source
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_UNFINISHED = re.compile(r"\.(incomplete|partial|lock|tmp)$")
"""Names of files that are still being downloaded or written."""

WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)

_INDEX = ".index.json"

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")

_NO_WEIGHTS = re.compile(
    r"((optimizer|scheduler|training_args|rng_state|random_states|scaler)[\w-]*|state)\.(bin|pth?)"
)
"""Names of other pickles that training programs write beside weights."""


def find(config: ModelConfig, *, resolve: Callable[[str], list[Path] | None] | None = None) -> list[Path]:
    """Return a list of the `Path`s of a config's local files (or folders), after downloading missing ones unless that
    is off; raise NoFiles if a pattern matches nothing.

    Args:
        config: the checkpoint, or another file or folder of a repository.
        resolve: called for the files of a `scheme://` source that core does not know; returns None if it does not
            know it either.

    Raises:
        ValueError: a config that has tensors in memory.
        NoFiles: nothing matches, shards are missing, or a glob matches several checkpoints in one folder; the message
            shows the folder and its contents.
        CorruptFile: an index of shards does not parse.
        DownloadFailed: the download failed.
    """
    if config.state_dict is not None:
        raise ValueError("this ModelConfig has a state_dict and no files; read its header with checkpoint.read_config")
    if config.path is not None:
        return _from_paths(config.path)
    if config.source is not None:
        return _from_source(config.source, resolve)
    found = _in_folder(config.folder, config.patterns)
    if (_unmatched(config) or missing_shards(found)) and not config.offline:
        from diffsynth.core.loader import download  # a list of models does not need it

        download.download(config)
        found = _in_folder(config.folder, config.patterns)
    if unmatched := _unmatched(config):
        named = " and ".join(map(repr, unmatched))
        raise NoFiles(
            f"no file matches {named} in {config.folder}. "
            f"{_how_to_fetch(config, unmatched)}{_contents_of(config.folder)}"
        )
    in_full = [config.folder / pattern for pattern in config.patterns if not glob.has_magic(pattern)]
    found = _of_one_checkpoint(found, in_full)
    _reject_missing_shards(
        found, _how_to_fetch(config) if config.offline else "Check that the pattern takes all of them."
    )
    return found


def _unmatched(config: ModelConfig) -> list[str]:
    """Return a list of the config's file patterns that no local file matches; `["./"]` if its whole repository is
    missing.
    """
    patterns = config.patterns or ("./",)
    return [pattern for pattern in patterns if not _in_folder(config.folder, () if pattern == "./" else (pattern,))]


def _how_to_fetch(config: ModelConfig, patterns: Sequence[str] = ()) -> str:
    if not config.offline:
        return f"The repository on {config.hub} has none: check the pattern. "
    from diffsynth.core.loader import download  # a list of models does not need it

    return f"Downloads are off (skip_download or DIFFSYNTH_SKIP_DOWNLOAD). Run: {download.command(config, patterns)}  "


def checkpoint_at(path: Path) -> list[Path]:
    """Return a list of the `Path`s of all files of the checkpoint at a path (a file, any shard of a set, an index, or a
    folder); raise NoFiles if there is not exactly one.

    Raises:
        NoFiles: there is no checkpoint, shards are missing, or the folder holds several.
        CorruptFile: an index of shards does not parse.
    """
    path = expanded(path)
    if file_kinds.exists(path) and path.is_dir():
        return only_checkpoint(path)
    if match := _SHARD.fullmatch(path.name):
        found = sorted(path.parent.glob(f"{glob.escape(match['stem'])}-*-of-{match['count']}{match['suffix']}"))
        return _from_paths(found or [path])
    return _from_paths(path)


def only_checkpoint(folder: Path) -> list[Path]:
    """Return a list of the weight files (`Path`s) of a folder's only checkpoint, without subfolders; raise NoFiles if
    not one.

    Raises:
        NoFiles: there is no checkpoint, there are several, or shards are missing; the message shows what is there.
    """
    found = _weights_in(folder)
    if not found:
        below = sorted({file.parent.name for file in folder.glob("*/*") if file.suffix in WEIGHT_SUFFIXES})
        hint = f" These folders in it do: {', '.join(below)}. Name one." if below else f" {_contents_of(folder)}"
        raise NoFiles(f"folder {folder} holds no {' or '.join(WEIGHT_SUFFIXES)} weights.{hint}")
    found = _chosen(folder, found)
    _reject_missing_shards(found)
    return found


def _of_one_checkpoint(files: Sequence[Path], named: Container[Path]) -> list[Path]:
    """Return what globs matched without weight files that an index beside them leaves out, sorted; raise NoFiles if the
    weights of one folder are several checkpoints.

    Args:
        files: the files and folders.
        named: those among them that are named in full: none of them is left out.
    """
    matched: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix in WEIGHT_SUFFIXES and file not in named:
            matched.setdefault(file.parent, []).append(file)
    others = [file for file in files if file.suffix not in WEIGHT_SUFFIXES or file in named]
    return sorted({*others, *(file for folder, inside in matched.items() for file in _chosen(folder, inside))})


def _chosen(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files of the only checkpoint among weight files of a folder, or of the only one that an index
    describes; raise NoFiles if there are several, because no order of their names says which is meant.
    """
    found = _grouped(folder, files)
    if len(found) == 1:
        return next(iter(found.values()))
    indexed = [name for name in found if name.endswith(_INDEX)]
    if len(indexed) == 1:
        left_out = [file.name for name, inside in found.items() if name != indexed[0] for file in inside]
        logger.warning("%s: not among the shards of %s, so not read: %s", folder, indexed[0], shortened(left_out))
        return found[indexed[0]]
    several = "; ".join(
        f"{inside[0].name}" + (f" and its shards ({len(inside)})" if inside[1:] else "") for inside in found.values()
    )
    raise NoFiles(
        f"folder {folder} holds {len(found)} checkpoints: {several}. Name the files of one: with a path, or with an "
        f"origin_file_pattern that matches no other."
    )


def _weights_in(folder: Path) -> list[Path]:
    """Return a sorted list of the `Path`s of a folder's weight files; optimizer states and hidden files are skipped."""
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix in WEIGHT_SUFFIXES and not file.name.startswith(".") and not _NO_WEIGHTS.fullmatch(file.name)
    )
    if any(file.suffix == ".safetensors" for file in files):
        # Repositories keep the same weights as a pickle for older programs.
        files = [file for file in files if not (file.name.startswith("pytorch_model") and file.suffix == ".bin")]
    return files


def _grouped(folder: Path, files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return a dict of the checkpoints among a folder's weight files: name of the index that lists them, or of the
    numbered set, or of the only file -> its files, in the order of `files`.
    """
    indexed = {folder / name: index.name for index in sorted(folder.glob(f"*{_INDEX}")) for name in _indexed(index)}
    groups: dict[str, list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.name)
        numbered = f"{match['stem']}-of-{match['count']}{match['suffix']}" if match else file.name
        groups.setdefault(indexed.get(file, numbered), []).append(file)
    return groups


def weights_state(sources: Iterable[str], base_path: Path) -> str:
    """Return "present" if all files of a model are on disk, "partial" if some are, else "absent"; only names are
    compared.

    A source that core cannot resolve is absent.

    Args:
        sources: source strings of a model's files.
        base_path: the folder under which repositories are downloaded.

    Raises:
        ValueError: a source does not parse.
    """
    states = [_is_present(parse_source(source), base_path) for source in sources]
    if states and all(states):
        return "present"
    return "partial" if any(state is not False for state in states) else "absent"


def missing_shards(files: Iterable[Path]) -> list[Path]:
    """Return a sorted list of the `Path`s of shards (parts of a checkpoint) that `files` lack, by their numbers or an
    index.
    """
    files = set(files)
    wanted: set[Path] = set()
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            count = int(match["count"])
            wanted.update(
                file.with_name(f"{match['stem']}-{i:05d}-of-{match['count']}{match['suffix']}")
                for i in range(1, count + 1)
            )
    for folder in {file.parent for file in files}:
        for index in folder.glob(f"*{_INDEX}"):
            listed = {folder / name for name in _indexed(index)}
            # An index that lists none of the files belongs to another checkpoint.
            wanted.update(listed if listed & files else ())
    return sorted(wanted - files)


def _indexed(index: Path) -> list[str]:
    """Return a sorted list of the file names that a JSON index of shards (parts of a checkpoint) lists; empty if
    unreadable.
    """
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    # Names that lead out of the folder are ignored: no checkpoint's own index has them.
    return sorted(name for name in names if name and not Path(name).is_absolute() and ".." not in Path(name).parts)


def _from_paths(path: str | Path | Iterable[str | Path]) -> list[Path]:
    paths = [expanded(path)] if isinstance(path, str | Path) else sorted(map(expanded, path))
    if not paths:
        raise NoFiles("path is an empty list; expected the files of one checkpoint")
    for each in paths:
        if not file_kinds.exists(each):
            raise NoFiles(f"{each} {file_kinds.why_missing(each)}. {_contents_of(each.parent)}")
    if len(paths) == 1 and paths[0].name.endswith(_INDEX):
        index = paths[0]
        paths = [index.parent / name for name in _indexed(index)]
        if not paths:
            raise CorruptFile(f"{index} is not an index of shards: it has no weight_map. Fetch it again.")
        if missing := [each.name for each in paths if not each.exists()]:
            raise NoFiles(
                f"{len(missing)} of the {len(paths)} shards in {index} are missing: {', '.join(missing)}. "
                f"Download them again, or check that the copy was complete."
            )
    _reject_missing_shards(paths)
    _reject_unlisted(paths)
    return paths


def _from_source(text: str, resolve: Callable[[str], list[Path] | None] | None) -> list[Path]:
    source = parse_source(text)
    if source.scheme == "package":
        path = _package_path(source)
        if not path.exists():
            raise NoFiles(f"{text}: {path} does not exist. {_contents_of(path.parent)}")
        return [path]
    found = resolve(text) if resolve is not None else None
    if not found:
        raise NoFiles(
            f"no installed plugin resolves the source {text!r}; expected owner/repository:pattern or package://"
        )
    return sorted(found)


def _package_path(source: Source) -> Path:
    package, _, inside = source.location.partition("/")
    try:
        # `find_spec` of a top-level package does not import it, so torch is not loaded.
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise NoFiles(f"{source.text}: package {package!r} is not installed")
    return Path(next(iter(found.submodule_search_locations))) / inside


def _in_folder(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    if not patterns:
        return [folder] if _has_content(folder) else []
    if not folder.is_dir():
        return []
    found: set[Path] = set()
    for pattern in patterns:
        if pattern.endswith("/"):
            if _has_content(folder / pattern):
                found.add(folder / pattern)
        else:
            found.update(
                file
                for file in folder.glob(pattern)
                if file.is_file() and not _UNFINISHED.search(file.name) and not is_unfinished(file)
            )
    return sorted(found)


def _has_content(folder: Path) -> bool:
    # Hub libraries leave hidden folders behind even when a download failed at its first byte.
    return folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())


def _is_present(source: Source, base_path: Path) -> bool | None:
    """Return True if a source's files are on disk, False if not, None if some shards (parts of a file set) are not."""
    if source.scheme:
        try:
            return source.scheme == "package" and _package_path(source).exists()
        except NoFiles:
            return False
    patterns = () if source.pattern in ("", "./") else (source.pattern,)
    found = _in_folder(base_path / source.model_id, patterns)
    if not found:
        return False
    return None if missing_shards(found) else True


def _reject_missing_shards(files: list[Path], next_step: str = "") -> None:
    if missing := missing_shards(files):
        named = shortened([file.name for file in missing], 10)
        are = "shard is" if len(missing) == 1 else "shards are"
        raise NoFiles(
            f"{len(missing)} {are} missing in {missing[0].parent}: {named}. "
            f"{next_step or 'Download them again, or check that the copy was complete.'}"
        )


def _reject_unlisted(files: Sequence[Path]) -> None:
    """Raise NoFiles if an index lists some of these files and not others of the same folder."""
    for folder in {file.parent for file in files}:
        inside = [file for file in files if file.parent == folder and file.suffix in WEIGHT_SUFFIXES]
        found = _grouped(folder, inside)
        for index in (name for name in found if name.endswith(_INDEX) and len(found) > 1):
            others = [file.name for file in inside if file not in found[index]]
            raise NoFiles(
                f"{folder / index} lists {len(found[index])} of the files given, and not {shortened(others)}: they are "
                f"of several checkpoints. Name the files of one."
            )


def _contents_of(folder: Path) -> str:
    """Return a sentence with up to 10 names in a folder or its nearest existing parent, `"In /m: a, b/."`; empty if
    none exists.
    """
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        return ""
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in folder.iterdir())
    return f"In {folder}: {shortened(names, 10) or 'nothing'}."
