"""Roles: the names under which a pipeline holds its components, and the components that each accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from diffsynth import _discovery
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.vram.managed import managed
from diffsynth.errors import CorruptFile, InvalidPipeline, MissingComponent, did_you_mean, shown
from diffsynth.runtime.architectures import architecture_of
from diffsynth.spec import ArchitectureSpec, resolve


@dataclass(frozen=True, kw_only=True)
class Role:
    """A role for a module.

    Args:
        architectures: names of the architectures that the role accepts; it accepts others that name one of them in
            `ArchitectureSpec.accepted_as`.
        optional: whether it may stay empty.
        many: whether it holds a tuple of modules, in the order in which they are loaded. The members are components of
            their own, named "controlnet[0]", "controlnet[1]", for policies, plans, LoRAs and records.
        methods: names of the methods that the pipeline calls, besides `forward`.
    """

    architectures: tuple[str, ...]
    optional: bool = False
    many: bool = False
    methods: tuple[str, ...] = ()

    def accepts(self, architecture: ArchitectureSpec) -> bool:
        """Whether the role accepts a module of `architecture`: by its name, or by a name in its `accepted_as`."""
        return not {architecture.name, *architecture.accepted_as}.isdisjoint(self.architectures)

    def lacks(self, module: Any, config: Any, *, fields: Iterable[str]) -> list[str]:
        """Return a list of texts, such as `"decode()"` and `"config.factor"`: the methods and config fields that the
        pipeline needs and a component does not have; empty if it has them all.

        Args:
            module: the component, or its class.
            config: its config, an instance; None if it has none.
            fields: names of the config fields that the pipeline reads.
        """
        methods = [f"{name}()" for name in self.methods if not callable(getattr(module, name, None))]
        return [*methods, *(f"config.{name}" for name in fields if not hasattr(config, name))]


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


@dataclass(frozen=True, kw_only=True)
class Tokenizer(Processor):
    """A processor that turns texts into tokens.

    A memory plan of a call without a text, or of a pipeline that is not loaded, counts a fixed number of tokens in its
    place, so it must be called as tokenizers of transformers are.

    Args:
        source, loader, optional: see `Processor`. The default `loader` is that of
            `diffsynth.runtime.tokenizer.FolderTokenizer`.
    """

    loader: str = "diffsynth.runtime.tokenizer:FolderTokenizer"


@dataclass(frozen=True)
class Agreement:
    """Fields of the configs of several components that must be equal, or the components do not fit each other.

    A component that is not loaded, or whose config lacks the field, is not compared.

    Args:
        name: of the quantity, for messages: "width of the caption".
        fields: "role.field" of each component; of a role of many, of each member.
        none: the value of a component that does not use the quantity, such as 0 channels for an image.
    """

    name: str
    fields: tuple[str, ...]
    none: Any = None


def check_agreements(agreements: Iterable[Agreement], configs: Mapping[str, Any], *, pipeline_name: str) -> None:
    """Raise InvalidPipeline unless components fit each other as declared.

    Args:
        agreements: of the pipeline and its features.
        configs: role, or member of a role of many -> config of its component; None if it has none.
        pipeline_name: for messages.

    Raises:
        InvalidPipeline: two components whose configs differ; the message has both values.
    """
    for agreement in agreements:
        values = {
            f"{member}.{field}": value
            for role, _, field in (path.partition(".") for path in agreement.fields)
            for member, config in configs.items()
            if role_of(member) == role and (value := getattr(config, field, None)) is not None
        }
        values = {path: value for path, value in values.items() if value != agreement.none}
        first = next(iter(values.items()), None)
        for path, value in values.items():
            if first is not None and value != first[1]:
                raise InvalidPipeline(
                    f"{pipeline_name}: {agreement.name}: {first[0]} is {first[1]!r} and {path} is {value!r}; these two "
                    "components do not fit each other. Use the files of one model"
                )


def load_processor(role: str, processor: Processor, folder: Path | str) -> Any:
    """Return the tokenizer or processor of a role, loaded from the files of a folder by the role's `loader`. Code in
    the folder is never run, and nothing is downloaded.

    Args:
        role: its name, for the message.
        processor: the declared role.
        folder: the folder.

    Raises:
        CorruptFile: the folder's files cannot be read, or need code of their own.
    """
    try:
        return resolve(processor.loader).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # libraries raise whatever a damaged file leads to
        text = str(error)
        reason = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
        if "trust_remote_code" in text or "custom code" in text:
            reason = "it needs code of its own, which is never run"
        raise CorruptFile(
            f"{folder} cannot be loaded as {role} with {processor.loader}: {reason:.300}. Fetch the folder again, or "
            f"name that of the published model: {processor.source}"
        ) from error


def fill_roles(
    roles: Mapping[str, Role | Processor],
    components: Mapping[str, Any],
    *,
    pipeline_name: str,
    facts: Mapping[str, str] = MappingProxyType({}),
    agreements: Iterable[Agreement] = (),
) -> dict[str, Any]:
    """Return a dict role (component name) -> component of all `roles`; None for one that is left out and optional, a
    tuple for a role of many.

    Args:
        roles: of the pipeline.
        components: role -> component.
        pipeline_name: for messages.
        facts: of the pipeline: name -> "role.field", the config fields that it reads.
        agreements: of the pipeline: the config fields that must be equal.

    Raises:
        TypeError: a role that the pipeline does not have.
        MissingComponent: a role that is not optional is left out.
        InvalidPipeline: a component of a declared architecture lacks a method or config field that the pipeline needs,
            or two components do not fit each other.
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
    for name, component in members(components).items():
        role = role_of(name)
        where = f"role {name!r} of {pipeline_name}"
        _check_component(roles[role], component, fields=fields_read(role, facts), where=where)
    filled = {role: _filled(need, components.get(role)) for role, need in roles.items()}
    configs = {name: getattr(part, "config", None) for name, part in members(filled).items()}
    check_agreements(agreements, configs, pipeline_name=pipeline_name)
    return filled


