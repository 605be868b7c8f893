"""The repeated blocks of a component, as its architecture declares them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from diffsynth import _discovery
from diffsynth.spec import ArchitectureSpec

SHORTEST = 4
"""A stack shorter than the longest one by more than this factor is no place to save time."""


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after the other, each on what the one before it gave."""

    name: str
    blocks: tuple[nn.Module, ...]


def architecture_of(module: nn.Module) -> ArchitectureSpec | None:
    """What a plugin declared about the class of a module, or about a class that it inherits from; None if nothing."""
    declared = {one.spec.module: one.spec for one in reversed(_discovery.catalog().architectures)}
    names = (f"{kind.__module__}:{kind.__qualname__}" for kind in type(module).__mro__)
    return next((declared[name] for name in names if name in declared), None)


def stacks_of(module: nn.Module) -> tuple[Stack, ...]:
    """The stacks that a component's architecture declares, in that order; empty if it declares none."""
    architecture = architecture_of(module)
    if architecture is None:
        return ()
    return tuple(Stack(name, tuple(module.get_submodule(name).children())) for name in architecture.repeated_blocks)


def long_stacks(module: nn.Module) -> tuple[Stack, ...]:
    """The stacks in which most of the time goes: at least a quarter as long as the longest one.

    Z-Image's refiners, of 2 blocks before 30, are none.
    """
    stacks = stacks_of(module)
    longest = max((len(stack.blocks) for stack in stacks), default=0)
    return tuple(stack for stack in stacks if SHORTEST * len(stack.blocks) >= longest > 0)
