"""Roles: the names under which a pipeline holds its components, and the components that each accepts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffsynth.errors import MissingComponent, did_you_mean


@dataclass(frozen=True, kw_only=True)
class Role:
    """A role for a module.

    Args:
        architectures: names of the architectures that the role accepts.
        optional: whether it may stay empty.
    """

    architectures: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Processor:
    """A role for a tokenizer or processor, which is loaded from a folder.

    Args:
        source: of the folder, unless `from_pretrained(<role>_config=...)` names another.
        loader: reference to a class with `from_pretrained(folder)`.
        optional: whether it may stay empty.
    """

    source: str
    loader: str = "transformers:AutoTokenizer"
    optional: bool = False


def fill_roles(
    roles: Mapping[str, Role | Processor], components: Mapping[str, Any], *, pipeline_name: str
) -> dict[str, Any]:
    """Return a dict role (component name) -> component of all `roles`; None for one that is left out and optional.

    Args:
        roles: of the pipeline.
        components: role -> component.
        pipeline_name: for messages.

    Raises:
        TypeError: a role that the pipeline does not have.
        MissingComponent: a role that is not optional is left out.
    """
    for role in components:
        if role not in roles:
            raise TypeError(
                f"{pipeline_name} has no role {role!r}{did_you_mean(role, roles)} Its roles: {', '.join(roles)}"
            )
    missing = [role for role, need in roles.items() if not need.optional and role not in components]
    if missing:
        raise MissingComponent(
            f"{pipeline_name} needs {' and '.join(missing)}; loaded: {', '.join(components) or 'nothing'}. "
            f"Add the file to model_configs."
        )
    return {role: components.get(role) for role in roles}