def fields_read(role: str, facts: Mapping[str, str]) -> tuple[str, ...]:
    """Return a tuple of the config fields that a pipeline's `facts` (name -> "role.field") read of one role."""
    paths = [path.partition(".") for path in facts.values()]
    return tuple(dict.fromkeys(field for owner, _, field in paths if owner == role))


def _check_component(role: Role | Processor, component: Any, *, fields: tuple[str, ...], where: str) -> None:
    """Raise InvalidPipeline if a component, a module of a declared architecture, lacks what the pipeline needs.

    A module of no declared architecture, such as a caller's own, is not checked.
    """
    architecture = architecture_of(component) if isinstance(component, nn.Module) else None
    if architecture is None or not isinstance(role, Role):
        return
    if missing := role.lacks(component, getattr(component, "config", None), fields=fields):
        needed = [*(f"{name}()" for name in role.methods), *(f"config.{name}" for name in fields)]
        raise InvalidPipeline(
            f"{where}: {architecture.name} ({type(component).__name__}) lacks {' and '.join(missing)}; the pipeline "
            f"needs {', '.join(needed)}. Add what is missing, or use a component of {' or '.join(role.architectures)}."
        )


def check_components(
    roles: Mapping[str, Role | Processor], components: Mapping[str, Any], *, dtype: torch.dtype, pipeline_name: str
) -> None:
    """Raise an error unless each component can be called by the pipeline and computes in its dtype.

    A module of no declared architecture, such as a caller's own, must have the methods that the pipeline calls, or a
    `forward()` that takes as many tensors as that of the declared architecture.

    Args:
        roles: of the pipeline.
        components: role -> component, a tuple of components, or None.
        dtype: of the pipeline's activations.
        pipeline_name: for messages.

    Raises:
        TypeError: a path, a config, a list or a number in the place of a component.
        InvalidPipeline: a component that the role cannot hold, or that computes in another dtype.
    """
    for name, component in members(components).items():
        where = f"role {name!r} of {pipeline_name}"
        if isinstance(component, str | bytes | PurePath | Mapping | list | set | int | float | ModelConfig):
            raise TypeError(
                f"{where} got {shown(component)}; expected the loaded component. Files are loaded by diffsynth.load("
                f"..., components=...) and {pipeline_name}.from_pretrained"
            )
        role = roles[role_of(name)]
        if isinstance(component, nn.Module) and isinstance(role, Role):
            _check_class(role, component, where=where)
            _check_dtype(component, dtype, where=where)


