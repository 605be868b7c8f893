"""Units: the named steps of a pipeline, and the checks that make a list of them a program.

A unit is a function. Its positional parameters are the *roles* it uses, its keyword-only parameters are the names it
*reads*, and the decorator names what it *writes*:

    @unit("prompt_embeds", "prompt_mask", branches={"uncond": {"prompt": "negative_prompt"}})
    def encode_prompt(text_encoder, tokenizer, *, prompt: str | list[str] = ""): ...

A read with a default that no earlier unit writes is an argument of the pipeline. A read without one must be written
by an earlier unit or given by the pipeline. A role with the default None is optional: the unit then runs without it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from diffsynth.errors import InvalidPipeline, MissingComponent, did_you_mean

REQUIRED: Any = inspect.Parameter.empty
"""The default of a read that has none."""


@dataclass(frozen=True)
class Read:
    """A name that a unit reads, with the annotation and default its parameter has."""

    name: str
    annotation: Any
    default: Any


@dataclass(frozen=True)
class Unit:
    """One step: call it with its roles and reads; the result is a value per written name.

    `branches` maps a branch to the names it reads in place of the plain ones; the plain names are the `cond` branch.
    A `random` unit draws randomness, so its result is never cached. `requires` names roles that it does not use but
    is nothing without: its arguments are theirs. Where the argument `only_with` is None the unit is left out, and no
    role comes to the device for it. `provider` is the plugin that adds the unit to somebody else's pipeline.
    """

    name: str
    function: Callable[..., Any] = field(repr=False)
    roles: tuple[str, ...]
    optional_roles: frozenset[str]
    reads: tuple[Read, ...]
    writes: tuple[str, ...]
    branches: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)
    random: bool = False
    requires: tuple[str, ...] = ()
    only_with: str = ""
    provider: str = field(default="", compare=False)

    @property
    def title(self) -> str:
        """What messages call it: `unit 'blur'`, or `unit 'blur' of plugin soft (diffsynth-soft)`."""
        return f"unit {self.name!r}" + (f" of plugin {self.provider}" if self.provider else "")

    def __call__(self, *roles: Any, **reads: Any) -> Any:
        """Run the function itself."""
        return self.function(*roles, **reads)

    def run(self, components: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Run on the components and values it names; returns {written name: value}.

        Raises:
            MissingComponent: a value is not there, because the unit that writes it lacks a role.
            Exception: what the function raises, with a note that names the plugin if a plugin added the unit.
        """
        roles = [components.get(role) for role in self.roles]
        reads = {read.name: values.get(read.name, read.default) for read in self.reads}
        for name, value in reads.items():
            if value is REQUIRED:
                raise MissingComponent(
                    f"{self.title} needs {name!r}, but the role of the unit that writes it is not loaded"
                )
        try:
            result = self.function(*roles, **reads)
        except Exception as error:
            if self.provider:
                error.add_note(f"raised by {self.title}")
            raise
        results = (result,) if len(self.writes) == 1 else result
        assert len(results) == len(self.writes), f"{self.title} writes {self.writes}, returned {len(results)}"
        return dict(zip(self.writes, results, strict=True))


def unit(
    *writes: str,
    branches: Mapping[str, Mapping[str, str]] | None = None,
    random: bool = False,
    requires: Sequence[str] = (),
    only_with: str = "",
) -> Callable[[Callable[..., Any]], Unit]:
    """Make a function a unit that writes the given names.

    Args:
        writes: names of the results; a function that writes one returns it bare, otherwise a tuple in this order.
        branches: branch -> {read name: the name it has in that branch}.
        random: the unit draws randomness.
        requires: roles that must be loaded for it to run, though it does not use them and they need not be at hand.
        only_with: the argument that it is there for. Where that is None it does not run: what it would write keeps the
            value it had, or the default of whoever reads it.

    Raises:
        TypeError: a parameter is neither positional (a role) nor keyword-only (a read), or `branches` or `only_with`
            have a name that the function does not read.
    """

    def decorate(function: Callable[..., Any]) -> Unit:
        roles, optional, reads = [], set(), []
        for parameter in inspect.signature(function, eval_str=False).parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY:
                reads.append(Read(parameter.name, parameter.annotation, parameter.default))
            elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                roles.append(parameter.name)
                if parameter.default is None:
                    optional.add(parameter.name)
            else:
                raise TypeError(f"unit {function.__name__!r}: *args and **kwargs would hide what it reads")
        renamed = {name for names in (branches or {}).values() for name in names}
        if unread := renamed - {read.name for read in reads}:
            raise TypeError(f"unit {function.__name__!r}: branches rename {sorted(unread)}, which it does not read")
        if only_with and only_with not in {read.name for read in reads}:
            raise TypeError(f"unit {function.__name__!r}: only_with={only_with!r} is a name that it does not read")
        return Unit(
            name=function.__name__,
            function=function,
            roles=tuple(roles),
            optional_roles=frozenset(optional),
            reads=tuple(reads),
            writes=writes,
            branches=MappingProxyType(dict(branches or {})),
            random=random,
            requires=tuple(requires),
            only_with=only_with,
        )

    return decorate


