"""Import of one plugin, checks of its hooks, and collection of its declarations. Imports no torch.

Whatever a plugin's code raises leaves this module, and the others' declarations and hooks are as before.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth import spec
from diffsynth._entry_points import EntryPoint
from diffsynth._plain_values import plain_copy
from diffsynth._spec_checks import check_spec, identity
from diffsynth.errors import did_you_mean, shown

if TYPE_CHECKING:
    import pluggy

HEAVY = ("torch", "numpy", "transformers")
"""Packages that a plugin's module must not import."""

KINDS: dict[str, type] = {
    "models": spec.ModelSpec,
    "architectures": spec.ArchitectureSpec,
    "checkpoints": spec.CheckpointSpec,
    "layer_wrappers": spec.LayerWrapperSpec,
    "attention": spec.AttentionSpec,
    "solvers": spec.SolverSpec,
    "quantization": spec.QuantizationSpec,
    "training": spec.TrainingSpec,
    "objectives": spec.ObjectiveSpec,
    "features": spec.FeatureSpec,
    "commands": spec.CommandSpec,
    "writers": spec.WriterSpec,
    "doors": spec.DoorSpec,
    "guidance": spec.GuidanceSpec,
    "loras": spec.LoRASpec,
}


class Rejected(Exception):
    """A plugin breaks the contract; the message is shown without the exception's class name."""


@dataclass(frozen=True)
class Plugin:
    """A plugin that was loaded, and the time that took in seconds."""

    name: str
    distribution: str
    version: str
    seconds: float = 0.0


def load(manager: pluggy.PluginManager, entry: EntryPoint, plugin: Plugin) -> dict[str, list[Any]]:
    """Import a plugin, register its hooks in the manager of all plugins, and return a dict kind -> its declarations.

    Raises:
        Rejected: the plugin breaks the contract.
        BaseException: whatever its code raises.
    """
    heavy_before = {name for name in HEAVY if name in sys.modules}
    try:
        entry.check()
    except ValueError as error:
        raise Rejected(str(error)) from error
    module = entry.load()
    return adopt(manager, module, plugin, heavy_before=heavy_before)


def adopt(
    manager: pluggy.PluginManager, module: Any, plugin: Plugin, heavy_before: Set[str] = frozenset(HEAVY)
) -> dict[str, list[Any]]:
    """Register a module's hooks in the manager and return kind -> its declarations.

    Args:
        manager: of all plugins.
        module: of the plugin.
        plugin: its name and distribution.
        heavy_before: the modules of `HEAVY` that may be imported; all, where a plugin is registered in a program.

    Raises:
        Rejected: the module breaks the contract.
        BaseException: whatever its code raises.
    """
    _check_api(module, plugin)
    if manager.is_registered(module):
        raise Rejected(f"its module, {module.__name__!r}, is that of another plugin")
    try:
        manager.register(module, name=plugin.name)
        _check_hooks(manager, module)
        own = _declarations(manager, module, plugin)
        for name in HEAVY:
            if name in sys.modules and name not in heavy_before:
                raise Rejected(
                    f"imports {name} at import; name heavy code by string, or import it inside a function. "
                    f'To see where: python -X importtime -c "import {module.__name__}"'
                )
    except BaseException:
        # Unregister before the next plugin loads: check_pending() checks the implementations of all plugins.
        if manager.is_registered(module):
            manager.unregister(module)
        raise
    return own


def _check_api(module: Any, plugin: Plugin) -> None:
    api = getattr(module, "DIFFSYNTH_API", None)
    if api is None:
        raise Rejected(f"states no DIFFSYNTH_API; expected DIFFSYNTH_API = {spec.API_VERSION} at the top of the module")
    if type(api) is not int or api != spec.API_VERSION:
        older = type(api) is int and api < spec.API_VERSION
        raise Rejected(
            f"written for DIFFSYNTH_API {shown(api)}, diffsynth-core has {spec.API_VERSION}. "
            f"Run: pip install -U {plugin.distribution if older else 'diffsynth-core'}"
        )


