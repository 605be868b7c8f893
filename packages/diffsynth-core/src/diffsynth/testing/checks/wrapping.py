"""Checks of architectures under the VRAM engine: streaming and offloading weights must not change the output."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.spec import ArchitectureSpec
from diffsynth.testing.checks.architectures import (
    BLOCK_FIELDS,
    blocks_declared,
    differing,
    no_meta_after_loading,
    runs,
    tiny_output,
    tiny_real,
)
from diffsynth.testing.checks.check import Check, Subject

if TYPE_CHECKING:
    from torch import nn

    from diffsynth.core.loader.reader.source import ComponentSource


def checks(subject: Subject) -> Iterator[Check]:
    """Yield two `Check` objects (named tests, not yet run) for each architecture of the plugin."""
    for fact in subject.runnable_architectures():
        called = f"{fact.name} reads no parameter of a module that it does not call"
        first = (no_meta_after_loading(fact.name), runs(fact.name))
        if any(getattr(fact, field) for field in BLOCK_FIELDS):
            first += (blocks_declared(fact.name),)
        yield Check(called, functools.partial(_calls_what_it_reads, fact), after=first, runs_network=True)
        equal = functools.partial(_is_equal_wrapped, fact)
        yield Check(is_equal_wrapped(fact.name), equal, after=(called,), runs_network=True)


def is_equal_wrapped(name: str) -> str:
    """Return the name of the check of architecture `name` under memory policies: `"{name} output does not depend on
    where weights are stored"`.
    """
    return f"{name} output does not depend on where weights are stored"


def _calls_what_it_reads(fact: ArchitectureSpec) -> None:
    """Raise AssertionError if the output changes, or forward fails, when each leaf module's parameters are loaded only
    while the leaf module runs.
    """
    module = tiny_real(fact)
    leaves = [each for each in module.modules() if not any(True for _ in each.children())]
    classes = tuple({type(leaf) for leaf in leaves if any(True for _ in leaf.parameters())})
    try:
        found = _wrapped(fact, module, "disk", whole=classes)
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(
            f"{fact.module} reads a parameter of a submodule without calling the submodule, which fails while its "
            f"weights are offloaded ({type(error).__name__}: {error}). Name the class that does this in `atomic`"
        ) from error
    assert not found, (
        f"with the weights of each leaf loaded only while it runs, the output differs in {', '.join(found)}"
    )


def _is_equal_wrapped(fact: ArchitectureSpec) -> None:
    for preset in ("cpu-offload", "disk"):
        found = _wrapped(fact, tiny_real(fact), preset)
        assert not found, f"under the policy {preset!r} the output differs in {', '.join(found)}"


def _wrapped(fact: ArchitectureSpec, module: nn.Module, preset: str, **cut: Any) -> list[str]:
    """Return a sorted list of the names of the module's outputs that change when it is offloaded by the policy
    `preset`.
    """
    from diffsynth.core.loader import component
    from diffsynth.core.vram.managed import wrap
    from diffsynth.core.vram.policy import Policy
    from diffsynth.runtime.architectures import cuts

    expected = tiny_output(fact, module)
    with tempfile.TemporaryDirectory() as folder:
        source = None
        if preset == "disk":
            source = _on_disk(module, Path(folder) / "tiny.safetensors")
            module = component.materialize(component.build(fact, module.config), source, device="meta")
            component.fill_buffers(module)
        module.requires_grad_(False)
        wrapped = wrap(module, Policy.preset(preset, "cpu"), source=source, smallest=0, **cuts(fact) | cut)
        wrapped.configure(resident=(), slots=2)
        with wrapped:
            outputs = [tiny_output(fact, module) for _ in range(2)]
    return sorted({name for output in outputs for name in differing(expected, output)})


def _on_disk(module: nn.Module, file: Path) -> ComponentSource:
    from safetensors.torch import save_file

    from diffsynth.core.loader import convert
    from diffsynth.core.loader.checkpoint import read_files
    from diffsynth.core.loader.reader.source import ComponentSource

    weights = {key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}
    save_file(weights, file)
    tensors = read_files([file])
    dtypes = {key: tensor.dtype for key, tensor in weights.items()}
    return ComponentSource(tensors, convert.plan((), tensors.shapes).targets, dtypes)
