"""Regional compilation: `torch.compile` for the repeated blocks of a network, whose code blocks of one class share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer
from diffsynth.errors import MissingComponent, did_you_mean
from diffsynth.runtime.architectures import stacks_of


def compile_components(components: Mapping[str, Any], roles: Collection[str], **options: Any) -> None:
    """Set up `torch.compile` for the repeated blocks of these roles' modules, or for a whole module without such
    blocks.

    Compiling again replaces earlier compiled code. Blocks of one class and of equal settings share compiled code. Each
    is compiled at its first call.

    Args:
        components: role -> module, processor or None.
        roles: to compile.
        options: of `torch.compile`.

    Raises:
        TypeError: an unknown role, one that holds no module, or an option that `torch.compile` does not have.
        MissingComponent: an empty role.
    """
    modules = [_module(components, role) for role in roles]
    for module in modules:
        blocks = [block for stack in stacks_of(module) for block in stack.blocks]
        for block in blocks or [module]:
            compile_forward(block, **options)


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