def _check_hooks(manager: pluggy.PluginManager, module: Any) -> None:
    known = [name for name, caller in vars(manager.hook).items() if not name.startswith("_") and caller.has_spec()]
    for caller in manager.get_hookcallers(module) or ():
        own = next(implementation for implementation in caller.get_hookimpls() if implementation.plugin is module)
        if not caller.has_spec() and not own.optionalhook:
            raise Rejected(f"implements hook {caller.name!r}, which does not exist{did_you_mean(caller.name, known)}")
        if own.wrapper or own.hookwrapper:
            raise Rejected(f"wraps hook {caller.name!r}; hooks are called one by one and cannot be wrapped")
        if refusal := _refusal(own.function):
            raise Rejected(f"hook {caller.name!r} {refusal}; expected a plain function, which is called and returns")
    manager.check_pending()


def _refusal(function: Any) -> str:
    """Return why a function cannot be called as a hook, "is an async function"; empty if it can."""
    if inspect.isasyncgenfunction(function) or inspect.iscoroutinefunction(function):
        return "is an async function"
    return "is a generator: it has a yield" if inspect.isgeneratorfunction(function) else ""


def _declarations(manager: pluggy.PluginManager, module: Any, plugin: Plugin) -> dict[str, list[Any]]:
    others = [other for other in manager.get_plugins() if other is not module]
    own: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for caller in manager.get_hookcallers(module) or ():
        kind = caller.name.removeprefix("register_")
        if kind != caller.name and kind in own:
            collector = _Collector(caller.name, KINDS[kind], plugin)
            for result in manager.subset_hook_caller(caller.name, others)(register=collector):
                if inspect.iscoroutine(result):
                    result.close()  # else Python warns that it was never awaited
                if inspect.isawaitable(result) or hasattr(result, "__next__") or hasattr(result, "__anext__"):
                    raise Rejected(f"hook {caller.name!r} returns a {type(result).__name__}; expected a plain function")
            own[kind] = collector.close()
    return own


class _Collector:
    """The function `register` that a hook calls: it checks a declaration and keeps a copy of it.

    Raises:
        Rejected: the declaration is invalid; that raises again when the hook returns.
        RuntimeError: the hook has returned.
    """

    def __init__(self, hook_name: str, expected: type, plugin: Plugin) -> None:
        self._hook_name, self._expected, self._plugin = hook_name, expected, plugin
        self._found: list[Any] = []
        self._error: Rejected | None = None
        self._is_open = True

    def __call__(self, declaration: Any) -> None:
        if not self._is_open:
            raise RuntimeError(
                f"plugin {self._plugin.name!r} ({self._plugin.distribution} {self._plugin.version}) calls register() "
                f"after {self._hook_name} has returned, which has no effect; declare inside the hook, or call "
                "diffsynth.registry.register() in a running program"
            )
        try:
            self._found.append(self._checked(declaration))
        except Rejected as error:
            self._error = self._error or error
            raise

    def close(self) -> list[Any]:
        """Return a list of the declarations; later calls raise."""
        self._is_open = False
        if self._error is not None:
            raise self._error
        return self._found

    def _checked(self, declaration: Any) -> Any:
        if type(declaration) is not self._expected:
            got = f"{type(declaration).__name__}: {shown(declaration)}"
            raise Rejected(f"{self._hook_name}: expected {self._expected.__name__}, got {got}")
        try:
            checked = plain_copy(declaration)
            check_spec(checked)
        except (TypeError, ValueError) as error:
            raise Rejected(f"{self._hook_name}: {error}") from error
        name = identity(checked)
        if name and any(name == identity(other) for other in self._found):
            raise Rejected(f"{self._hook_name}: {name!r} is declared twice")
        return checked


def ended(plugin: Plugin, error: BaseException) -> BaseException:
    """Return the error, or for one that ends programs, such as SystemExit, a `Rejected` that names a remedy."""
    if isinstance(error, Exception):
        return error
    rejected = Rejected(
        f"ends the program while it is loaded ({message(error)}); do that inside a function only. "
        f"Without the plugin: pip uninstall {plugin.distribution}"
    )
    rejected.__cause__ = error
    return rejected


def message(error: BaseException) -> str:
    """Return an error's text in one line, of at most 2,000 characters, with its type where it needs one."""
    try:
        text = " ".join(str(error).split())
    except BaseException:  # an exception class of a plugin
        text = "its text cannot be read"
    text = text.encode("utf-8", "backslashreplace").decode()[:2000]
    plain = isinstance(error, ImportError | Rejected) and bool(text)
    return text if plain else f"{type(error).__name__}: {text}".removesuffix(": ")
