"""The partition of a module into blocks, which can be streamed, and the rest, which stays on the device for a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffsynth.errors import did_you_mean

SMALL = 2**20
"""Bytes below which a module is no block: a transfer of its own would cost more than it saves."""


@dataclass(frozen=True)
class Block:
    """A submodule that runs as a whole, so that its weights can be offloaded at any other time.

    Args:
        name: dotted name in the partitioned module; empty if it is that module itself.
        module: the submodule.
    """

    name: str
    module: nn.Module

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return a dict of the block's parameters, each once: full name in the partitioned module (`"blocks.0.weight"`)
        -> parameter.
        """
        before = f"{self.name}." if self.name else ""
        return {before + name: parameter for name, parameter in self.module.named_parameters()}

    def bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the size of the block's parameters in bytes, an int; with a `dtype`, as if the floating-point ones had
        it.
        """
        return sum(_bytes(parameter, dtype) for parameter in self.parameters().values())


@dataclass(frozen=True)
class Partition:
    """The blocks of a module, and what is outside of them.

    Args:
        blocks: blocks in the order of the module tree, which is near the order of execution.
        rest: parameters outside blocks by name: those of containers themselves, of blocks that share parameters, and
            of small modules.
        buffers: all buffers by name. A forward may write to them, so they are never streamed with a block.
    """

    blocks: tuple[Block, ...]
    rest: dict[str, nn.Parameter]
    buffers: dict[str, Tensor]

    def rest_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Return the size of `rest` and `buffers` in bytes, an int; with a `dtype`, as if the floating-point parameters
        had it.
        """
        return sum(_bytes(p, dtype) for p in self.rest.values()) + sum(_bytes(b, None) for b in self.buffers.values())


def partition(
    module: nn.Module,
    *,
    repeated: Sequence[str] = (),
    atomic: tuple[type, ...] = (),
    whole: tuple[type, ...] = (),
    smallest: int = SMALL,
) -> Partition:
    """Return the `Partition` of `module`: its blocks (submodules that run as a whole), the parameters outside of them,
    and its buffers.

    The items of the repeated lists are blocks, and so is every module beside them. A module that contains a list is
    cut, so it must not read a parameter of a submodule without calling the submodule; name its class in `atomic` if it
    does.

    Args:
        module: the module, on any device, meta included.
        repeated: dotted names of the lists whose items run one after the other; if empty, every outermost `ModuleList`
            of two or more items with parameters.
        atomic: classes of modules that are never cut.
        whole: classes of modules that are blocks wherever they are found, instead of `repeated`.
        smallest: bytes below which a module is part of the rest.

    Raises:
        ValueError: the module has no submodule of a name in `repeated`.
    """
    if whole:
        blocks = [Block(name, part) for name, part in _outermost(module, (*whole, *atomic))]
    else:
        lists = _named_lists(module, repeated, atomic) if repeated else _found_lists(module, atomic)
        blocks = list(_blocks("", module, lists, atomic))
    # A module that has two names is one block, by the first of them.
    blocks = list({id(block.module): block for block in reversed(blocks)}.values())[::-1]
    uses = _parameter_uses(module)
    shared = {
        each.name for each in blocks if any(uses[key] > count for key, count in _parameter_uses(each.module).items())
    }
    # A module that cannot be cut at all is rest, too: it is on the device as a whole for its stage.
    kept = tuple(each for each in blocks if each.name and each.name not in shared and 0 < each.bytes() >= smallest)
    streamed = {id(parameter) for block in kept for parameter in block.parameters().values()}
    rest = {name: parameter for name, parameter in module.named_parameters() if id(parameter) not in streamed}
    return Partition(kept, rest, dict(module.named_buffers()))


def _blocks(name: str, module: nn.Module, lists: Collection[str], atomic: tuple[type, ...]) -> Iterator[Block]:
    inside = f"{name}." if name else ""
    holds_list = any(other.startswith(inside) and other != name for other in lists)
    # Lists and dicts of modules have no forward: their items are called instead.
    is_called = type(module).forward is not nn.Module.forward and name not in lists
    if is_called and (not holds_list or isinstance(module, atomic)):
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


def _outermost(module: nn.Module, classes: tuple[type[nn.Module], ...]) -> Iterator[tuple[str, nn.Module]]:
    found: list[str] = []
    for name, part in module.named_modules():
        if isinstance(part, classes) and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found.append(name)
            yield name, part


def _parameter_uses(module: nn.Module) -> Counter[int]:
    """Return a `Counter` of the parameters in the module tree: `id()` of each -> how often it is registered."""
    return Counter(id(own) for part in module.modules() for own in part._parameters.values() if own is not None)


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    size = tensor.element_size() if dtype is None or not tensor.is_floating_point() else dtype.itemsize
    return tensor.numel() * size