def _check_class(role: Role, module: nn.Module, *, where: str) -> None:
    own = architecture_of(module)
    if own is not None:
        if not role.accepts(own):
            raise InvalidPipeline(f"{where} got a {own.name}; it takes {' or '.join(role.architectures)}")
        return
    declared = _discovery.catalog().layouts()[0]
    known = next((declared[name] for name in role.architectures if name in declared), None)
    if known is None:
        return
    if role.methods:
        lacks = role.lacks(module, None, fields=())
    else:
        lacks = [] if _takes_as_many(module.forward, resolve(known.module).forward) else ["such a forward()"]
    if lacks:
        raise InvalidPipeline(
            f"{where} got a {type(module).__name__}, which cannot be called as a {known.name} is: it lacks "
            f"{' and '.join(lacks)}. Use a component of {' or '.join(role.architectures)}"
        )


def _takes_as_many(forward: Any, expected: Any) -> bool:
    """Whether a bound `forward` can be called with the required arguments of `expected`, a function of a class."""
    _, *wanted = inspect.signature(expected).parameters.values()
    required = [each for each in wanted if each.default is each.empty]
    positional = [None for each in required if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    try:
        signature = inspect.signature(forward)
        signature.bind(*positional, **{each.name: None for each in required if each.kind is each.KEYWORD_ONLY})
    except TypeError:
        return False
    except ValueError:  # a function of C has no signature
        return True
    return True


def _check_dtype(module: nn.Module, dtype: torch.dtype, *, where: str) -> None:
    own = {each.dtype for each in module.parameters() if each.is_floating_point() and each.dtype.itemsize >= 2}
    wrapped = managed(module)
    computed = own if wrapped is None else {wrapped.policy.computed_dtype(each) for each in own}
    if computed and dtype not in computed:
        names = " and ".join(sorted(str(each) for each in computed))
        raise InvalidPipeline(
            f"{where}: its weights are {names}, and the pipeline computes in {dtype}; one call cannot mix them. Pass "
            f"torch_dtype={min(computed, key=str)}, or the module as module.to({dtype})"
        )


def config_of(part: Any) -> Any:
    """Return a component's config, an empty one if it has none; None for an empty role, a tuple for a role of many."""
    if isinstance(part, tuple):
        return tuple(map(config_of, part))
    return None if part is None else getattr(part, "config", SimpleNamespace())


def members(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict role -> component with one entry for each member of a role of many: `{"controlnet[0]": module}`.

    Args:
        components: role -> component, a tuple of components, or None.
    """
    found: dict[str, Any] = {}
    for role, part in components.items():
        found |= {f"{role}[{i}]": each for i, each in enumerate(part)} if isinstance(part, tuple) else {role: part}
    return found


def grouped(components: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dict role -> component, or tuple of the members of a role of many: the inverse of `members`."""
    found: dict[str, Any] = {}
    for name, part in components.items():
        role = role_of(name)
        found[role] = part if role == name else (*found.get(role, ()), part)
    return found


def member_roles(roles: Iterable[str], components: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a tuple of `roles` in which each role of many is replaced by those of its members; others are unchanged.

    Args:
        roles: names of roles, or of members.
        components: role -> component, a tuple of components, or None.
    """
    found: list[str] = []
    for role in roles:
        part = components.get(role)
        found += [f"{role}[{i}]" for i in range(len(part))] if isinstance(part, tuple) else [role]
    return tuple(found)


def check_component_names(names: Iterable[str], roles: Mapping[str, Role | Processor], *, pipeline_name: str) -> None:
    """Raise TypeError unless each name is a role of a module, or a member of a role of many, such as "controlnet[0]".

    Args:
        names: as a caller gives them.
        roles: all roles of the pipeline.
        pipeline_name: for messages.

    Raises:
        TypeError: another name; the message has the nearest.
    """
    known = {name: need for name, need in roles.items() if isinstance(need, Role)}
    for name in names:
        role = role_of(name)
        if role not in known or (role != name and not known[role].many):
            raise TypeError(
                f"components has {name!r}, no role of a module in {pipeline_name}{did_you_mean(name, known)} "
                f"Its roles: {', '.join(known)}"
            )


def role_of(member: str) -> str:
    """Return the role of a member of a role of many: "controlnet" for "controlnet[0]"; another role is unchanged."""
    return member.partition("[")[0]


def _filled(need: Role | Processor, part: Any) -> Any:
    if not (isinstance(need, Role) and need.many) or part is None:
        return part
    return (tuple(part) if isinstance(part, list | tuple) else (part,)) or None
