"""Every hook there is, on one screen. `docs/hooks/` has a page for each.

A plugin implements any of these as module-level functions marked `@diffsynth.hookimpl`. Arguments are opt-in by name
and are only ever added, so an implementation written today keeps working.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from diffsynth import spec

hookspec = pluggy.HookspecMarker("diffsynth")
hookimpl = pluggy.HookimplMarker("diffsynth")

# Declare: call `register` once per fact.


@hookspec
def register_models(register: Callable[[spec.ModelSpec], None]) -> None:
    """Models that a user can name."""


@hookspec
def register_architectures(register: Callable[[spec.ArchitectureSpec], None]) -> None:
    """Networks, with their configs and how shapes tell them."""


@hookspec
def register_checkpoints(register: Callable[[spec.CheckpointSpec], None]) -> None:
    """Published layouts of those networks, with their converters."""


@hookspec
def register_layer_wrappers(register: Callable[[spec.LayerWrapperSpec], None]) -> None:
    """How the VRAM engine treats layer classes it does not know."""


@hookspec
def register_attention(register: Callable[[spec.AttentionSpec], None]) -> None:
    """Attention backends."""


@hookspec
def register_quantization(register: Callable[[spec.QuantizationSpec], None]) -> None:
    """Quantization backends."""


@hookspec
def register_training(register: Callable[[spec.TrainingSpec], None]) -> None:
    """How a pipeline is trained."""


@hookspec
def register_objectives(register: Callable[[spec.ObjectiveSpec], None]) -> None:
    """Training losses."""


@hookspec
def register_units(register: Callable[[spec.UnitSpec], None]) -> None:
    """Units, and so arguments, added to somebody's pipeline."""


@hookspec
def register_commands(register: Callable[[spec.CommandSpec], None]) -> None:
    """Commands of the `diffsynth` program."""


@hookspec
def register_doors(register: Callable[[spec.DoorSpec], None]) -> None:
    """Folders of modules that join `diffsynth.pipelines`."""


# Decide: the first answer that is not None counts.


@hookspec(firstresult=True)
def resolve_source(source: str) -> list[Path] | None:
    """Local files for a `scheme://` source that core does not know."""


# Observe: return values are ignored, an exception is reported and the run goes on.


@hookspec
def checkpoint_recognized(files: list[Path], architecture: str, tier: str) -> None:
    """A file was recognised, by `tier` "metadata", "signature" or "structure"."""


@hookspec
def component_loaded(role: str, architecture: str, files: list[Path], seconds: float) -> None:
    """A component is in memory."""


@hookspec
def pipeline_ready(pipeline: Any) -> None:
    """All components of a pipeline are loaded."""


@hookspec
def denoise_started(pipeline: Any, num_steps: int, shape: tuple[int, ...]) -> None:
    """The loop is about to begin, on latents of this shape."""


@hookspec
def step_done(pipeline: Any, step: int, num_steps: int, sigma: float) -> None:
    """A step of the loop has ended; `sigma` is the level it reached."""


@hookspec
def training_step_done(step: int, loss: float, metrics: Mapping[str, float]) -> None:
    """An optimizer step has ended."""


@hookspec
def adapter_saved(path: Path, step: int) -> None:
    """Trained weights were written."""
