"""Checks of architectures at tiny size: building on meta, running, inferring the config, saving and loading."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.errors import did_you_mean, shortened
from diffsynth.spec import ArchitectureSpec, resolve
from diffsynth.testing.checks.check import Check, Subject
from diffsynth.testing.checks.plugin import NAMES, REFERENCES

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK_FIELDS = ("repeated_blocks", "compiled_blocks", "cached_blocks")
"""The fields of an `ArchitectureSpec` that name lists of blocks."""


def checks(subject: Subject) -> Iterator[Check]:
    """Yield five or six `Check` objects (named tests, not yet run) for each runnable architecture of the plugin
    `subject`.
    """
    for fact in subject.runnable_architectures():
        built, loaded, ran = (
            f"{fact.name} builds on meta without allocating memory",
            no_meta_after_loading(fact.name),
            runs(fact.name),
        )
        yield Check(built, functools.partial(_builds_on_meta, fact), after=(REFERENCES, NAMES))
        if any(getattr(fact, field) for field in BLOCK_FIELDS):
            yield Check(blocks_declared(fact.name), functools.partial(_has_declared_blocks, fact), after=(built,))
        yield Check(loaded, functools.partial(_has_no_meta_after_loading, fact), after=(built,))
        yield Check(ran, functools.partial(_runs, fact), after=(REFERENCES, NAMES), runs_network=True)
        yield Check(config_inferred(fact.name), functools.partial(_infers_config, fact), after=(built,))
        saved = functools.partial(_saves_and_loads, fact, subject)
        yield Check(f"{fact.name} is unchanged by saving and loading", saved, after=(loaded, ran), runs_network=True)


def runs(name: str) -> str:
    """Return the name of the check of architecture `name` that runs its forward: `"{name} forward is finite and
    reproducible"`.
    """
    return f"{name} forward is finite and reproducible"


def no_meta_after_loading(name: str) -> str:
    """Return the name of the check that architecture `name` loads completely: `"{name} has no tensor on meta after
    loading"`.
    """
    return f"{name} has no tensor on meta after loading"


def config_inferred(name: str) -> str:
    """Return the name of the check that infers the config of architecture `name`: `"{name} config is inferred from its
    shapes"`.
    """
    return f"{name} config is inferred from its shapes"


def blocks_declared(name: str) -> str:
    """Return the name of the check that architecture `name` has its lists of blocks: `"{name} has the blocks that it
    declares"`.
    """
    return f"{name} has the blocks that it declares"


def _builds_on_meta(fact: ArchitectureSpec) -> None:
    from diffsynth.core.loader import component

    module = component.build(fact, resolve(fact.tiny))
    real = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if not tensor.is_meta]
    assert not real, (
        f"{', '.join(real)} allocated memory under torch.device('meta'); "
        "do not pass a device when the constructor creates tensors"
    )


def _has_declared_blocks(fact: ArchitectureSpec) -> None:
    from torch import nn

    from diffsynth.core.loader import component

    module = component.build(fact, resolve(fact.tiny))
    lists = [path for path, part in module.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential)]
    faults = [
        f"{field} names {name!r}{did_you_mean(name, lists)}"
        for field in BLOCK_FIELDS
        for name in getattr(fact, field) or ()
        if name not in lists
    ]
    assert not faults, (
        f"{'; '.join(faults)}. Expected names of ModuleLists or Sequentials of {fact.module}, "
        f"which has {shortened(lists) or 'none'}"
    )


def _has_no_meta_after_loading(fact: ArchitectureSpec) -> None:
    """Raise AssertionError if a tensor of the module is on meta after its weights are assigned and buffers reset.

    The loader does the same: `reset_buffers()` computes what no file holds.
    """
    from torch import Tensor

    from diffsynth.core.loader import component

    module = component.build(fact, resolve(fact.tiny))
    module.load_state_dict(tiny_real(fact).state_dict(), strict=True, assign=True)
    for submodule in module.modules():
        if hasattr(submodule, "reset_buffers"):
            submodule.reset_buffers()
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    for path, submodule in module.named_modules():
        left += [
            f"{path}.{name}".lstrip(".")
            for name, value in vars(submodule).items()
            if isinstance(value, Tensor) and value.is_meta
        ]
    assert not left, (
        f"{', '.join(left)} stayed on meta, because no file holds it. Register it as a buffer (persistent=False) and "
        "add a reset_buffers() method to its module that computes it, or compute it in forward()."
    )


def _runs(fact: ArchitectureSpec) -> None:
    import torch

    module = tiny_real(fact)
    first, again = tiny_output(fact, module), tiny_output(fact, module)
    assert first, f"forward() of {fact.module} returned no tensor"
    assert all(torch.isfinite(tensor).all() for tensor in first.values()), (
        f"forward() of {fact.module} on tiny_inputs returned NaN or infinity; is every parameter initialised?"
    )
    changed = differing(first, again)
    assert not changed, f"forward() of {fact.module}, run twice on equal inputs, differs in {', '.join(changed)}"


def _infers_config(fact: ArchitectureSpec) -> None:
    from diffsynth.core.loader import component

    shapes = _shapes(component.build(fact, resolve(fact.tiny)))
    absent = [
        pattern
        for pattern in fact.required
        if not any(re.fullmatch(re.escape(pattern).replace(r"\{n\}", r"\d+"), key) for key in shapes)
    ]
    assert not absent, f"required names that the tiny module does not have: {', '.join(absent)}"
    inferred = resolve(fact.infer_config)(shapes)
    again = _shapes(component.build(fact, inferred))
    assert again == shapes, (
        f"{fact.infer_config} inferred {inferred} from the shapes of {fact.tiny}; a module of that config differs in "
        f"{', '.join(sorted(key for key in shapes.keys() | again.keys() if shapes.get(key) != again.get(key))[:8])}"
    )


def _saves_and_loads(fact: ArchitectureSpec, subject: Subject) -> None:
    import torch

    from diffsynth.core.loader import component, recognize, save
    from diffsynth.core.loader.checkpoint import read_files

    module, config = tiny_real(fact), resolve(fact.tiny)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.safetensors"
        save.save_checkpoint(module, file, architecture=fact.name, config=config)
        tensors = read_files([file])
        (found,) = recognize.recognize(tensors, *subject.catalog.layouts(), tiers=("metadata",))
        assert (found.architecture.name, found.config) == (fact.name, config), (
            f"saved as {fact.name} with {config}, read back as {found.architecture.name} with {found.config}; "
            "metadata is JSON, so a tuple comes back as a list: make it a tuple in __post_init__"
        )
        loaded = component.load_component(found, tensors, device="cpu", dtype=torch.float32)
    changed = differing(module.state_dict(), loaded.state_dict())
    assert not changed, f"changed by saving and loading: {', '.join(changed)}"
    changed = differing(tiny_output(fact, module), tiny_output(fact, loaded))
    assert not changed, f"equal weights, but the loaded module's output differs in {', '.join(changed)}"


def tiny_real(fact: ArchitectureSpec) -> nn.Module:
    """Return the architecture's tiny fp32 `nn.Module` in eval mode, newly built, with the same random weights in each
    call.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = resolve(fact.module)(resolve(fact.tiny))
    return module.eval()


def tiny_output(fact: ArchitectureSpec, module: nn.Module) -> dict[str, Tensor]:
    """Return a dict path -> tensor of all tensors that `module` returns for the architecture's tiny inputs;
    `"output[0]"` is a path.
    """
    import torch

    inputs = resolve(fact.tiny_inputs)(resolve(fact.tiny), torch.Generator().manual_seed(0))
    with torch.no_grad():
        return dict(_tensors("output", module(**inputs)))


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    from torch import Tensor

    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name}[{key!r}]", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _tensors(f"{name}[{index}]", inner)


def differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[str]:
    """Return a sorted list of the keys whose tensors differ between two mappings name -> tensor, or that only one of
    them has.
    """
    import torch

    return sorted(
        key
        for key in first.keys() | second.keys()
        if key not in first or key not in second or not torch.equal(first[key], second[key])
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
