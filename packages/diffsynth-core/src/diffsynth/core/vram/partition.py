"""Where a module may be cut: blocks that come and go, and the rest that stays for a whole stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth.errors import did_you_mean

SMALL = 2**20
"""Bytes below which a module is not worth a transfer of its own."""


@dataclass(frozen=True)
class Block:
    """A module that is run as a whole, and so may be away at any other time.

    Args:
        name: dotted, from the partitioned module; empty if it is that module.
        module: the block.
    """

    name: str
    module: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Distinct parameters by the name they have in the partitioned module."""
        before = f"{self.name}." if self.name else ""
        return {before + name: parameter for name, parameter in self.module.named_parameters()}

    def bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of its parameters; `dtype` counts floating ones as if they had it."""
        return sum(_bytes(parameter, dtype) for parameter in self.parameters().values())


@dataclass(frozen=True)
class Partition:
    """A module in parts.

    Args:
        blocks: in the order of the module tree, which is near the order of execution.
        rest: parameters outside blocks: a container's own, those that a block shares, those of small modules.
        buffers: all of them. They may be written to, so they never travel with a block.
    """

    blocks: tuple[Block, ...]
    rest: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    def rest_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Of what stays for a whole stage, buffers included."""
        return sum(_bytes(p, dtype) for p in self.rest.values()) + sum(_bytes(b, None) for b in self.buffers.values())


def partition(
    module: nn.Module,
    *,
    repeated: Sequence[str] = (),
    atomic: tuple[type, ...] = (),
    whole: tuple[type, ...] = (),
    smallest: int = SMALL,
) -> Partition:
    """Cut a module at its repeated blocks.

    The items of the repeated lists are blocks, and so is every module beside them. A module that holds a list is
    cut, so it must read no parameter of a part of it without calling that part; name its class in `atomic` if it does.

    Args:
        module: on any device, meta included.
        repeated: dotted names of the lists whose items run one after the other; empty takes every outermost
            `ModuleList` of two or more items that have parameters.
        atomic: classes that are never cut.
        whole: classes that are blocks wherever they are found, in place of `repeated`.
        smallest: bytes below which a module joins the rest.

    Raises:
        ValueError: `repeated` names what the module does not have.
    """
    if whole:
        blocks = [Block(name, part) for name, part in _outermost(module, (*whole, *atomic))]
    else:
        lists = _named_lists(module, repeated, atomic) if repeated else _found_lists(module, atomic)
        blocks = list(_blocks("", module, lists, atomic))
    # A module that has two names is one block, by the first of them.
    blocks = list({id(block.module): block for block in reversed(blocks)}.values())[::-1]
    everywhere = _places(module)
    shared = {each.name for each in blocks if any(everywhere[key] > n for key, n in _places(each.module).items())}
    # A module that cannot be cut at all is rest, too: it comes and goes with its stage.
    kept = tuple(each for each in blocks if each.name and each.name not in shared and 0 < each.bytes() >= smallest)
    held = {id(parameter) for block in kept for parameter in block.parameters().values()}
    rest = {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in held}
    return Partition(kept, rest, dict(module.named_buffers()))


def _blocks(name: str, module: nn.Module, lists: Collection[str], atomic: tuple[type, ...]) -> Iterator[Block]:
    inside = f"{name}." if name else ""
    holds_list = any(other.startswith(inside) and other != name for other in lists)
    # Lists and dicts of modules have no forward: it is their items that are run.
    is_run = type(module).forward is not nn.Module.forward and name not in lists
    if is_run and (not holds_list or isinstance(module, atomic)):
        yield Block(name, module)
        return
    for child_name, child in module.named_children():
        yield from _blocks(inside + child_name, child, lists, atomic)


def _named_lists(module: nn.Module, repeated: Sequence[str], atomic: tuple[type, ...]) -> tuple[str, ...]:
    names = [name for name, _ in module.named_modules()]
    for name in repeated:
        if name not in names:
            raise ValueError(f"{type(module).__name__} has no module {name!r} to cut at{did_you_mean(name, names)}")
    return tuple(name for name in repeated if not _within(module, name, atomic))


def _within(module: nn.Module, name: str, atomic: tuple[type, ...]) -> bool:
    parts = name.split(".")
    return any(isinstance(module.get_submodule(".".join(parts[:depth])), atomic) for depth in range(len(parts) + 1))


def _found_lists(module: nn.Module, atomic: tuple[type, ...]) -> tuple[str, ...]:
    found: list[str] = []
    for name, part in module.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or _within(module, name, atomic):
            continue
        items = [item for item in part.children() if any(True for _ in item.parameters())]
        if isinstance(part, nn.ModuleList) and len(items) >= 2:
            found.append(name)
    return tuple(found)


def _outermost(module: nn.Module, classes: tuple[type, ...]) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, classes) and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found.append(name)
            yield name, part


def _places(module: nn.Module) -> Counter[int]:
    """How many modules hold each parameter, by its id."""
    return Counter(id(own) for part in module.modules() for own in part._parameters.values() if own is not None)


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    size = tensor.element_size() if dtype is None or not tensor.is_floating_point() else dtype.itemsize
    return tensor.numel() * size
