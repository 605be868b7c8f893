"""Goes ahead of a component that waits on disk: what will be read from its files is cached by the system by then."""

from __future__ import annotations

import logging
import threading

from diffsynth.core import device as devices
from diffsynth.core.loader.reader.source import ComponentSource
from diffsynth.errors import CorruptFile

logger = logging.getLogger(__name__)

_LIMIT = 4 * 2**30
"""Bytes where the system does not say how much memory is free."""


class FilePrefetcher:
    """A thread that has the system cache the files of a component, at most half of the memory that is free.

    Args:
        source: of the component.
    """

    def __init__(self, source: ComponentSource) -> None:
        free = devices.available_memory("cpu")
        self._source = source
        self._limit = _LIMIT if free is None else free // 2
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, name="diffsynth-herald", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """From now on the component reads by itself; returns when the thread has ended."""
        self._done.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            self._source.read_ahead(limit=self._limit, stop=self._done.is_set)
        except CorruptFile:
            logger.debug("reading ahead stopped; reading will say why", exc_info=True)
