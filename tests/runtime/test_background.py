"""`agenerate` and `stream`: calls in threads of their own."""

import asyncio
import contextlib
import contextvars
import gc
import threading

import pytest
import torch

from diffsynth.errors import Cancelled
from diffsynth.runtime.request import Step
from toy_pipeline import toy_pipeline

CALL = {"seed": 3, "num_inference_steps": 4}
LONG = {"seed": 3, "num_inference_steps": 10_000}
NAME = "diffsynth-call"


def running():
    return [thread for thread in threading.enumerate() if thread.name == NAME]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert running() == []


@pytest.fixture
def pipe():
    return toy_pipeline()


def test_agenerate_returns_what_the_call_returns(pipe):
    expected = [pipe("abc", **CALL), pipe("abcdef", **CALL)]

    async def several():
        return await asyncio.gather(pipe.agenerate("abc", **CALL), pipe.agenerate("abcdef", **CALL))

    assert asyncio.run(several()) == expected


def test_the_event_loop_goes_on_meanwhile(pipe):
    steps, ticks = threading.Event(), []

    async def main():
        task = asyncio.create_task(pipe.agenerate("abc", **CALL, on_step=lambda step: steps.wait(10)))
        for _ in range(3):
            await asyncio.sleep(0)
            ticks.append(task.done())
        steps.set()
        return await task

    assert asyncio.run(main()) == pipe("abc", **CALL)
    assert ticks == [False] * 3


def test_errors_of_the_call_are_raised(pipe):
    with pytest.raises(TypeError, match="unknown argument 'sede'; did you mean 'seed'"):
        asyncio.run(pipe.agenerate("abc", sede=3))
    with pytest.raises(TypeError, match="cancel"):
        asyncio.run(pipe.agenerate("abc", cancel="now"))
    stop = threading.Event()
    with pytest.raises(Cancelled):
        asyncio.run(pipe.agenerate("abc", **LONG, cancel=stop, on_step=lambda step: stop.set()))


def test_a_cancelled_task_ends_when_its_call_has_ended(pipe):
    at_step, seen = threading.Event(), []

    def on_step(step):
        seen.append(step.index)
        at_step.set()

    async def main():
        task = asyncio.create_task(pipe.agenerate("abc", **LONG, on_step=on_step))
        await asyncio.to_thread(at_step.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pipe.running_calls.refuse("x()")  # raises if the call still ran

    asyncio.run(main())
    assert 1 <= len(seen) < LONG["num_inference_steps"]


def test_a_timeout_cancels_and_the_callers_event_stays(pipe):
    mine = threading.Event()

    async def main():
        async with asyncio.timeout(0.05):
            await pipe.agenerate("abc", **LONG, cancel=mine)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert not mine.is_set()


def test_context_variables_are_those_of_the_caller(pipe):
    user = contextvars.ContextVar("user", default="nobody")
    seen = []
    user.set("me")
    asyncio.run(pipe.agenerate("abc", **CALL, on_step=lambda step: seen.append(user.get())))
    *_, _ = pipe.stream("abc", **CALL, on_step=lambda step: seen.append(user.get()))
    assert seen == ["me"] * 8


def test_a_stream_has_every_step_and_then_the_result(pipe):
    latents = []
    expected = pipe("abc", **CALL, on_step=lambda step: latents.append((step.index, step.latents.clone(), step.x0)))
    *steps, result = pipe.stream("abc", **CALL)
    assert result == expected
    assert all(isinstance(step, Step) for step in steps)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    for step, (_, values, x0) in zip(steps, latents, strict=True):
        assert torch.equal(step.latents, values)
        assert torch.equal(step.x0, x0)

    async def collect():
        return [item async for item in pipe.stream("abc", **CALL)]

    *steps, result = asyncio.run(collect())
    assert (len(steps), result) == (4, expected)


def test_the_call_runs_at_most_one_step_ahead(pipe):
    seen, ahead = [], []
    for item in pipe.stream("abc", seed=3, num_inference_steps=50, on_step=lambda step: seen.append(step.index)):
        if isinstance(item, Step):
            ahead.append(len(seen) - 1 - item.index)
    assert len(ahead) == 50
    assert 0 <= min(ahead) <= max(ahead) <= 2  # the one that waits has been given to the caller's on_step


def test_a_slow_consumer_holds_the_call(pipe):
    seen = []
    with pipe.stream("abc", **LONG, on_step=lambda step: seen.append(step.index)) as stream:
        assert next(stream).index == 0
        while len(seen) < 3:
            pass
        assert threading.Event().wait(0.1) is False
        assert seen == [0, 1, 2]


@pytest.mark.parametrize("how", ["break", "close", "with", "error", "garbage"])
def test_leaving_early_cancels_and_joins(pipe, how):
    ended = []

    def follow(step):
        ended.append(step.index)

    if how == "break":
        for item in pipe.stream("abc", **LONG, on_step=follow):
            assert item.index == 0
            break
    elif how == "close":
        stream = pipe.stream("abc", **LONG, on_step=follow)
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []
    elif how == "with":
        with pipe.stream("abc", **LONG, on_step=follow) as stream:
            next(stream)
    elif how == "error":
        with contextlib.suppress(ZeroDivisionError), pipe.stream("abc", **LONG, on_step=follow) as stream:
            raise ZeroDivisionError(next(stream))
    else:
        stream = pipe.stream("abc", **LONG, on_step=follow)
        cycle = [stream]
        cycle.append(cycle)
        del stream, cycle
        gc.collect()
    assert running() == []
    assert len(ended) <= 4
    pipe.running_calls.refuse("x()")


def test_an_async_stream_that_is_left_early(pipe):
    async def main():
        async with pipe.stream("abc", **LONG) as stream:
            async for step in stream:
                if step.index == 2:
                    break
        return step.index, running()

    assert asyncio.run(main()) == (2, [])


def test_waiting_that_is_cancelled_loses_no_step(pipe):
    go = threading.Event()

    async def main():
        found = []
        async with pipe.stream("abc", **CALL, on_step=lambda step: go.wait(10)) as stream:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.05)
            go.set()
            async for item in stream:
                found.append(item)
        return found

    *steps, result = asyncio.run(main())
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert result == pipe("abc", **CALL)


def test_errors_are_raised_in_the_consumer_once(pipe):
    stream = pipe.stream("abc", sede=3)
    with pytest.raises(TypeError, match="did you mean 'seed'"):
        next(stream)
    assert list(stream) == []

    def fail(step):
        if step.index == 1:
            raise ZeroDivisionError

    stream = pipe.stream("abc", **CALL, on_step=fail)
    assert next(stream).index == 0
    with pytest.raises(ZeroDivisionError):
        next(stream)


def test_a_stream_may_return_the_record(pipe):
    *_, made = pipe.stream("abc", **CALL, return_record=True)
    assert (made.output, made.seeds, made.record["seed"]) == (pipe("abc", **CALL), (3,), 3)
    assert made.record["not_recorded"] == []
