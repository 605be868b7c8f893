"""Downloading a `ModelConfig`'s files with the hub's own library, and checking them against the hub's checksums."""

from __future__ import annotations

import errno
import hashlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffsynth.core import progress
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.identity import hub_sha256
from diffsynth.errors import DownloadFailed
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_BLOCK = 2**24
_FOLDER_OPTION = {"huggingface": "--local-dir", "modelscope": "--local_dir"}


def download(config: ModelConfig) -> None:
    """Download the files that `config.patterns` match (none: all) into `config.folder`, resuming an interrupted
    download; raise DownloadFailed if that fails.

    Raises:
        DownloadFailed: the hub could not be reached or refused, the disk is full, or a checksum differs; the message
            says what to do.
    """
    progress.raise_if_stopped()
    logger.info("downloading %s from %s to %s", config, config.hub, config.folder)
    started = time.time()
    try:
        with progress.task("download", total=None, unit="bytes", description=str(config)) as task:
            _FETCHERS[config.hub](config, task)
    except _Stopped:
        progress.raise_if_stopped()
        raise
    except Exception as error:  # each hub library raises its own exceptions, and those of its http client
        # A library may quote the headers that it sent: an error that shows the token is not chained.
        leaks = bool(config.token and config.token in _all_texts(error))
        raise DownloadFailed(_explain(config, error)) from (None if leaks else error)
    _check_content(config, since=started)


def command(config: ModelConfig, patterns: Sequence[str] = ()) -> str:
    """Return a shell command, as one text, that downloads into `config.folder` the files of `patterns`, if that is
    empty those of `config.patterns`, else all.
    """
    start = {
        "huggingface": ["hf", "download", str(config.model_id)],
        "modelscope": ["modelscope", "download", "--model", str(config.model_id)],
    }[config.hub]
    include = [word for pattern in _globs(patterns or config.patterns) for word in ("--include", pattern)]
    revision = ["--revision", config.revision] if config.revision else []
    return shlex.join([*start, *include, *revision, _FOLDER_OPTION[config.hub], str(config.folder)])


def _globs(patterns: Sequence[str]) -> list[str]:
    return [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in patterns if pattern != "./"]


class _Stopped(BaseException):
    """Ends a download because the load is to end: no `Exception`, which hub libraries take for a lost connection and
    try again.
    """


@contextmanager
def _stopping() -> Iterator[None]:
    """Context manager that raises `_Stopped` in place of an exception that ends the load."""
    try:
        yield
    except Exception as error:
        raise _Stopped(str(error)) from None


def _from_modelscope(config: ModelConfig, task: progress.Task) -> None:
    from modelscope import snapshot_download  # type: ignore[import-untyped]
    from modelscope.hub.callback import ProgressCallback  # type: ignore[import-untyped]

    lock, total = threading.Lock(), 0

    class FileProgress(ProgressCallback):  # type: ignore[misc]
        """The progress of one file."""

        def __init__(self, filename: str, file_size: int) -> None:
            nonlocal total
            super().__init__(filename, file_size)
            with lock, _stopping():
                total += file_size
                task.expect(total)

        def update(self, size: int) -> None:
            with _stopping():
                task.advance(size)

    snapshot_download(
        config.model_id,
        local_dir=str(config.folder),
        allow_file_pattern=_globs(config.patterns) or None,
        revision=config.revision,
        token=config.token,
        **({} if task.is_silent else {"progress_callbacks": [FileProgress]}),
    )


def _from_huggingface(config: ModelConfig, task: progress.Task) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    lock = threading.Lock()
    bars: list[Any] = []

    class TotalProgress(tqdm):
        """A bar of the bytes of all files, received or written, that is not shown; or one of the files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if kwargs.get("unit") == "B":
                bars.append(self)
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            with lock, _stopping():
                self.n += n or 0
                if total := max((bar.total or 0 for bar in bars), default=0):
                    task.expect(int(total))
                task.reach(int(max((bar.n for bar in bars), default=0)))

    snapshot_download(
        str(config.model_id),
        local_dir=str(config.folder),
        allow_patterns=_globs(config.patterns) or None,
        revision=config.revision,
        token=config.token,
        tqdm_class=None if task.is_silent else TotalProgress,
    )


_FETCHERS: dict[str, Callable[[ModelConfig, progress.Task], None]] = {
    "modelscope": _from_modelscope,
    "huggingface": _from_huggingface,
}


def _check_content(config: ModelConfig, *, since: float) -> None:
    """Delete all new files whose sha256 differs from the one that huggingface_hub noted, and raise DownloadFailed; do
    nothing if there are none.

    ModelScope's library checks its own files.
    """
    wrong = []
    for file in sorted(config.folder.rglob("*")):
        # One second of tolerance, because file systems round their times.
        if not file.is_file() or file.stat().st_mtime < since - 1 or not (announced := hub_sha256(file)):
            continue
        if (found := _sha256(file)) != announced:
            file.unlink()
            wrong.append(f"{file} came with sha256 {found}, the hub announced {announced}")
    if wrong:
        are, them = ("It is", "it") if len(wrong) == 1 else ("They are", "them")
        raise DownloadFailed(
            f"{'; '.join(wrong)}: damaged in transfer, or the answer did not come from the hub. {are} removed. Load "
            f"again to fetch {them} again."
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _explain(config: ModelConfig, error: Exception) -> str:
    other = next(hub for hub in _FETCHERS if hub != config.hub)
    # A library that tries all files before it fails raises a summary: the first file's error says more.
    cause = next(iter(_failed_files(error)), error)
    text = str(cause).strip()
    if config.token:
        text = text.replace(config.token, "***")
    reason = text.splitlines()[0] if text else "no reason given"
    failed = f"could not fetch {config} from {config.hub}: {type(cause).__name__}: {reason:.200}."
    if _is_full(error):
        return f"{failed} Make room on the disk of {config.folder}, then load again: files that are complete are kept."
    return (
        f"{failed} {_advice(error)}; "
        f"or set DIFFSYNTH_DOWNLOAD_SOURCE={other}; "
        f"or put the files into {config.folder} and set DIFFSYNTH_SKIP_DOWNLOAD=true; or give ModelConfig a path."
    )


def _advice(error: Exception) -> str:
    codes = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _causes(error))
    status = next((code for code in codes if code is not None), None)
    if status in (401, 403):
        return (
            "The repository requires a login or an accepted license: accept it on its page and give ModelConfig a "
            "token, or log in with the hub's own command"
        )
    if status == 404:
        return "The hub has no repository or revision of that name: check the spelling"
    return "Check the network and the name, then load again: files that are complete are kept"


def _causes(error: BaseException) -> list[BaseException]:
    """Return a list of exceptions without repeats: `error`, those that caused it, and the errors of single files."""
    found: list[BaseException] = []
    remaining: list[BaseException | None] = [error]
    while remaining:
        cause = remaining.pop(0)
        if cause is not None and cause not in found:
            found.append(cause)
            remaining += [cause.__cause__, cause.__context__, *getattr(cause, "failed_files", {}).values()]
    return found


def _failed_files(error: BaseException) -> list[BaseException]:
    return [each for cause in _causes(error) for each in getattr(cause, "failed_files", {}).values()]


def _all_texts(error: Exception) -> str:
    return " ".join(f"{cause} {cause!r}" for cause in _causes(error))


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return any(isinstance(cause, OSError) and cause.errno in full for cause in _causes(error)) or (
        "No space left" in _all_texts(error)
    )
