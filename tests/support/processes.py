"""Run a function in several forked processes of one process group; nothing is imported or built again."""

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
"""Timeout after which processes that wait for each other are killed; long, because the machine may be busy."""


def run_together(size: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of `work(rank)` in `size` processes, with the environment variables that `torchrun` sets.

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
        return [_result_of(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _result_of(pipe: Connection, rank: int) -> Any:
    assert pipe.poll(SECONDS), f"process {rank} returned nothing within {SECONDS} s"
    try:
        succeeded, result = pipe.recv()
    except EOFError:
        raise AssertionError(f"process {rank} ended without a result") from None
    assert succeeded, f"process {rank} failed:\n{result}"
    return result


def _child(pipe: Connection, work: Callable[[int], Any], rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)  # a thread pool does not survive a fork
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
    # Rank 0 holds the store that the others may still use, so no process ends by itself: the parent kills all.
    pipe.close()
    multiprocessing.Event().wait(SECONDS)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
