"""Plugin discovery: find entry points, load plugins one by one, and collect their declarations in one catalog.

Imports no torch. A plugin that fails becomes a `Problem` and does not affect the others. The records that users see
are defined in `registry`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from diffsynth import _env, spec
from diffsynth._entry_points import GROUP, EntryPoint, normalized, plugin_entries
from diffsynth._plugin_loading import KINDS, Plugin, Rejected, adopt, ended, load, message
from diffsynth._process_state import ProcessState, interrupts
from diffsynth._spec_checks import duplicates
from diffsynth.errors import BrokenPlugin, did_you_mean, shortened, shown
from diffsynth.terminal import module_logger, stdout_to_stderr

if TYPE_CHECKING:
    import pluggy

logger = module_logger(__name__)

CORE = ("core", "diffsynth-core")
SLOW = 2.0
"""Seconds that a plugin may take to load; one that takes longer is named."""

LONGEST_WAIT = 60.0
"""Seconds that a thread waits for discovery in another thread. A plugin that waits for a thread which it started, and
which waits for the catalog, would wait forever.
"""

REGISTERED = ("registered", "in this program")
"""Distribution and version of the plugins that `register` added."""

SpecT = TypeVar("SpecT")


@dataclass(frozen=True)
class Problem:
    """A failure of a plugin, or a fault of the installation.

    Args:
        plugin: entry-point name.
        distribution: name of the installed package.
        version: version of the package.
        error: message, one line.
        traceback: formatted traceback; empty if no exception was raised.
        seconds: time spent loading the plugin.
        state: "broken": the plugin, or a part of it, is left out; or "warning": it works.
    """

    plugin: str
    distribution: str
    version: str
    error: str
    traceback: str = ""
    seconds: float = 0.0
    state: str = "broken"

    def __str__(self) -> str:
        return f"{self.plugin} ({self.distribution} {self.version}): {self.error}"


@dataclass(frozen=True)
class Declared(Generic[SpecT]):
    """A declaration with the plugin, distribution and version that made it."""

    spec: SpecT
    plugin: str
    distribution: str
    version: str


@dataclass(frozen=True, kw_only=True)
class Catalog:
    """Declarations of the loaded plugins, `core` first, then by plugin name; and a `Problem` for each failed plugin."""

    plugins: tuple[Plugin, ...] = ()
    problems: tuple[Problem, ...] = ()
    models: tuple[Declared[spec.ModelSpec], ...] = ()
    architectures: tuple[Declared[spec.ArchitectureSpec], ...] = ()
    checkpoints: tuple[Declared[spec.CheckpointSpec], ...] = ()
    layer_wrappers: tuple[Declared[spec.LayerWrapperSpec], ...] = ()
    attention: tuple[Declared[spec.AttentionSpec], ...] = ()
    solvers: tuple[Declared[spec.SolverSpec], ...] = ()
    quantization: tuple[Declared[spec.QuantizationSpec], ...] = ()
    training: tuple[Declared[spec.TrainingSpec], ...] = ()
    objectives: tuple[Declared[spec.ObjectiveSpec], ...] = ()
    features: tuple[Declared[spec.FeatureSpec], ...] = ()
    commands: tuple[Declared[spec.CommandSpec], ...] = ()
    writers: tuple[Declared[spec.WriterSpec], ...] = ()
    doors: tuple[Declared[spec.DoorSpec], ...] = ()
    guidance: tuple[Declared[spec.GuidanceSpec], ...] = ()
    loras: tuple[Declared[spec.LoRASpec], ...] = ()

    def layouts(self) -> tuple[dict[str, spec.ArchitectureSpec], list[spec.CheckpointSpec]]:
        """Return a pair of what plugins declare: (dict name -> `ArchitectureSpec`, the first if several plugins declare
        one name; list of all `CheckpointSpec`s).
        """
        # Two architectures with one name are reported as problems; the first is used, so no plugin can replace core's.
        by_name = {one.spec.name: one.spec for one in reversed(self.architectures)}
        return by_name, [one.spec for one in self.checkpoints]


_UNIQUE = ("architectures", "doors", "guidance", "quantization", "solvers", "writers")
"""Kinds of declarations whose names must differ among all plugins."""


@dataclass(frozen=True)
class _Discovered:
    catalog: Catalog
    manager: pluggy.PluginManager
    reported: set[tuple[str, str]] = field(default_factory=set)
    late: list[Problem] = field(default_factory=list)

    @property
    def registered(self) -> list[str]:
        """List of the names of the plugins that `register` added."""
        return [one.name for one in self.catalog.plugins if (one.distribution, one.version) == REGISTERED]


_lock = threading.RLock()
_discovered: _Discovered | None = None
_is_loading = False
_registered: dict[str, Any] = {}
"""Name -> module or object of each plugin that `register` added; `refresh` adds them again."""


def catalog() -> Catalog:
    """Return the `Catalog`: declarations of the allowed plugins that load, and `Problem`s of failed plugins and
    clashing names; the first call discovers them. Thread-safe.

    Raises:
        BrokenPlugin: a plugin failed, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    return _current().catalog


