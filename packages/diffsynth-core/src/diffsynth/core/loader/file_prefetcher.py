"""Reading files ahead of their use, so that the system's page cache holds them by then."""

from __future__ import annotations

import threading
from types import TracebackType

from diffsynth.core import device as devices
from diffsynth.core.loader.reader.source import WeightSource
from diffsynth.errors import CorruptFile
from diffsynth.terminal import module_logger

logger = module_logger(__name__)

_LIMIT = 4 * 2**30
"""Bytes to read ahead where the system does not report how much memory is free."""


class FilePrefetcher:
    """A thread that reads the files of a component once, so that the system caches them. Also a context manager.

    Args:
        source: the component whose files are read.
        share: the share of the free host memory that the cached files may take. Half, for a component that is read
            again and again during a call.
        most: bytes that are read at most; None sets no limit beside the share.
    """

    def __init__(self, source: WeightSource, *, share: float = 0.5, most: int | None = None) -> None:
        free = devices.available_memory("cpu")
        limit = _LIMIT if free is None else int(free * share)
        self._source = source
        self._limit = limit if most is None else min(limit, most)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, name="diffsynth-prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread that reads the files ahead, and wait until it has ended."""
        self._done.set()
        self._thread.join()

    def __enter__(self) -> FilePrefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _read(self) -> None:
        try:
            self._source.read_ahead(limit=self._limit, stop=self._done.is_set)
        except CorruptFile:
            # The component's own read meets the same fault and reports it to the caller.
            logger.debug("prefetching stopped", exc_info=True)