@dataclass(frozen=True)
class Program:
    """A checked list of units: the arguments it takes, and the names that are written."""

    units: tuple[Unit, ...]
    arguments: Mapping[str, Read]
    writes: frozenset[str]

    def owners(self, argument: str) -> list[Unit]:
        """The units that read an argument, in any branch."""
        return [step for step in self.units if argument in _argument_names(step)]

    def is_used(self, step: Unit, values: Mapping[str, Any]) -> bool:
        """Whether a call gives a unit what it is there for: its `only_with`, or an argument that no other unit reads.

        A unit that has neither is always used.
        """
        if step.only_with:
            return is_asked_for(step, values)
        own = [read for read in step.reads if read.name in self.arguments and self.owners(read.name) == [step]]
        return not own or any(values.get(read.name, read.default) is not read.default for read in own)


def check_units(units: Sequence[Unit], given: Collection[str]) -> Program:
    """Check that every name is there when it is read.

    Args:
        units: in running order.
        given: names that the pipeline itself provides.

    Raises:
        InvalidPipeline: a read that nothing provides, a rewrite of a name that is not read, one argument declared with
            two types or defaults; the message names the unit.
    """
    available, written = set(given), set()
    arguments: dict[str, Read] = {}
    for step in units:
        for read in _plain_and_branch_reads(step):
            if read.name in available and read.name not in arguments:
                continue
            if read.default is REQUIRED and read.name not in available:
                raise InvalidPipeline(
                    f"{step.title} reads {read.name!r}, which no earlier unit writes"
                    f"{did_you_mean(read.name, available)} Write it before, or give it a default."
                )
            if read.default is not REQUIRED and (read.name not in written or read.name in arguments):
                _declare(arguments, read, step, units)
        available.update(arguments)
        reads = {read.name for read in step.reads}
        for name in step.writes:
            if name in available and name not in reads:
                raise InvalidPipeline(f"{step.title} rewrites {name!r} without reading it{_whose(name, step, units)}")
        written.update(step.writes)
        available.update(step.writes)
    return Program(tuple(units), MappingProxyType(arguments), frozenset(written))


def run_units(
    program: Program,
    components: Mapping[str, Any],
    state: CallValues,
    *,
    around: Callable[[Unit], Any] | None = None,
) -> None:
    """Run the units in order, writing their results into `state`.

    A unit that needs a role which is not loaded, or whose `only_with` is not given, is left out: its results keep the
    defaults of whoever reads them.

    Args:
        around: called with each unit; gives the context manager it runs in (placement, cancellation).
    """
    for step in program.units:
        if not can_run(step, components) or not is_asked_for(step, state.shared):
            continue
        for branch in state.branches if is_per_branch(step, state.branched) else ("shared",):
            renames = step.branches.get(branch, {})
            visible = state.view(branch)
            values = visible | {plain: visible[name] for plain, name in renames.items() if name in visible}
            if around is None:
                results = step.run(components, values)
            else:
                with around(step):
                    results = step.run(components, values)
            state.write(branch, results)


def is_per_branch(step: Unit, branched: Collection[str]) -> bool:
    """Whether a unit runs once per branch: it says so, or reads one of the names that branches have each for itself."""
    return bool(step.branches) or any(read.name in branched for read in step.reads)