def refresh() -> Catalog:
    """Discover plugins again and return the new `Catalog`; modules that are already imported are not reloaded."""
    global _discovered
    import importlib

    importlib.invalidate_caches()
    with _locked():
        _discovered = None
        return catalog()


def register(module: Any, name: str) -> None:
    """Add a module's declarations and observers to the catalog, in place of those registered under the name before; if
    the module is refused, nothing changes.

    Args:
        module: a module or object that states DIFFSYNTH_API and has functions marked `@hookimpl`.
        name: of the plugin.

    Raises:
        ValueError: an installed plugin has the name.
        BrokenPlugin: the module breaks the contract of plugins, or declares a name that another plugin has.
    """
    global _discovered
    with _locked():
        current = _current()
        former = current.manager.unregister(name=name) if name in current.registered else None
        try:
            _discovered = _joined(_without(current, name), name, module)
        except BaseException as error:
            if former is not None:
                current.manager.register(former, name=name)
            if isinstance(error, KeyboardInterrupt | ValueError):
                raise
            raise BrokenPlugin(f"plugin {name!r} is not registered: {message(error)}") from error
        _registered[name] = module


def unregister(name: str) -> None:
    """Remove a plugin that `register` added, with its declarations and observers.

    Raises:
        ValueError: no plugin was registered under the name.
    """
    global _discovered
    with _locked():
        current = _current()
        if name not in _registered:
            installed = [one for one in current.catalog.plugins if one.name == name]
            hint = f"; it is installed. Run: pip uninstall {installed[0].distribution}" if installed else ""
            raise ValueError(f"plugin {name!r} is not registered{hint or did_you_mean(name, _registered)}")
        del _registered[name]
        if name in current.registered:
            current.manager.unregister(name=name)
            _discovered = _without(current, name)


def removal(declared: Declared[Any]) -> str:
    """Return how to remove the plugin of a declaration: a command, or for one that `register` added a call, as text."""
    if (declared.distribution, declared.version) == REGISTERED:
        return f"diffsynth.registry.unregister({declared.plugin!r})"
    return f"pip uninstall {declared.distribution}"


def problems() -> list[Problem]:
    """Return a list of `Problem`s: those that discovery found, and later ones from the first use of a plugin's code."""
    current = _current()
    return [*current.catalog.problems, *current.late]


def broken_plugins() -> list[Problem]:
    """Return a list of the `problems()` by which something is missing, for the error of a failed lookup."""
    return [one for one in problems() if one.state == "broken"]


def report(declared: Declared[Any], error: str, *, cause: BaseException) -> None:
    """Record an error in a declaration's code as a `Problem` of its plugin and log it, both unless it was recorded
    before; raise BrokenPlugin instead if DIFFSYNTH_STRICT_PLUGINS is on.

    Raises:
        BrokenPlugin: DIFFSYNTH_STRICT_PLUGINS is on.
    """
    import traceback

    text = "".join(traceback.format_exception(cause))
    problem = Problem(declared.plugin, declared.distribution, declared.version, " ".join(error.split()), text)
    if _env.strict_plugins():
        raise BrokenPlugin(str(problem)) from cause
    current = _current()
    with _locked():
        if any(str(problem) == str(known) for known in current.late):
            return
        current.late.append(problem)
    logger.warning("%s", describe([problem]))


