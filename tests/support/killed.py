"""A process that is killed at every operation that changes files, one after the other."""

import os
import signal
from collections.abc import Callable, Iterator

# A child ends by a signal, so that nothing of the parent's is flushed or cleaned up in it.
_KILLED, _DONE, _FAILED = signal.SIGKILL, signal.SIGUSR1, signal.SIGUSR2


def killed_at_every_write(action: Callable[[], object], *, most: int = 200) -> Iterator[int]:
    """Run `action` in child processes that end, as by kill -9, before their first sync, rename or removal of a file,
    their second, and so on; yield the number after each, and once more after a child that was not killed.

    Args:
        action: what is run; it must not depend on other threads.
        most: operations after which it is an error not to be done.
    """
    for count in range(1, most):
        child = os.fork()
        if child == 0:
            _run_until(count, action)
        _, status = os.waitpid(child, 0)
        end = -os.waitstatus_to_exitcode(status)
        assert end in (_KILLED, _DONE), f"the child ended with {end}"
        yield count
        if end == _DONE:
            return
    raise AssertionError(f"not done after {most} operations")


def _run_until(count: int, action: Callable[[], object]) -> None:
    done = 0

    def counting(function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object, **options: object) -> object:
            nonlocal done
            done += 1
            if done == count:
                os.kill(os.getpid(), _KILLED)
            return function(*arguments, **options)

        return run

    for name in ("fsync", "replace", "unlink", "remove", "rename"):
        setattr(os, name, counting(getattr(os, name)))
    try:
        action()
    except BaseException:
        os.kill(os.getpid(), _FAILED)
    os.kill(os.getpid(), _DONE)