def can_run(step: Unit, components: Mapping[str, Any]) -> bool:
    """Whether every role that the unit cannot do without is loaded."""
    return all(components.get(role) is not None for role in needed_roles(step))


def is_asked_for(step: Unit, values: Mapping[str, Any]) -> bool:
    """Whether the argument that the unit is there for, if it is there for one, is given."""
    return not step.only_with or values.get(step.only_with) is not None


def needed_roles(step: Unit) -> tuple[str, ...]:
    """The roles without which the unit does not run."""
    return (*(role for role in step.roles if role not in step.optional_roles), *step.requires)


class CallValues:
    """The values of one call: shared ones, and those of each branch over them."""

    def __init__(self, values: Mapping[str, Any], branches: Iterable[str] = ("cond",)) -> None:
        self.shared = dict(values)
        self.branches: dict[str, dict[str, Any]] = {branch: {} for branch in branches}

    @property
    def branched(self) -> set[str]:
        """Names that a branch has for itself."""
        return {name for values in self.branches.values() for name in values}

    def view(self, branch: str = "shared") -> dict[str, Any]:
        """What a unit of this branch sees."""
        return self.shared | self.branches.get(branch, {})

    def write(self, branch: str, values: Mapping[str, Any]) -> None:
        """Store results where the branch keeps them."""
        (self.shared if branch == "shared" else self.branches[branch]).update(values)

    def keep(self, names: Collection[str]) -> None:
        """Forget all other values, so that their memory is free."""
        for values in (self.shared, *self.branches.values()):
            for name in values.keys() - names:
                del values[name]


def needed_for(units: Sequence[Unit], names: Collection[str]) -> tuple[Unit, ...]:
    """The units without which one of `names` would not be written, in running order."""
    wanted, kept = set(names), []
    for step in reversed(units):
        if wanted & set(step.writes):
            kept.append(step)
            wanted.update(read.name for read in step.reads)
    return tuple(reversed(kept))


def split(units: Sequence[Unit], trained: Collection[str]) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """Part units into those whose results may be cached while `trained` roles learn, and those that must run live.

    A unit is live if it uses a trained role, draws randomness, or reads what a live unit writes.
    """
    live_names: set[str] = set()
    frozen, live = [], []
    for step in units:
        depends = any(read.name in live_names for read in step.reads)
        if step.random or depends or set(step.roles) & set(trained):
            live.append(step)
            live_names.update(step.writes)
        else:
            frozen.append(step)
    return tuple(frozen), tuple(live)


def _plain_and_branch_reads(step: Unit) -> list[Read]:
    by_name = {read.name: read for read in step.reads}
    renamed = [
        Read(name, by_name[plain].annotation, by_name[plain].default)
        for names in step.branches.values()
        for plain, name in names.items()
    ]
    return [*step.reads, *renamed]


def _argument_names(step: Unit) -> set[str]:
    return {read.name for read in _plain_and_branch_reads(step)}


def _declare(arguments: dict[str, Read], read: Read, step: Unit, units: Sequence[Unit]) -> None:
    first = arguments.setdefault(read.name, read)
    if (_type_text(first), first.default) != (_type_text(read), read.default):
        shown = [f"{_type_text(each)} = {each.default!r}" for each in (read, first)]
        raise InvalidPipeline(
            f"{step.title} declares argument {read.name!r} as {shown[0]}, unlike {shown[1]}"
            f"{_whose(read.name, step, units)}. Give it another name, or the same type and default"
        )


def _type_text(read: Read) -> str:
    """The annotation without module names: a type, or a text where its module postpones evaluation."""
    if read.annotation is inspect.Parameter.empty:
        return "untyped"
    text = read.annotation if isinstance(read.annotation, str) else inspect.formatannotation(read.annotation)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text)


def _whose(name: str, step: Unit, units: Sequence[Unit]) -> str:
    """Who else has a name: the first unit that writes or reads it."""
    owner = next(each for each in units if name in each.writes or name in _argument_names(each))
    return "" if owner is step else f"; it is of {owner.title}"