def notify(hook_name: str, **values: Any) -> None:
    """Call every implementation of an observer hook and ignore their results; one that raises is logged, and the others
    are still called, but with DIFFSYNTH_STRICT_PLUGINS on it raises BrokenPlugin.

    The log names the plugin, once per hook.

    Raises:
        BrokenPlugin: an observer raised, and DIFFSYNTH_STRICT_PLUGINS is on.
    """
    current = _current()
    for implementation in getattr(current.manager.hook, hook_name).get_hookimpls():
        with interrupts() as user:
            try:
                implementation.function(*(values[name] for name in implementation.argnames))
                continue
            except BaseException as raised:  # an observer does not end its host, whatever it raises
                if user.pressed and isinstance(raised, KeyboardInterrupt):
                    raise
                error = raised
        plugin = implementation.plugin_name
        if _env.strict_plugins():
            raise BrokenPlugin(f"plugin {plugin!r} failed in {hook_name}: {message(error)}") from error
        if (plugin, hook_name) not in current.reported:
            current.reported.add((plugin, hook_name))
            logger.error("plugin %r failed in %s; the run goes on", plugin, hook_name, exc_info=error)


def implements(hook_name: str) -> bool:
    """Whether a plugin implements a hook."""
    return bool(getattr(_current().manager.hook, hook_name).get_hookimpls())


def first(hook_name: str, **values: Any) -> Any:
    """Call a hook's implementations one by one until one returns a list, and return that; None if all return None.

    An exception raised by an implementation is passed on, with a note that names its plugin; one that would end the
    program, such as SystemExit, as BrokenPlugin.

    Raises:
        BrokenPlugin: an implementation raises something else than an Exception.
        TypeError: an implementation returns something else than a list, a tuple or None.
    """
    implementations = getattr(_current().manager.hook, hook_name).get_hookimpls()
    for implementation in reversed(implementations):  # pluggy stores the implementation to call first last
        with interrupts() as user:
            try:
                answer = implementation.function(*(values[name] for name in implementation.argnames))
            except Exception as error:
                error.add_note(f"raised by plugin {implementation.plugin_name!r} in {hook_name}")
                raise
            except BaseException as error:
                if user.pressed and isinstance(error, KeyboardInterrupt):
                    raise
                raise BrokenPlugin(
                    f"plugin {implementation.plugin_name!r} failed in {hook_name}: {message(error)}"
                ) from error
        if isinstance(answer, list | tuple):
            return list(answer)
        if answer is not None:
            raise TypeError(
                f"plugin {implementation.plugin_name!r} returned {shown(answer)} from {hook_name}; expected a list, "
                "or None"
            )
    return None


@contextmanager
def _locked() -> Iterator[None]:
    if not _lock.acquire(timeout=LONGEST_WAIT):
        raise RuntimeError(
            f"another thread has been loading plugins for {LONGEST_WAIT:g} s; a plugin must not wait for a thread that "
            "asks for the catalog. Run: diffsynth plugins"
        )
    try:
        yield
    finally:
        _lock.release()


def _current() -> _Discovered:
    global _discovered, _is_loading
    found = _discovered
    if found is not None:
        return found
    with _locked():
        if _discovered is not None:
            return _discovered
        if _is_loading:
            raise RuntimeError("a plugin asks for the catalog while discovery runs; ask for it on first use instead")
        _is_loading = True
        try:
            found = _discover()
            for name, module in _registered.items():
                found = _rejoined(found, name, module)
            _discovered = found
        finally:
            _is_loading = False
        return _discovered


