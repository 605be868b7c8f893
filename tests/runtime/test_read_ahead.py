"""While one component is on its way to an accelerator, the next is brought to the system's cache."""

import threading

import pytest

from diffsynth.errors import CorruptFile
from diffsynth.runtime import pretrained


class Source:
    """Reads ahead until it is told to stop."""

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


@pytest.mark.parametrize("free", [None, 400])
def test_it_ends_with_the_upload(monkeypatch, free):
    monkeypatch.setattr(pretrained.devices, "available_memory", lambda device: free)
    source = Source()
    with pretrained._reading_ahead(source):
        assert source.begun.wait(5)
        assert not source.ended
    assert source.ended
    assert source.limit == (pretrained._READ_AHEAD if free is None else 100)


def test_it_ends_with_a_failed_upload():
    source = Source()
    with pytest.raises(RuntimeError), pretrained._reading_ahead(source):
        raise RuntimeError
    assert source.ended


def test_its_own_trouble_is_left_to_the_load_itself():
    source = Source(CorruptFile("changed"))
    with pretrained._reading_ahead(source):
        assert source.begun.wait(5)
    with pretrained._reading_ahead(None):
        pass
