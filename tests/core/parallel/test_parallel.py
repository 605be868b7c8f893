"""Collectives and meshes of two and of four processes, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, distributed

from diffsynth.core.attention import attention
from diffsynth.core.parallel import (
    LONE_PROCESS,
    MeshAxis,
    ProcessMesh,
    all_gather_shards,
    compute_and_gather,
    create_mesh,
    init_distributed,
    shard_sizes,
    shard_slice,
    ulysses_attention,
)
from diffsynth.errors import Refused, Unavailable
from parity import relative_error
from processes import run_together

SIZES = ((18, 3), (17, 4), (5, 1), (4, 6))
"""(tokens, heads): divisible by two and four processes or not, and fewer heads than processes."""


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("total", "size"), [(18, 4), (3, 2), (1, 3), (8, 8), (0, 2)])
def test_shards_are_even_and_complete(total: int, size: int) -> None:
    sizes = shard_sizes(total, size)
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    indices = [i for index in range(size) for i in range(total)[shard_slice(total, MeshAxis(None, index, size))]]
    assert indices == list(range(total))


def exchanges(rank: int) -> dict[str, float]:
    """Return the errors of every collective against one process."""
    mesh = create_mesh(device="cpu")
    errors = {}
    for tokens, heads in SIZES:
        q, k, v = (rand(2, tokens, heads, 8, seed=seed) for seed in range(3))
        own = shard_slice(tokens, mesh.tokens)
        seen = []

        def attend(q: Tensor, k: Tensor, v: Tensor, seen: list = seen) -> Tensor:
            seen.append(q.shape[1:3])
            return attention(q, k, v)

        read = ulysses_attention(attend, tokens, mesh.tokens)(q[:, own], k[:, own], v[:, own])
        errors[f"attend {tokens} {heads}"] = relative_error(read, attention(q, k, v)[:, own])
        mine = shard_sizes(heads, mesh.tokens.size)[rank]
        assert seen == ([(tokens, mine)] if mine else [])
        errors[f"join {tokens}"] = relative_error(all_gather_shards(q[:, own], tokens, mesh.tokens), q)
        half = q.bfloat16()
        errors[f"bf16 {tokens}"] = relative_error(all_gather_shards(half[:, own], tokens, mesh.tokens), half)
    q = rand(1, 8, 4, 8)
    with pytest.raises(ValueError, match="expected equal shapes"):
        ulysses_attention(attention, 8, mesh.tokens)(q, q[:, :, :1], q[:, :, :1])
    with pytest.raises(Refused, match="no gradient"):
        ulysses_attention(attention, 8, mesh.tokens)(q.requires_grad_(), q, q)
    with pytest.raises(Refused, match="no gradient"):
        all_gather_shards(q, 8, mesh.tokens)
    return errors


def layouts(rank: int) -> None:
    """Branches are rows, tokens columns; each process computes its branch and gets all of them."""
    mesh = create_mesh(cfg=2, device="cpu")
    world = distributed.get_world_size()
    assert (mesh.branches.size, mesh.tokens.size) == (2, world // 2)
    assert rank == mesh.branches.index * mesh.tokens.size + mesh.tokens.index
    assert mesh.is_main_process == (rank == 0)
    asked = []
    given = compute_and_gather(
        ["cond", "uncond"],
        lambda name: asked.append(name) or torch.full((2, 3), float(len(name) + 10 * mesh.tokens.index)),
        mesh.branches,
    )
    assert asked == [["cond", "uncond"][mesh.branches.index]]
    assert [float(each[0, 0]) for each in given] == [4 + 10 * mesh.tokens.index, 6 + 10 * mesh.tokens.index]
    torch.manual_seed(rank)
    own = torch.tensor(mesh.broadcast_seeds([None, 7]))
    of_all = [torch.zeros_like(own) for _ in range(world)]
    distributed.all_gather(of_all, own)
    assert all(torch.equal(own, other) for other in of_all)
    assert own[1] == 7
    assert own[0] != ProcessMesh().broadcast_seeds([3])[0]


def refusals(rank: int) -> None:
    init_distributed("cpu")
    world = distributed.get_world_size()
    for wrong in ({"sequence": 3}, {"cfg": 2, "sequence": world}, {"sequence": 0}, {"sequence": True}):
        with pytest.raises(ValueError, match=f"are not the {world} processes of torch.distributed"):
            create_mesh(**wrong, device="cpu")


def everything(rank: int) -> dict[str, float]:
    errors = exchanges(rank)
    layouts(rank)
    refusals(rank)
    return errors


@pytest.mark.parametrize("size", [2, 4])
def test_together(size: int) -> None:
    for errors in run_together(size, everything):
        assert len(errors) == 3 * len(SIZES)
        assert max(errors.values()) < 1e-5, errors


def odd(rank: int) -> None:
    with pytest.raises(ValueError, match="cfg=2 does not divide the 1 processes"):
        create_mesh(cfg=2, device="cpu")
    mesh = create_mesh(device="cpu")
    assert (mesh.branches, mesh.tokens, mesh.world) == (LONE_PROCESS, LONE_PROCESS, LONE_PROCESS)


def test_a_mesh_of_one_process() -> None:
    run_together(1, odd)


def test_without_a_process_group_a_mesh_is_refused() -> None:
    with pytest.raises(Unavailable, match="there is no process group; start the script with `torchrun"):
        create_mesh(device="cpu")
    with pytest.raises(ValueError, match="cfg=3: guidance has 2 branches"):
        create_mesh(cfg=3, device="cpu")


def test_one_process_exchanges_nothing() -> None:
    x = rand(1, 4, 2)
    assert all_gather_shards(x, 4, LONE_PROCESS) is x
    assert [
        float(each) for each in compute_and_gather(["a", "bc"], lambda name: torch.tensor(len(name)), LONE_PROCESS)
    ] == [1, 2]
    assert ProcessMesh().broadcast_seeds([None, 3]) == [None, 3]


def test_calls_that_would_wait_for_ever_are_refused() -> None:
    two = MeshAxis(None, 0, 2)
    branches, tokens = ProcessMesh(branches=two, world=two), ProcessMesh(tokens=two, world=two)
    branches.check_call(branches=("cond", "uncond"), step_cache="first_block", cancel=None)
    tokens.check_call(branches=("cond",), step_cache=None, cancel=None)
    ProcessMesh().check_call(branches=("cond",), step_cache="first_block", cancel=object())
    with pytest.raises(ValueError, match="computes the branches cond of guidance"):
        branches.check_call(branches=("cond",), step_cache=None, cancel=None)
    with pytest.raises(ValueError, match="cancel: the other processes would wait"):
        tokens.check_call(branches=("cond", "uncond"), step_cache=None, cancel=object())
    with pytest.raises(Refused, match="step_cache='first_block' is refused: each process would decide"):
        tokens.check_call(branches=("cond", "uncond"), step_cache="first_block", cancel=None)
