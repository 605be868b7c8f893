"""Regional compilation: `torch.compile` for the blocks that an architecture declares in `compiled_blocks`.

Blocks of one class share the compiled code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer
from diffsynth.errors import MissingComponent, Refused, did_you_mean
from diffsynth.runtime.architectures import architecture_of, compiled_stacks


def compile_components(components: Mapping[str, Any], roles: Collection[str], **options: Any) -> None:
    """Set up `torch.compile` for the blocks of these roles' modules that `blocks_to_compile` returns.

    Compiling again replaces earlier compiled code. Blocks of one class and of equal settings share compiled code. Each
    is compiled at its first call.

    Args:
        components: role -> module, processor or None.
        roles: to compile.
        options: of `torch.compile`.

    Raises:
        TypeError: an unknown role, one that holds no module, or an option that `torch.compile` does not have.
        MissingComponent: an empty role.
        Refused: a module whose architecture declares no blocks that may be compiled; no module was compiled.
    """
    modules = [_module(components, role) for role in roles]
    for block in [block for module in modules for block in blocks_to_compile(module)]:
        compile_forward(block, **options)


def blocks_to_compile(module: nn.Module) -> list[nn.Module]:
    """Return a list of the modules that are compiled one by one in place of `module`: the blocks that its architecture
    declares in `compiled_blocks`, or `module` itself if there are none.

    Raises:
        Refused: the architecture declares `compiled_blocks=()`.
        ValueError: the module has no list of a declared name.
    """
    architecture = architecture_of(module)
    if architecture is not None and architecture.compiled_blocks == ():
        raise Refused(f"compiling is refused: {architecture.name} declares no blocks that may be compiled")
    return [block for stack in compiled_stacks(module) for block in stack.blocks] or [module]


def compile_forward(module: nn.Module, **options: Any) -> None:
    """Set up `torch.compile` for a module's own `forward` only; layers around it that stream weights stay uncompiled.

    These layers must not be traced. Compiling again replaces earlier compiled code, also that of the user.
    """
    forward_chain.install(module, ForwardLayer.COMPILED, functools.partial(_compiled, options))


def _compiled(options: Mapping[str, Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(forward_chain.uncompiled(forward), **options)
    return compiled


def _module(components: Mapping[str, Any], role: str) -> nn.Module:
    if role not in components:
        raise TypeError(
            f"compile_models names {role!r}, no role of this pipeline{did_you_mean(role, components)}; "
            f"its roles: {', '.join(components)}"
        )
    part = components[role]
    if part is None:
        raise MissingComponent(f"compile_models names {role!r}, which is not loaded; add its file, or leave it out")
    if not isinstance(part, nn.Module):
        raise TypeError(f"compile_models names {role!r}, a {type(part).__name__}; only modules can be compiled")
    return part
