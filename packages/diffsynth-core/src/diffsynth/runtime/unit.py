"""Units: the named steps of a pipeline, and the checks that turn a list of units into a program.

A unit is a function. Its positional parameters are the *roles* it uses, its keyword-only parameters are the names it
*reads*, and the decorator names what it *writes*:

    @unit("prompt_embeds", "prompt_mask", branches={"uncond": {"prompt": "negative_prompt"}})
    def encode_prompt(text_encoder, tokenizer, *, prompt: str | list[str] = ""): ...

A read with a default that no earlier unit writes is an argument of the pipeline. A read without a default must be
written by an earlier unit or provided by the pipeline. A role with the default None is optional: the unit runs without
it. Units run in the order of their `Phase`; those of one phase in the order in which they are listed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from diffsynth.errors import InvalidPipeline, MissingComponent, did_you_mean

REQUIRED: Any = inspect.Parameter.empty
"""The default of a read without a default."""


class Phase(IntEnum):
    """The phases of a call before its loop, in running order. A unit that declares none is of the phase CONDITION.

    SHAPE: sizes and the schedule. TEXT: text encoders. ENCODE: image encoders and the autoencoder, from inputs to
    latents. CONDITION: what the networks of the loop read. LATENTS: noise and the latents of the first step. NETWORK:
    calls of the networks of the loop before its first step, such as those that fill a cache of keys and values.
    """

    SHAPE = 0
    TEXT = 1
    ENCODE = 2
    CONDITION = 3
    LATENTS = 4
    NETWORK = 5


@dataclass(frozen=True)
class Read:
    """A name that a unit reads, with the annotation and the default of its parameter."""

    name: str
    annotation: Any
    default: Any


@dataclass(frozen=True)
class Unit:
    """One step of a pipeline: called with its roles and reads, it returns a value for each name that it writes.

    Args:
        name: of the function.
        function: the code of the step.
        roles: the components that it is called with, in order.
        optional_roles: those of `roles` that may be empty.
        reads: the names that it reads.
        writes: the names that it writes.
        branches: branch -> read name -> the name to read in that branch; names that are not listed are read as they
            are, as in the branch "cond".
        random: whether it draws random numbers; results of such a unit are never cached.
        requires: roles that it does not use, but without which it does not run.
        only_with: an argument; where that is None the unit does not run and none of its roles is loaded for it.
        phase: when it runs.
        switches: argument -> value that lowers the memory of the unit at some cost. A plan sets it to keep a limit, if
            the argument is None.
        check: called with the values of a call that uses the unit before anything runs, see `Pipeline.known_values`. It
            raises ValueError or TypeError for values that the unit would refuse. None checks nothing.
        ignores: called with the same values; returns name -> reason of those that the unit reads and whose value
            changes nothing in the call, such as the size of tiles that are off. An argument that all units ignore is
            said to have no effect. None ignores nothing.
        of_branch: a branch of guidance, such as "cond", whose values it reads; it then runs once, and its results are
            shared by all branches. "" reads those of the branch that it runs for.
        provider: the plugin that adds the unit to a pipeline of another package; "" for the pipeline's own units.
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
    phase: Phase = Phase.CONDITION
    switches: Mapping[str, Any] = field(default_factory=dict, hash=False)
    check: Callable[[Mapping[str, Any]], None] | None = field(default=None, repr=False)
    ignores: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = field(default=None, repr=False)
    of_branch: str = ""
    provider: str = field(default="", compare=False)

    @property
    def title(self) -> str:
        """The unit's name in messages: `unit 'blur'`, or `unit 'blur' of plugin soft (diffsynth-soft)`."""
        return f"unit {self.name!r}" + (f" of plugin {self.provider}" if self.provider else "")

    def __call__(self, *roles: Any, **reads: Any) -> Any:
        """Call the unit's function with these components (`roles`) and values (`reads`); return its result as it is."""
        return self.function(*roles, **reads)

    def run(self, components: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Call the function with the components and values that it names; return a dict written name -> value.

        Raises:
            MissingComponent: a value is missing, because a role of the unit that writes it is not loaded.
            Exception: from the function, with a note that names the plugin if a plugin added the unit.
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
    phase: Phase = Phase.CONDITION,
    switches: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    ignores: Callable[[Mapping[str, Any]], Mapping[str, str]] | None = None,
    of_branch: str = "",
) -> Callable[[Callable[..., Any]], Unit]:
    """Return a decorator that turns a function into a `Unit`.

    Args:
        writes: names of the results. A function that writes one name returns its value, else a tuple in this order.
        branches: branch -> read name -> the name to read in that branch.
        random: whether the unit draws random numbers.
        requires: roles that must be loaded for the unit to run, though it does not use them.
        only_with: an argument; where that is None the unit does not run. The names that it would write keep their
            earlier values, or the defaults of the units that read them.
        phase: when the unit runs.
        switches: argument -> value that lowers the memory of the unit, which a plan sets if the argument is None.
        check: function of a call's values that raises for those which the unit would refuse; see `Unit`.
        ignores: function of a call's values that returns name -> reason of reads that change nothing; see `Unit`.
        of_branch: a branch of guidance whose values the unit reads, once for all branches; see `Unit`.

    Raises:
        TypeError: a parameter is neither positional (a role) nor keyword-only (a read), or `branches`, `only_with` or
            `switches` have a name that the function does not read, or both `branches` and `of_branch` are given.
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
        if branches and of_branch:
            raise TypeError(f"unit {function.__name__!r}: it has both branches and of_branch; leave out one")
        renamed = {name for names in (branches or {}).values() for name in names}
        if unread := renamed - {read.name for read in reads}:
            raise TypeError(f"unit {function.__name__!r}: branches rename {sorted(unread)}, which it does not read")
        for option, names in (("only_with", [only_with] if only_with else []), ("switches", switches or {})):
            if unread := set(names) - {read.name for read in reads}:
                raise TypeError(f"unit {function.__name__!r}: {option} has {sorted(unread)}, which it does not read")
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
            phase=phase,
            switches=MappingProxyType(dict(switches or {})),
            check=check,
            ignores=ignores,
            of_branch=of_branch,
        )

    return decorate


@dataclass(frozen=True)
class Program:
    """The checked units of a pipeline.

    Args:
        units: those before the loop, in running order.
        outputs: those after it.
        arguments: name -> read of the arguments that they take.
        writes: the names that `units` write.
    """

    units: tuple[Unit, ...]
    outputs: tuple[Unit, ...]
    arguments: Mapping[str, Read]
    writes: frozenset[str]

    @property
    def switches(self) -> dict[str, Any]:
        """A dict argument -> value of the arguments that a plan may set to lower the memory of a call."""
        return {name: value for step in (*self.units, *self.outputs) for name, value in step.switches.items()}

    @property
    def branches(self) -> frozenset[str]:
        """The frozenset of the branches of guidance, besides "cond", for which some unit reads other values."""
        return frozenset(branch for step in self.units for branch in step.branches)

    def owners(self, argument: str) -> list[Unit]:
        """Return a list of the units that read an argument, in any branch."""
        return [step for step in (*self.units, *self.outputs) if argument in _argument_names(step)]

    def is_used(self, step: Unit, values: Mapping[str, Any]) -> bool:
        """Whether a call uses a unit: it sets the unit's `only_with` or, without one, changes an argument that no other
        unit reads; True for a unit that has neither.
        """
        if step.only_with:
            return is_enabled(step, values)
        own = [read for read in step.reads if read.name in self.arguments and self.owners(read.name) == [step]]
        return not own or any(not equals_default(values.get(read.name, read.default), read.default) for read in own)


def equals_default(value: Any, default: Any) -> bool:
    """Whether an argument's value is its default: the same object, or an equal number, text, or list of them.

    A value that was read from JSON is equal to a default, and another object. Images and tensors are not compared.
    """
    if value is default:
        return True
    if isinstance(value, list | tuple) and isinstance(default, list | tuple):
        return len(value) == len(default) and all(map(equals_default, value, default))
    if isinstance(value, bool) or isinstance(default, bool):
        return False  # True and False are one object each, and True == 1
    return isinstance(value, int | float | str) and isinstance(default, int | float | str) and value == default


def in_phases(units: Iterable[Unit]) -> tuple[Unit, ...]:
    """Return a tuple of the units in running order: sorted by phase, in the order of `units` within a phase."""
    return tuple(sorted(units, key=lambda step: step.phase))


def check_units(units: Sequence[Unit], provided: Collection[str], outputs: Sequence[Unit] = ()) -> Program:
    """Return the units as a `Program`; raise InvalidPipeline for a read without a value, a rewrite of a name that the
    unit does not read, or an argument declared in two ways.

    Args:
        units: in running order.
        provided: the names that the pipeline itself sets.
        outputs: the units after the loop, in running order.

    Raises:
        InvalidPipeline: a read that nothing provides, a rewrite of a name that is not read, one argument declared with
            two types or defaults; the message names the unit.
    """
    available, written = set(provided), set()
    arguments: dict[str, Read] = {}
    everything = (*units, *outputs)
    for step in everything:
        for read in _plain_and_branch_reads(step):
            if read.name in available and read.name not in arguments:
                continue
            if read.default is REQUIRED and read.name not in available:
                raise InvalidPipeline(
                    f"{step.title} reads {read.name!r}, which no earlier unit writes"
                    f"{did_you_mean(read.name, available)} Write it before, or give it a default."
                )
            if read.default is not REQUIRED and (read.name not in written or read.name in arguments):
                _declare(arguments, read, step, everything)
        available.update(arguments)
        reads = {read.name for read in step.reads}
        for name in step.writes:
            if name in available and name not in reads:
                raise InvalidPipeline(
                    f"{step.title} rewrites {name!r} without reading it{_owner(name, step, everything)}"
                )
        written.update(step.writes)
        available.update(step.writes)
    writes = frozenset(name for step in units for name in step.writes)
    return Program(tuple(units), tuple(outputs), MappingProxyType(arguments), writes)


def check_values(program: Program, components: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Call the `check` of each unit that a call with these components and values runs; errors are theirs."""
    for step in (*program.units, *program.outputs):
        if step.check is not None and runs(step, components, values):
            step.check(values)


