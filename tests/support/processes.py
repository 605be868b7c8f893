"""Several processes that work together, for tests: forked, so that nothing is imported or built again."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 120
"""Until processes that wait for each other are ended; the machine may be busy."""


def run_together(size: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(rank)` gave in each of `size` processes, which are told of each other as `torchrun` tells them.

    Raises:
        AssertionError: one of them failed; the message is its traceback.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, work, rank, size, port), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return [_answer(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(pipe: Connection, rank: int) -> Any:
    assert pipe.poll(SECONDS), f"process {rank} gave no answer in {SECONDS} s"
    try:
        good, answer = pipe.recv()
    except EOFError:
        raise AssertionError(f"process {rank} ended without an answer") from None
    assert good, f"process {rank} failed:\n{answer}"
    return answer


def _child(pipe: Connection, work: Callable[[int], Any], rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    os.environ |= {
        "GLOO_SOCKET_IFNAME": "lo",
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(size),
    }
    try:
        pipe.send((True, work(rank)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    # Whoever leaves first takes the store with it that the others may still ask: the parent ends all.
    pipe.close()
    multiprocessing.Event().wait(SECONDS)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
