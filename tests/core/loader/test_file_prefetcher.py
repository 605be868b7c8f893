"""A thread reads a component's files ahead, up to a limit, and ends when it is stopped."""

import threading

import pytest

from diffsynth.core.loader import file_prefetcher
from diffsynth.core.loader.file_prefetcher import FilePrefetcher
from diffsynth.errors import CorruptFile


class Source:
    """A source whose `read_ahead` runs until it is stopped."""

    def __init__(self, error=None):
        self.error, self.begun, self.ended = error, threading.Event(), False

    def read_ahead(self, *, limit, stop):
        self.limit = limit
        self.begun.set()
        while self.error is None and not stop():
            threading.Event().wait(0.001)
        self.ended = True
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("free", "share", "most", "limit"),
    [
        (None, 0.25, None, 4 * 2**30),
        (400, 0.25, None, 100),
        (400, 0.5, None, 200),
        (400, 0.5, 150, 150),
        (None, 0.5, 9, 9),
    ],
)
def test_it_ends_with_the_context(monkeypatch, free, share, most, limit):
    monkeypatch.setattr(file_prefetcher.devices, "available_memory", lambda device: free)
    source = Source()
    with FilePrefetcher(source, share=share, most=most):
        assert source.begun.wait(5)
        assert not source.ended
    assert source.ended
    assert source.limit == limit


def test_it_ends_with_a_failed_upload():
    source = Source()
    with pytest.raises(RuntimeError), FilePrefetcher(source):
        raise RuntimeError
    assert source.ended


def test_a_damaged_file_is_left_to_the_load_itself():
    source = Source(CorruptFile("changed"))
    with FilePrefetcher(source):
        assert source.begun.wait(5)