def _discover() -> _Discovered:
    import pluggy

    from diffsynth import hookspecs

    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    plugins: list[Plugin] = []
    declared: dict[str, list[Declared[Any]]] = {kind: [] for kind in KINDS}
    entries, problems = _entries()
    with interrupts() as user, stdout_to_stderr():
        state = ProcessState()
        for entry, refusal in entries:
            started = time.perf_counter()
            plugin, own = Plugin(entry.name, entry.distribution, entry.version), None
            error: BaseException | None = None
            try:
                if refusal:
                    raise Rejected(refusal)
                own = load(manager, entry, plugin)
            except BaseException as raised:  # also SystemExit, or a KeyboardInterrupt that the plugin raises
                error = raised
            if user.pressed and (user.raises or isinstance(error, KeyboardInterrupt)):
                raise KeyboardInterrupt
            seconds = time.perf_counter() - started
            problems += _warnings(plugin, state.set_back(), seconds)
            state.update()
            if error is not None:
                problems.append(_problem(plugin, ended(plugin, error), seconds))
            else:
                plugins.append(replace(plugin, seconds=seconds))
            for kind, specs in (own or {}).items():
                declared[kind] += [Declared(s, plugin.name, plugin.distribution, plugin.version) for s in specs]
    clashes = [Problem(*each) for kind in _UNIQUE for each in duplicates(declared[kind])]
    problems += clashes
    if _env.strict_plugins() and (broken := [one for one in problems if one.state == "broken"]):
        raise BrokenPlugin("; ".join(map(str, broken)))
    if problems:
        logger.warning("%s", describe(problems))
    everything = {kind: tuple(specs) for kind, specs in declared.items()}
    return _Discovered(Catalog(plugins=tuple(plugins), problems=tuple(problems), **everything), manager)


def _joined(current: _Discovered, name: str, module: Any) -> _Discovered:
    """Return a `_Discovered` with a plugin of `register` added; raises like `register`, and `Rejected`."""
    catalog, started = current.catalog, time.perf_counter()
    if any(one.name == name for one in catalog.plugins) or any(one.plugin == name for one in catalog.problems):
        raise ValueError(f"plugin {name!r} is installed; expected another name")
    own = adopt(current.manager, module, Plugin(name, *REGISTERED))
    declared = {kind: [Declared(one, name, *REGISTERED) for one in specs] for kind, specs in own.items()}
    everything = {kind: (*getattr(catalog, kind), *specs) for kind, specs in declared.items()}
    for kind in _UNIQUE:
        for plugin, *_, error in duplicates(everything[kind]):
            if plugin == name:
                current.manager.unregister(name=name)
                raise Rejected(error)
    plugins = (*catalog.plugins, Plugin(name, *REGISTERED, time.perf_counter() - started))
    return replace(current, catalog=replace(catalog, plugins=plugins, **everything))


