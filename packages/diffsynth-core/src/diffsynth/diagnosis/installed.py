"""What is installed: our packages, what they require, plugins, and models with their weights."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator

from diffsynth import _discovery, _env, registry
from diffsynth.core.loader import first_party
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import weights_state
from diffsynth.diagnosis.finding import Finding
from diffsynth.registry import ModelRecord

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<bounds>[^;]*)(?:;(?P<marker>.*))?")
_HOLDS = {
    ">=": lambda version, bound: version >= bound,
    "<": lambda version, bound: version < bound,
    "==": lambda version, bound: version == bound,
}


def distributions() -> Iterator[Finding]:
    """Our own packages, and what those bring that are not here."""
    for name in _installed():
        yield Finding(name, "ok", _version(name) or "")
    for name, brought in absent_packages().items():
        brings = f"; brings {', '.join(brought)}" if brought else ""
        yield Finding(name, "note", f"not installed{brings}", f"Run: pip install {name}")


def requirements() -> Iterator[Finding]:
    """The libraries that our packages need, in versions that they work with."""
    packages = _installed()
    seen = set(packages)
    for package in packages:
        for text in importlib.metadata.requires(package) or ():
            found = _REQUIREMENT.match(text)
            if found is None or _is_for_others(found["marker"]):
                continue
            finding = _requirement(package, found["name"], found["bounds"].strip())
            if finding.state == "broken" or found["name"] not in seen:
                yield finding
            seen.add(found["name"])


def absent_packages() -> dict[str, list[str]]:
    """Packages of ours that are not installed -> the models they bring."""
    brought = first_party.models_by_package()
    return {name: brought.get(name, []) for name in sorted(first_party.packages()) if _version(name) is None}


def plugins() -> Iterator[Finding]:
    """What loaded, what did not, and what stands in the way of the installation."""
    problems = registry.problems()
    broken = {(problem.plugin, problem.distribution) for problem in problems}
    for plugin in _discovery.catalog().plugins:
        if (plugin.name, plugin.distribution) not in broken:
            seen = f"{plugin.distribution} {plugin.version}, loaded in {plugin.seconds * 1000:.0f} ms"
            yield Finding(plugin.name, "ok", seen)
    for problem in problems:
        upstream = problem.distribution == "diffsynth"  # its text says what to run
        action = (
            "Run what it says"
            if upstream
            else f"Run: diffsynth plugins --traceback; or: pip uninstall {problem.distribution}"
        )
        yield Finding(problem.plugin, "broken", f"{problem.distribution} {problem.version}: {problem.error}", action)


def models() -> Iterator[Finding]:
    """Models by the state of their weights; where something is missing, how to get it."""
    records = registry.list()
    if not records:
        yield Finding("models", "note", "none are installed", "Install a model family; see diffsynth list")
    for record in records:
        if record.weights == "present":
            yield Finding(record.exact_name, "ok", "weights present")
        else:
            yield _incomplete(record)


def _incomplete(record: ModelRecord) -> Finding:
    from diffsynth.core.loader.download import command

    sources = {**record.components, **record.processors}
    missing = [role for role in sources if weights_state([sources[role]], _env.model_base_path()) != "present"]
    seen = f"weights {record.weights}: {', '.join(missing)}" if record.weights == "partial" else "weights absent"
    configs = [ModelConfig.from_source(sources[role]) for role in missing]
    fetched = [config for config in configs if config.model_id]
    if not fetched:
        return Finding(record.exact_name, "note", seen, f"Run: pip install --force-reinstall {record.distribution}")
    if fetched[0].offline:
        return Finding(record.exact_name, "note", seen, f"Run: {' && '.join(map(command, fetched))}")
    return Finding(record.exact_name, "note", seen, f"Nothing: it comes from {fetched[0].hub} when it is first loaded")


def _installed() -> list[str]:
    """diffsynth-core, our packages, and whatever else has a plugin."""
    plugins = {entry.dist.name for entry in importlib.metadata.entry_points(group=_discovery.GROUP) if entry.dist}
    others = {name for name in first_party.packages() if _version(name)} | plugins
    return ["diffsynth-core", *sorted(others - {"diffsynth-core"})]


def _requirement(package: str, name: str, bounds: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "broken", f"not installed; {package} needs it", f'Run: pip install "{name}{bounds}"')
    if not _is_within(version, bounds):
        seen = f"{version}; {package} needs {bounds}"
        return Finding(name, "broken", seen, f'Run: pip install "{name}{bounds}"')
    return Finding(name, "ok", version)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_for_others(marker: str | None) -> bool:
    """Whether a requirement is not for this machine; our own packages ask only for the platform."""
    return marker is not None and not ("sys_platform" in marker and repr(sys.platform) in marker.replace('"', "'"))


def _is_within(version: str, bounds: str) -> bool:
    """Whether a version is within `>=`, `<` and `==`, by its release number; other bounds are not judged."""
    for bound in filter(None, bounds.split(",")):
        match = re.match(r"\s*(>=|<|==)\s*([\d.]+)\s*$", bound)
        if match and not _HOLDS[match[1]](_release(version), _release(match[2])):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """`(2, 15)` of `2.15.0+cu130`; zeros at the end say nothing."""
    numbers = [int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
