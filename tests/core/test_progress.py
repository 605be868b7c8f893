"""Progress reports: of tasks, from threads, one load or call at a time, ended by the callback or by `cancel`."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from diffsynth.core import progress
from diffsynth.core.progress import NO_TASK, Progress, reporting, task, track
from diffsynth.errors import Cancelled, DownloadFailed
from progress_parts import check_parts


def test_a_task_reports_its_begin_each_unit_and_its_end():
    seen = []
    with reporting(seen.append), task("encode", total=3, unit="units") as current:
        current.describe("text")
        current.advance()
        current.advance(2)
    assert seen == [
        Progress("encode", 0, 3, "units"),
        Progress("encode", 0, 3, "units", "text"),
        Progress("encode", 1, 3, "units", "text"),
        Progress("encode", 3, 3, "units", "text"),
    ]


def test_bytes_are_reported_at_intervals_and_the_last_one_always():
    seen = []
    with reporting(seen.append), task("load", total=10_000, unit="bytes") as current:
        for _ in range(10_000):
            current.advance()
    assert len(seen) < 1000
    check_parts(seen)
    seen.clear()
    with reporting(seen.append), task("download", total=None, unit="bytes") as current:
        for total in (5, 9):
            current.expect(total)
            current.advance(3)
    assert (seen[0].total, seen[-1].done, seen[-1].total) == (None, 9, 9)
    check_parts(seen)


def test_done_neither_falls_nor_passes_the_total():
    seen = []
    with reporting(seen.append), task("load", total=10, unit="items") as current:
        for done in (4, 2, 12, 3):
            current.reach(done)
    assert [each.done for each in seen] == [0, 4, 10]


def test_a_part_that_takes_more_than_it_was_counted_with():
    seen = []
    with reporting(seen.append), task("load", total=10, unit="items") as current:
        for bound in (4, 6):
            current.bound(bound)
            current.advance(5)
            current.advance(5)
    assert [each.done for each in seen] == [0, 4, 6, 10]


def test_an_error_leaves_a_task_unfinished():
    seen = []
    with reporting(seen.append), pytest.raises(ZeroDivisionError), task("load", total=3, unit="items"):
        1 / 0  # noqa: B018
    assert [each.done for each in seen] == [0]


def test_nothing_is_reported_without_a_callback_or_outside_of_a_task():
    seen = []
    with task("load", total=1, unit="items") as current:
        assert current is NO_TASK
    with reporting(seen.append):
        assert list(track([1, 2], total=2, unit="tiles")) == [1, 2]
        assert progress.current("load") is NO_TASK
        with reporting(), task("load", total=1, unit="items"):
            progress.current("load").advance()
    assert seen == []


def test_tracked_items_belong_to_the_task_around_them():
    seen = []
    with reporting(seen.append), task("decode", total=1, unit="units", description="decode_image"):
        tiles = track("ab", total=2, unit="tiles")
        assert next(tiles) == "a"
        assert progress.current("decode").is_silent is False
        assert list(tiles) == ["b"]
        assert list(track("c", total=1, unit="tiles")) == ["c"]  # a single one says nothing
    assert [(each.stage, each.done, each.unit, each.description) for each in seen] == [
        ("decode", 0, "units", "decode_image"),
        ("decode", 0, "tiles", "decode_image"),
        ("decode", 1, "tiles", "decode_image"),
        ("decode", 2, "tiles", "decode_image"),
        ("decode", 1, "units", "decode_image"),
    ]
    check_parts(seen)


def test_threads_of_one_task_are_counted_together_and_reported_one_at_a_time():
    seen, running = [], threading.Lock()

    def on_progress(each):
        assert running.acquire(blocking=False), "two reports at once"
        seen.append(each)
        running.release()

    with reporting(on_progress), task("load", total=800, unit="items") as current, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(lambda: [current.advance() for _ in range(100)]) for _ in range(8)]:
            done.result()
    assert [each.done for each in seen] == list(range(801))


def test_threads_with_loads_of_their_own_do_not_mix():
    barrier, found = threading.Barrier(4), {}

    def load(name):
        with reporting(found.setdefault(name, []).append), task(name, total=50, unit="items"):
            barrier.wait()
            for _ in range(50):
                progress.current(name).advance()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load, "abcd"))
    for name, seen in found.items():
        assert [(each.stage, each.done) for each in seen] == [(name, done) for done in range(51)]


def test_an_exception_of_the_callback_ends_other_threads_and_is_the_error():
    """The code in between may take the callback's exception for its own, as hub libraries do."""

    class Mine(Exception):
        pass

    def on_progress(each):
        if each.done == 3:
            raise Mine

    ended = []

    def load():
        with reporting(on_progress), task("load", total=9, unit="items") as current:
            try:
                current.advance(3)
            except Mine as error:
                with ThreadPoolExecutor(1) as pool:
                    ended.append(type(pool.submit(current.advance).exception()))
                raise DownloadFailed("the hub failed") from error

    with pytest.raises(Mine):
        load()
    assert ended == [Mine]


def test_cancel_ends_a_task_at_its_next_report():
    cancel, reached = threading.Event(), []

    def load():
        with reporting(cancel=cancel), task("load", total=9, unit="items") as current:
            progress.raise_if_stopped()
            current.advance()
            cancel.set()
            for check in (progress.raise_if_stopped, current.advance):
                with pytest.raises(Cancelled):
                    check()
            reached.append(True)

    with pytest.raises(Cancelled):
        load()
    assert reached == [True]


def test_what_was_loaded_is_freed_with_the_error():
    class Loaded:
        pass

    made = []

    def load():
        loaded = Loaded()
        made.append(weakref.ref(loaded))
        cancel = threading.Event()
        with reporting(cancel=cancel), task("load", total=2, unit="items") as current:
            cancel.set()
            current.advance()

    gc.disable()
    try:
        with pytest.raises(Cancelled) as caught:
            load()
        caught.value.__traceback__ = None
        del caught
        assert made[0]() is None
    finally:
        gc.enable()


def test_wrong_arguments():
    with pytest.raises(TypeError, match="^on_progress=3: expected a function that takes a Progress"), reporting(3):
        pass
    with pytest.raises(TypeError, match="^cancel=True: expected a threading.Event"), reporting(cancel=True):
        pass
