"""Hook specifications. `docs/hooks/` has a page for each hook.

A plugin implements hooks as module-level functions marked `@diffsynth.hookimpl`. An implementation takes the arguments
it wants by name. Arguments are only ever added, so existing implementations keep working.
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

# Declare: call `register` once per declaration.


@hookspec
def register_models(register: Callable[[spec.ModelSpec], None]) -> None:
    """Declare models that users load by name."""


@hookspec
def register_architectures(register: Callable[[spec.ArchitectureSpec], None]) -> None:
    """Declare networks with their configs and the functions that infer a config from shapes."""


@hookspec
def register_checkpoints(register: Callable[[spec.CheckpointSpec], None]) -> None:
    """Declare published checkpoint layouts of networks, with their key rules."""


@hookspec
def register_layer_wrappers(register: Callable[[spec.LayerWrapperSpec], None]) -> None:
    """Declare how the VRAM engine treats layer classes of other libraries."""


@hookspec
def register_attention(register: Callable[[spec.AttentionSpec], None]) -> None:
    """Declare attention backends."""


@hookspec
def register_solvers(register: Callable[[spec.SolverSpec], None]) -> None:
    """Declare solvers of the denoising loop."""


@hookspec
def register_quantization(register: Callable[[spec.QuantizationSpec], None]) -> None:
    """Declare quantization backends."""


@hookspec
def register_training(register: Callable[[spec.TrainingSpec], None]) -> None:
    """Declare how a pipeline is trained."""


@hookspec
def register_objectives(register: Callable[[spec.ObjectiveSpec], None]) -> None:
    """Declare training objectives (losses)."""


@hookspec
def register_features(register: Callable[[spec.FeatureSpec], None]) -> None:
    """Declare features, and with them arguments, roles and units, to add to existing pipelines."""


@hookspec
def register_commands(register: Callable[[spec.CommandSpec], None]) -> None:
    """Declare commands of the `diffsynth` program."""


@hookspec
def register_writers(register: Callable[[spec.WriterSpec], None]) -> None:
    """Declare functions that write results to files, one for each suffix."""


@hookspec
def register_doors(register: Callable[[spec.DoorSpec], None]) -> None:
    """Declare folders of modules to add to the package `diffsynth.pipelines`."""


@hookspec
def register_guidance(register: Callable[[spec.GuidanceSpec], None]) -> None:
    """Declare guidances: ways to combine the predictions of several branches."""


@hookspec
def register_loras(register: Callable[[spec.LoRASpec], None]) -> None:
    """Declare published LoRAs with the defaults that calls have while they are loaded."""


# Decide: the first result that is not None is used.


@hookspec(firstresult=True)
def resolve_source(source: str) -> list[Path] | None:
    """Return a list of the local files of a `scheme://` source that core does not know; None for other sources."""


# Observe: return values are ignored; an exception is reported and the call continues.


@hookspec
def checkpoint_recognized(files: list[Path], architecture: str, tier: str) -> None:
    """Called when a file was recognised, by `tier` "metadata", "signature" or "structure"."""


@hookspec
def component_loaded(role: str, architecture: str, files: list[Path], seconds: float) -> None:
    """Called when a component has been loaded; `seconds` is the loading time."""


@hookspec
def pipeline_ready(pipeline: Any) -> None:
    """Called when `from_pretrained` has made a pipeline; its optional components may be None."""


@hookspec
def denoise_started(pipeline: Any, num_steps: int, shape: tuple[int, ...]) -> None:
    """Called before the first denoising step; `shape` is the shape of the latents."""


@hookspec
def step_done(pipeline: Any, step: int, num_steps: int, sigma: float) -> None:
    """Called after each denoising step; `sigma` is the noise level after it."""


@hookspec
def training_step_done(step: int, loss: float, metrics: Mapping[str, float]) -> None:
    """Called after optimizer steps; `loss` and `metrics` are means since the last call."""


@hookspec
def adapter_saved(path: Path, step: int) -> None:
    """Called when trained weights were written to a file."""
