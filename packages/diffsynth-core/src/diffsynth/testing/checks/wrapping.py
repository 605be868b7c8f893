"""Each architecture under the VRAM engine: wherever its weights wait, it computes what it computed."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.spec import ArchitectureSpec
from diffsynth.testing.checks.architectures import differing, leaves_nothing_on_meta, runs, tiny_output, tiny_real
from diffsynth.testing.checks.check import Check, Subject

if TYPE_CHECKING:
    from torch import nn

    from diffsynth.core.loader.reader.source import ComponentSource


def checks(subject: Subject) -> Iterator[Check]:
    """Two for each architecture."""
    for fact in subject.declared("architectures"):
        called = f"{fact.name} reads no part that it does not call"
        first = (leaves_nothing_on_meta(fact.name), runs(fact.name))
        yield Check(called, functools.partial(_calls_what_it_reads, fact), after=first)
        same = f"{fact.name} is the same wherever its weights wait"
        yield Check(same, functools.partial(_is_the_same_wrapped, fact), after=(called,))


def _calls_what_it_reads(fact: ArchitectureSpec) -> None:
    """Every leaf's parameters are on meta outside its own forward."""
    module = tiny_real(fact)
    leaves = [part for part in module.modules() if not any(True for _ in part.children())]
    classes = tuple({type(part) for part in leaves if any(True for _ in part.parameters())})
    try:
        found = _wrapped(fact, module, "disk", whole=classes)
    except (RuntimeError, NotImplementedError) as error:
        raise AssertionError(
            f"{fact.module} reads a parameter of a part without calling that part, which fails while the part's "
            f"weights are away ({type(error).__name__}: {error}). Name the class that does it in `atomic`"
        ) from error
    assert not found, f"with each part's weights there only while it runs, the output differs in {', '.join(found)}"


def _is_the_same_wrapped(fact: ArchitectureSpec) -> None:
    for preset in ("cpu-offload", "disk"):
        found = _wrapped(fact, tiny_real(fact), preset)
        assert not found, f"under the policy {preset!r} the output differs in {', '.join(found)}"


def _wrapped(fact: ArchitectureSpec, module: nn.Module, preset: str, **cut: Any) -> list[str]:
    """Where the output differs from that of the module as it was."""
    from diffsynth.core.loader import component
    from diffsynth.core.vram.managed import wrap
    from diffsynth.core.vram.policy import Policy
    from diffsynth.runtime.memory_options import cuts

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

    from diffsynth.core.loader import convert, header
    from diffsynth.core.loader.reader.source import ComponentSource

    weights = {key: tensor.clone().contiguous() for key, tensor in module.state_dict().items()}
    save_file(weights, file)
    held = header.read([file])
    dtypes = {key: tensor.dtype for key, tensor in weights.items()}
    return ComponentSource(held, convert.plan((), held.shapes).targets, dtypes)
