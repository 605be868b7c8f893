"""Checks of published layouts: conversion of all keys, signature, and recognition as the declared architecture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

from diffsynth.core.loader import convert, header, recognize
from diffsynth.core.loader.layouts import layout_of, nested_layout_of, rules_of
from diffsynth.errors import Unrecognized
from diffsynth.spec import CheckpointSpec, resolve
from diffsynth.testing.checks.architectures import config_inferred
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.plugin import NAMES, REFERENCES


def checks(subject: Subject) -> Iterator[Check]:
    """Yield two `Check`s (named tests, not yet run) for each checkpoint of the plugin with a layout; four if it has a
    signature.
    """
    own = {fact.name for fact in subject.declared("architectures")}
    for fact in subject.declared("checkpoints"):
        if not fact.layout:
            continue
        inferred = (config_inferred(fact.architecture),) if fact.architecture in own else ()
        converted = f"layout {fact.name} converts with no missing keys"
        yield Check(converted, functools.partial(_converts, fact, subject), after=(REFERENCES, NAMES, *inferred))
        if fact.signature:
            signed = f"layout {fact.name} has the declared signature"
            yield Check(signed, functools.partial(_has_signature, fact), after=(REFERENCES,))
            by_signature = functools.partial(_is_recognized, fact, subject, "signature")
            name = f"layout {fact.name} is recognised by signature, as one architecture"
            yield Check(name, by_signature, after=(converted, signed))
        if fact.loras_only:
            continue
        by_structure = functools.partial(_is_recognized, fact, subject, "structure")
        yield Check(recognized_by_structure(fact.name), by_structure, after=(converted,))


def recognized_by_structure(name: str) -> str:
    """Return the name of the check that recognises layout `name` by shapes: `"layout {name} is recognised by structure,
    as one architecture"`.
    """
    return f"layout {name} is recognised by structure, as one architecture"


def _has_signature(fact: CheckpointSpec) -> None:
    found = header.signature(nested_layout_of(fact))
    assert found == fact.signature, f"{fact.layout} has signature {found}; its CheckpointSpec declares {fact.signature}"


def _converts(fact: CheckpointSpec, subject: Subject) -> None:
    from diffsynth.core.loader import component

    architecture = subject.catalog.layouts()[0][fact.architecture]
    plan = convert.plan(rules_of(fact), layout_of(fact))
    config = resolve(architecture.infer_config)(plan.shapes)
    module = component.build(architecture, dataclasses.replace(config, **fact.config))
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    convert.check(plan, wanted, where=fact.layout)


def _is_recognized(fact: CheckpointSpec, subject: Subject, tier: str) -> None:
    try:
        found = recognize.recognize(_header(fact), *subject.catalog.layouts(), tiers=(tier,))
    except Unrecognized as error:
        raise AssertionError(f"{fact.layout}, by {tier}: {error}") from error
    names = sorted(one.architecture.name for one in found)
    # A file may hold several components. Each has a checkpoint with this layout, whose rules drop the other keys.
    expected = sorted(one.architecture for one in subject.declared("checkpoints") if one.layout == fact.layout)
    assert names == expected, (
        f"{fact.layout} is recognised as {' and '.join(names)}, but declared for {' and '.join(expected)}"
    )


def _header(fact: CheckpointSpec) -> header.Header:
    nested = nested_layout_of(fact)
    return header.Header(
        {key: header.TensorInfo("BF16", shape) for key, shape in layout_of(fact).items()},
        nested=nested if any(isinstance(value, Mapping) for value in nested.values()) else None,
    )