def _rejoined(current: _Discovered, name: str, module: Any) -> _Discovered:
    """Return what `_joined` returns; a plugin that is refused becomes a problem."""
    started = time.perf_counter()
    try:
        return _joined(current, name, module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        problem = _problem(Plugin(name, *REGISTERED), error, time.perf_counter() - started)
        return replace(current, catalog=replace(current.catalog, problems=(*current.catalog.problems, problem)))


def _without(current: _Discovered, name: str) -> _Discovered:
    """Return a `_Discovered` without the declarations and problems of a plugin that `register` added."""
    catalog = current.catalog
    kept = {
        kind: tuple(one for one in getattr(catalog, kind) if (one.plugin, one.distribution) != (name, REGISTERED[0]))
        for kind in ("problems", *KINDS)
    }
    plugins = tuple(one for one in catalog.plugins if (one.name, one.distribution) != (name, REGISTERED[0]))
    late = [one for one in current.late if (one.plugin, one.distribution) != (name, REGISTERED[0])]
    return replace(current, catalog=replace(catalog, plugins=plugins, **kept), late=late)


def describe(problems: Sequence[Problem]) -> str:
    """Return one line for logs and errors, of the broken ones if any is, else of the warnings, empty if there are none:
    "1 plugin is broken: flux (diffsynth-flux 0.3.1): ... Run: diffsynth plugins".
    """
    shown_ones = [one for one in problems if one.state == "broken"] or list(problems)
    if not shown_ones:
        return ""
    is_one = len(shown_ones) == 1
    if shown_ones[0].state == "broken":
        count = "1 plugin is broken" if is_one else f"{len(shown_ones)} plugins are broken"
    else:
        count = "1 warning of a plugin" if is_one else f"{len(shown_ones)} warnings of plugins"
    return f"{count}: {'; '.join(map(str, shown_ones))}. Run: diffsynth plugins"


def _entries() -> tuple[list[tuple[EntryPoint, str]], list[Problem]]:
    """Return a pair: (list of (entry point, reason to refuse it, else empty) of each allowed plugin, core first, then
    by name; list of the `Problem`s of damaged distributions).

    DIFFSYNTH_PLUGINS lists the allowed plugins; core is always allowed.
    """
    allowed = _env.plugins()
    entries, damaged = plugin_entries()
    # `core` declares the components that families share, so it is loaded whatever the allow-list names.
    found = [one for one in entries if allowed is None or one.name in allowed or (one.name, one.distribution) == CORE]
    found.sort(key=lambda one: ((one.name, one.distribution) != CORE, one.name, one.distribution))
    refusals = _clashing_entries(found)
    problems = [
        Problem(
            ", ".join(one.plugins) or one.distribution,
            one.distribution,
            one.version,
            one.error,
            state="broken" if one.plugins else "warning",
        )
        for one in damaged
        if allowed is None or not one.plugins or allowed.intersection(one.plugins)
    ]
    return [(one, refusals.get(one, "")) for one in found], problems


def _clashing_entries(entries: list[EntryPoint]) -> dict[EntryPoint, str]:
    """Return a dict entry point -> reason to refuse it, for those whose name or module another one has, too.

    The plugin `toy` of the distribution `diffsynth-toy`, and so each of ours, is kept; else all that clash are refused.
    """
    refusals: dict[EntryPoint, str] = {}
    for kind in ("name", "module"):
        groups: dict[str, list[EntryPoint]] = {}
        for entry in entries:
            groups.setdefault(normalized(entry.name) if kind == "name" else entry.module, []).append(entry)
        for spelling, several in groups.items():
            owners = [one for one in several if normalized(one.distribution) == f"diffsynth-{normalized(one.name)}"]
            owner = owners[0] if len(owners) == 1 else None
            providers = dict.fromkeys(f"{one.distribution} {one.version}" for one in several)
            for one in several if len(several) > 1 else ():
                if owner is None:
                    refusals[one] = f"{' and '.join(providers)} declare a plugin of this {kind}; uninstall all but one"
                elif one is not owner:
                    refusals[one] = (
                        f"the {kind} {spelling!r} is that of {owner.distribution}; rename the entry point "
                        f"{one.name!r} of {one.distribution}, or run: pip uninstall {one.distribution}"
                    )
    return refusals


def _warnings(plugin: Plugin, changes: list[str], seconds: float) -> list[Problem]:
    """Return a list of a `Problem` for what a plugin changed in the process, and one if it was slow."""
    errors = []
    if changes:
        listed = shortened(changes, 5)
        errors.append(f"changes the process while it is loaded: {listed}; set back. Do that inside a function only")
    if seconds > SLOW:
        errors.append(f"takes {seconds:.1f} s to load; import slow code and read files inside functions only")
    of = plugin.name, plugin.distribution, plugin.version
    return [Problem(*of, error, seconds=seconds, state="warning") for error in errors]


def _problem(plugin: Plugin, error: BaseException, seconds: float) -> Problem:
    if _env.strict_plugins():
        raise BrokenPlugin(f"{plugin.name} ({plugin.distribution} {plugin.version}): {message(error)}") from error
    import traceback

    text = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
    return Problem(plugin.name, plugin.distribution, plugin.version, message(error), text, seconds)
