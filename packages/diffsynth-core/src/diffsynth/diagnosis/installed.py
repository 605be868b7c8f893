"""Checks of what is installed: our packages, their requirements, plugins, and models with their weights."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator

from diffsynth import _discovery, _env, registry
from diffsynth._entry_points import installed_version, plugin_entries
from diffsynth.core.loader import first_party
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import weights_state
from diffsynth.diagnosis.finding import Finding
from diffsynth.registry import ModelRecord
from diffsynth.spec import parse_source

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?P<bounds>[^;]*)(?:;(?P<marker>.*))?")
_HOLDS = {
    ">=": lambda version, bound: version >= bound,
    "<": lambda version, bound: version < bound,
    "==": lambda version, bound: version == bound,
}


def distributions() -> Iterator[Finding]:
    """Yield a `Finding` per distribution that is ours or has a plugin: its version or, for one of ours that is not
    installed, the models it adds.
    """
    for name in _installed():
        yield Finding(name, "ok", installed_version(name) or "")
    for name, added in absent_packages().items():
        models = f"; adds {', '.join(added)}" if added else ""
        yield Finding(name, "note", f"not installed{models}", f"Run: pip install {name}")


def requirements() -> Iterator[Finding]:
    """Yield a `Finding` per library that installed packages of ours and plugins need: its version, or, for each
    package whose requirement is not met, one that is broken; requirements of extras or other platforms are skipped.
    """
    packages = _installed()
    seen = set(packages)
    for package in packages:
        for text in _requires(package):
            found = _REQUIREMENT.match(text)
            if found is None or _is_for_others(found["marker"]):
                continue
            finding = _requirement(package, found["name"], found["bounds"].strip())
            if finding.state == "broken" or found["name"] not in seen:
                yield finding
            seen.add(found["name"])


def absent_packages() -> dict[str, list[str]]:
    """Return a dict name -> list of its models' names, for each package of ours that is not installed."""
    models = first_party.models_by_package()
    return {name: models.get(name, []) for name in sorted(first_party.packages()) if installed_version(name) is None}


def plugins() -> Iterator[Finding]:
    """Yield a `Finding` for each plugin that loaded, and for each problem of a plugin or of the installation."""
    problems = registry.problems()
    named = {(problem.plugin, problem.distribution) for problem in problems}
    for plugin in _discovery.catalog().plugins:
        if (plugin.name, plugin.distribution) not in named:
            seen = f"{plugin.distribution} {plugin.version}, loaded in {plugin.seconds * 1000:.0f} ms"
            yield Finding(plugin.name, "ok", seen)
    for problem in problems:
        has_command = problem.distribution == "diffsynth" or problem.state == "warning"
        action = (
            "Run the command in the message"
            if has_command
            else f"Run: diffsynth plugins --traceback; or: pip uninstall {problem.distribution}"
        )
        state = "note" if problem.state == "warning" else "broken"
        yield Finding(problem.plugin, state, f"{problem.distribution} {problem.version}: {problem.error}", action)


def models() -> Iterator[Finding]:
    """Yield a `Finding` for each model with files on this machine, or whose package lacks its files, and one for all
    models without any; one if no model is installed.
    """
    records = registry.list()
    if not records:
        yield Finding("models", "note", "none are installed", "Install a model family; see diffsynth list")
    absent = [record for record in records if record.weights == "absent" and _is_on_a_hub(record)]
    for record in records:
        if record.weights == "present":
            yield Finding(record.exact_name, "ok", "weights present")
        elif record not in absent:
            yield _incomplete(record)
    if absent:
        yield _absent(len(absent), len(records))


def _is_on_a_hub(record: ModelRecord) -> bool:
    return any(parse_source(source).model_id for source in (*record.components.values(), *record.processors.values()))


def _absent(count: int, total: int) -> Finding:
    """Return the `Finding` for all models whose weights are absent."""
    if _env.skip_download():
        how = "unset DIFFSYNTH_SKIP_DOWNLOAD to download a model when it is first loaded"
    else:
        how = f"a model is downloaded from {_env.download_source()} when it is first loaded"
    return Finding("absent", "note", f"weights of {count} of {total} models", f"To see them: diffsynth list; {how}")


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
    return Finding(
        record.exact_name, "note", seen, f"Nothing: it is downloaded from {fetched[0].hub} when it is first loaded"
    )


def _installed() -> list[str]:
    """Return a list of installed distributions' names: diffsynth-core, then our others and those of plugins, sorted."""
    plugins = {entry.distribution for entry in plugin_entries()[0]}
    others = {name for name in first_party.packages() if installed_version(name)} | plugins
    return ["diffsynth-core", *sorted(others - {"diffsynth-core"})]


def _requires(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except Exception:  # damaged metadata, which `plugins` names
        return []


def _requirement(package: str, name: str, bounds: str) -> Finding:
    version = installed_version(name)
    if version is None:
        return Finding(name, "broken", f"not installed; {package} needs it", f'Run: pip install "{name}{bounds}"')
    if not version:
        reinstall = f'Run: pip install --force-reinstall "{name}{bounds}"'
        return Finding(name, "broken", f"its metadata cannot be read; {package} needs it", reinstall)
    if not is_within(version, bounds):
        seen = f"{version}; {package} needs {bounds}"
        return Finding(name, "broken", seen, f'Run: pip install "{name}{bounds}"')
    return Finding(name, "ok", version)


def _is_for_others(marker: str | None) -> bool:
    """Whether a requirement's marker (None: False) does not contain `sys_platform` with this platform's name."""
    return marker is not None and not ("sys_platform" in marker and repr(sys.platform) in marker.replace('"', "'"))


def is_within(version: str, bounds: str) -> bool:
    """Whether a version satisfies bounds such as ">=2.6,<3"; operators other than >=, < and == are ignored."""
    for bound in filter(None, bounds.split(",")):
        match = re.match(r"\s*(>=|<|==)\s*([\d.]+)\s*$", bound)
        if match and not _HOLDS[match[1]](_release(version), _release(match[2])):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """Return a version's release number as a tuple of ints, without trailing zeros: `(2, 15)` for `2.15.0+cu130`."""
    numbers = [int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split(".")]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
