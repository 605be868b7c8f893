"""Each published layout: it is what its signature says, no other architecture claims it, and it plans whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

from diffsynth.core.loader import convert, header, recognize
from diffsynth.core.loader.layouts.published import layout_of, rules_of
from diffsynth.errors import Unrecognized
from diffsynth.spec import CheckpointSpec, resolve
from diffsynth.testing.checks.architectures import told_by_shapes
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.plugin import NAMES, REFERENCES


def checks(subject: Subject) -> Iterator[Check]:
    """Up to four for each checkpoint that ships its layout."""
    own = {fact.name for fact in subject.declared("architectures")}
    for fact in subject.declared("checkpoints"):
        if not fact.layout:
            continue
        told = (told_by_shapes(fact.architecture),) if fact.architecture in own else ()
        whole = f"layout {fact.name} plans with nothing missing"
        yield Check(whole, functools.partial(_plans_whole, fact, subject), after=(REFERENCES, NAMES, *told))
        if fact.signature:
            signed = f"layout {fact.name} has its signature"
            yield Check(signed, functools.partial(_has_signature, fact), after=(REFERENCES,))
            by_signature = functools.partial(_is_claimed_once, fact, subject, "signature")
            name = f"layout {fact.name} is recognised by signature, as one architecture"
            yield Check(name, by_signature, after=(whole, signed))
        name = f"layout {fact.name} is recognised by structure, as one architecture"
        yield Check(name, functools.partial(_is_claimed_once, fact, subject, "structure"), after=(whole,))


def _has_signature(fact: CheckpointSpec) -> None:
    found = header.signature(layout_of(fact))
    assert found == fact.signature, f"{fact.layout} has signature {found}; the CheckpointSpec says {fact.signature}"


def _plans_whole(fact: CheckpointSpec, subject: Subject) -> None:
    from diffsynth.core.loader import component

    architecture = subject.catalog.layouts()[0][fact.architecture]
    plan = convert.plan(rules_of(fact), layout_of(fact))
    config = resolve(architecture.infer_config)(plan.shapes)
    module = component.build(architecture, dataclasses.replace(config, **fact.config))
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    convert.check(plan, wanted, where=fact.layout)


def _is_claimed_once(fact: CheckpointSpec, subject: Subject, tier: str) -> None:
    try:
        found = recognize.recognize(_header(fact), *subject.catalog.layouts(), tiers=(tier,))
    except Unrecognized as error:
        raise AssertionError(f"{fact.layout}, by {tier}: {error}") from error
    names = sorted(one.architecture.name for one in found)
    # A file may hold several components: each has a checkpoint of this layout, whose rules drop the others.
    expected = sorted(one.architecture for one in subject.declared("checkpoints") if one.layout == fact.layout)
    assert names == expected, (
        f"{fact.layout} is claimed by {' and '.join(names)}, but declared for {' and '.join(expected)}"
    )


def _header(fact: CheckpointSpec) -> header.Header:
    return header.Header({key: header.TensorInfo("BF16", shape) for key, shape in layout_of(fact).items()})
