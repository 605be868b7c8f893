"""The plugins that took part in a call: of its model, networks, features, solver, guidance, LoRAs and backends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from diffsynth import _discovery
from diffsynth._discovery import CORE, REGISTERED, Declared
from diffsynth._spec_checks import references
from diffsynth.runtime.architectures import architecture_of
from diffsynth.runtime.declared_backends import provider_of
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.guidance import parse_guidance
from diffsynth.runtime.lora_defaults import published_lora
from diffsynth.runtime.request import LOOP_NAMES
from diffsynth.runtime.unit import REQUIRED, equals_default


def plugins_of_call(pipe: Any, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict distribution -> version, sorted, of the plugins, other than core, that took part in a call: whose
    model, pipeline, network, feature, solver, guidance, step cache, LoRA defaults or attention backend it used. A
    plugin of `registry.register` has its own name in place of a distribution.

    Args:
        pipe: the pipeline that was called.
        arguments: of the call. A feature takes part if one of its own arguments has another value than its default, or
            if it has none. Attention backends are those of this thread's running call of the pipeline, else of the
            latest one; calls of compiled networks are not seen.
    """
    call = {name: parameter.default for name, parameter in pipe.__signature__.parameters.items()} | dict(arguments)
    return named(*_used(pipe, call))


def named(*used: Declared[Any]) -> dict[str, str]:
    """Return a dict distribution -> version, sorted, of the plugins of declarations, without core."""
    found = {}
    for one in used:
        if (one.distribution, one.version) == REGISTERED:
            found[one.plugin] = " ".join(REGISTERED)
        elif one.distribution != CORE[1]:
            found[one.distribution] = one.version
    return dict(sorted(found.items()))


def _used(pipe: Any, call: Mapping[str, Any]) -> Iterator[Declared[Any]]:
    catalog = _discovery.catalog()
    owners = _owners(catalog)
    reference = f"{type(pipe).__module__}:{type(pipe).__qualname__}"
    for one in catalog.models:
        if one.spec.pipeline == reference and pipe.model_name in (None, one.spec.name):
            yield one
    guidance = call.get("guidance")
    guided = "cfg_scale" in call and not parse_guidance(guidance).is_off(call["cfg_scale"])
    objects = [*type(pipe).__mro__, *(type(call.get(name)) for name in ("step_cache", "attention"))]
    if guided and isinstance(guidance, str):
        yield from [one for one in catalog.guidance if one.spec.name == guidance.partition(":")[0]][:1]
    elif guided:
        objects.append(type(guidance))
    for kind in objects:
        if (own := owners.get(kind.__module__.partition(".")[0])) is not None:
            yield own
    yield from [one for one in catalog.solvers if one.spec.name == call.get("solver")][:1]
    yield from _of_features(pipe, call, catalog)
    yield from _of_loras(pipe, catalog)
    for name in sorted(pipe.running_calls.backends):
        if (backend := provider_of(name)) is not None:
            yield backend


def _owners(catalog: _discovery.Catalog) -> dict[str, Declared[Any]]:
    """Return a dict top-level package -> a declaration of the one plugin that declares code of it."""
    found: dict[str, Declared[Any] | None] = {}
    for kind in ("models", "architectures", "guidance", "solvers", "attention", "features", "writers"):
        for one in getattr(catalog, kind):
            texts = [one.spec.feature] if kind == "features" else references(one.spec)
            for package in {text.partition(":")[0].partition(".")[0] for text in texts}:
                earlier = found.setdefault(package, one)
                if earlier is not None and (earlier.plugin, earlier.distribution) != (one.plugin, one.distribution):
                    found[package] = None
    return {package: one for package, one in found.items() if one is not None}


def _of_features(pipe: Any, call: Mapping[str, Any], catalog: _discovery.Catalog) -> Iterator[Declared[Any]]:
    """Yield the declarations of the features that a call uses, and of the networks, but those of other features."""
    unused = [feature for feature in pipe.features if not _is_used(pipe, feature, call)]
    providers = {f"{one.plugin} ({one.distribution})": one for one in catalog.features}
    for feature in pipe.features:
        if feature.provider in providers and feature not in unused:
            yield providers[feature.provider]
    idle = {role for feature in unused for role in feature.roles}
    declared = {id(one.spec): one for one in catalog.architectures}
    for role, part in pipe.parts.items():
        if role.partition("[")[0] not in idle and isinstance(part, nn.Module):
            network = architecture_of(part)
            if network is not None and id(network) in declared:
                yield declared[id(network)]


def _is_used(pipe: Any, feature: Feature, call: Mapping[str, Any]) -> bool:
    own_units = {step.name for step in (*feature.units, *feature.outputs)}
    others = [step for step in (*pipe.program.units, *pipe.program.outputs) if step.name not in own_units]
    shared = {read.name for step in others for read in step.reads} | set(LOOP_NAMES)
    own = {
        read.name: read.default
        for step in (*feature.units, *feature.outputs)
        for read in step.reads
        if read.default is not REQUIRED and read.name not in shared
    }
    return not own or any(not equals_default(call.get(name, value), value) for name, value in own.items())


def _of_loras(pipe: Any, catalog: _discovery.Catalog) -> Iterator[Declared[Any]]:
    """Yield the declarations of the published LoRAs that are loaded with the defaults that are declared for them."""
    declared = {id(one.spec): one for one in catalog.loras}
    for lora in pipe.loras:
        spec = published_lora(type(pipe), None, list(lora.files)) if lora.call_defaults else None
        if spec is not None and dict(lora.call_defaults) == dict(spec.defaults):
            yield declared[id(spec)]
