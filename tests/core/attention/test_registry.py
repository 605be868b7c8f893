"""The registry of attention backends: names, order and unknown names."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from diffsynth.core.attention import AttentionCall, attention, available_backends, register_backend
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.errors import Refused


def draw(heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(2, 4, heads, 13) for _ in range(3))


class Picky:
    """Serves single heads only, with zeros."""

    def refuses(self, call: AttentionCall) -> str | None:
        return None if call.q.shape[2] == 1 else "more than one head"

    def __call__(self, call: AttentionCall) -> Tensor:
        return torch.zeros_like(call.q)


@pytest.fixture
def picky() -> Iterator[None]:
    with mock.patch.dict(BACKENDS):
        register_backend("picky", Picky(), priority=5)
        yield


@pytest.mark.usefixtures("picky")
def test_auto_takes_the_first_that_does_not_refuse() -> None:
    assert available_backends()[0] == "picky"
    assert available_backends()[-1] == "naive"
    assert float(attention(*draw(1), backend="auto").abs().max()) == 0.0
    assert float(attention(*draw(2), backend="auto").abs().max()) > 0.0
    with pytest.raises(Refused, match="'picky' refuses this call: more than one head"):
        attention(*draw(2), backend="picky")


@pytest.mark.usefixtures("picky")
def test_names_are_taken_once() -> None:
    for name in ("picky", "sdpa", "torch", "auto"):
        with pytest.raises(ValueError, match="already registered"):
            register_backend(name, Picky())


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'spda' is unknown; did you mean 'sdpa'\?"):
        attention(*draw(1), backend="spda")