def run_units(units: Iterable[Unit], components: Mapping[str, Any], values: CallValues) -> None:
    """Run units in order and store results in `values`; skip one whose role is not loaded or whose `only_with` is None.

    Args:
        units: in running order.
        components: role -> component.
        values: of the call; changed in place.
    """
    for step in units:
        if runs(step, components, values.shared):
            run_unit(step, components, values)


def run_unit(step: Unit, components: Mapping[str, Any], values: CallValues) -> None:
    """Run one unit, for each branch of guidance if it is a unit of branches, and store its results in `values`.

    Args:
        step: the unit, whose roles are loaded.
        components: role -> component.
        values: of the call; changed in place.
    """
    for branch in values.branches if is_per_branch(step, values.branched) else ("shared",):
        renames = step.branches.get(branch, {})
        known = values.for_branch(step.of_branch or branch)
        read = known | {plain: known[name] for plain, name in renames.items() if name in known}
        values.write(branch, step.run(components, read))


def is_per_branch(step: Unit, branched: Collection[str]) -> bool:
    """Whether a unit runs once for each branch: it declares `branches`, or reads a value that differs by branch and has
    no `of_branch`.
    """
    return bool(step.branches) or (not step.of_branch and any(read.name in branched for read in step.reads))


def runs(step: Unit, components: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a call with these components and values runs the unit: `can_run` and `is_enabled`."""
    return can_run(step, components) and is_enabled(step, values)


def can_run(step: Unit, components: Mapping[str, Any]) -> bool:
    """Whether every role that the unit needs is loaded."""
    return all(components.get(role) is not None for role in needed_roles(step))


def is_enabled(step: Unit, values: Mapping[str, Any]) -> bool:
    """Whether a call runs the unit: it has no `only_with`, or that argument is not None."""
    return not step.only_with or values.get(step.only_with) is not None


def needed_roles(step: Unit) -> tuple[str, ...]:
    """Return a tuple of the roles (component names) without which the unit does not run."""
    return (*(role for role in step.roles if role not in step.optional_roles), *step.requires)


class CallValues:
    """The values of one call: shared ones, and those of each branch, which override them.

    Args:
        values: the shared ones.
        branches: names of the branches of guidance.
    """

    def __init__(self, values: Mapping[str, Any], branches: Iterable[str] = ("cond",)) -> None:
        self.shared = dict(values)
        self.branches: dict[str, dict[str, Any]] = {branch: {} for branch in branches}

    @property
    def branched(self) -> set[str]:
        """The set of the names that have a value of their own in some branch."""
        return {name for values in self.branches.values() for name in values}

    def for_branch(self, branch: str = "shared") -> dict[str, Any]:
        """Return a dict name -> value: the shared values, overridden by those of the branch if it has any."""
        return self.shared | self.branches.get(branch, {})

    def write(self, branch: str, values: Mapping[str, Any]) -> None:
        """Store results as values of a branch, or as shared ones for "shared"."""
        (self.shared if branch == "shared" else self.branches[branch]).update(values)

    def retain(self, names: Collection[str]) -> None:
        """Delete all values, shared or of a branch, whose name is not in `names`, to free their memory."""
        for values in (self.shared, *self.branches.values()):
            for name in values.keys() - names:
                del values[name]


def needed_for(units: Sequence[Unit], names: Collection[str]) -> tuple[Unit, ...]:
    """Return a tuple of the units that write one of `names` and those whose results they read, in any branch of
    guidance, in running order.
    """
    wanted, needed = set(names), []
    for step in reversed(units):
        if wanted & set(step.writes):
            needed.append(step)
            wanted.update(read.name for read in _plain_and_branch_reads(step))
    return tuple(reversed(needed))


def split(units: Sequence[Unit], trained: Collection[str]) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
    """Return (units whose results may be cached while `trained` roles are trained, the other units): two tuples.

    A unit is live if it uses a trained role, draws random numbers, or reads a name that a live unit writes.
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
            f"{_owner(read.name, step, units)}. Give it another name, or the same type and default"
        )


def _type_text(read: Read) -> str:
    """Return the declared type of `read` as text without module names, such as "Tensor"; "untyped" without one.

    An annotation is a type, or a text if its module postpones evaluation; both give one text.
    """
    if read.annotation is inspect.Parameter.empty:
        return "untyped"
    text = read.annotation if isinstance(read.annotation, str) else inspect.formatannotation(read.annotation)
    return re.sub(r"\b(?:\w+\.)+(?=[A-Za-z_])", "", text)


def _owner(name: str, step: Unit, units: Sequence[Unit]) -> str:
    """Return "; it belongs to " and the title of the first unit that writes or reads a name; "" if it is `step`."""
    owner = next(each for each in units if name in each.writes or name in _argument_names(each))
    return "" if owner is step else f"; it belongs to {owner.title}"
