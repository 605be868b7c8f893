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
"""Decorator of a plugin's function that implements the hook of the same name."""

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
    """Declare quantization methods of the weights of linear layers."""


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
    """Return a list of the local files of a `scheme://` source that core does not know; None for other sources.

    Args:
        source: the whole text, such as "store://networks/*.safetensors".
    """


# Observe: return values are ignored; an exception is reported and the call continues.


@hookspec
def checkpoint_recognized(files: list[Path], architecture: str, tier: str) -> None:
    """Called when a file was recognised, by `tier` "metadata", "signature" or "structure".

    Args:
        files: the files of the checkpoint, in order.
        architecture: name of the `ArchitectureSpec`.
        tier: what told the architecture, "metadata", "signature" or "structure".
    """


@hookspec
def component_loaded(role: str, architecture: str, files: list[Path], seconds: float) -> None:
    """Called when a component has been loaded; `seconds` is the loading time.

    Args:
        role: name of the component in its pipeline, "dit".
        architecture: name of the `ArchitectureSpec`.
        files: the files that its weights are from; empty for a state dict.
        seconds: time from the recognised files to the module with its weights.
    """


@hookspec
def pipeline_ready(pipeline: Any) -> None:
    """Called when `from_pretrained` has made a pipeline; its optional components may be None.

    Args:
        pipeline: the `diffsynth.Pipeline`.
    """


@hookspec
def denoise_started(pipeline: Any, num_steps: int, shape: tuple[int, ...]) -> None:
    """Called before the first denoising step; `shape` is the shape of the latents.

    Args:
        pipeline: the `diffsynth.Pipeline` that is called.
        num_steps: number of steps of the call.
        shape: shape of the latents, `b c h w`, `b c t h w` or another.
    """


@hookspec
def step_done(pipeline: Any, step: int, num_steps: int, sigma: float) -> None:
    """Called after each denoising step; `sigma` is the noise level after it.

    Args:
        pipeline: the `diffsynth.Pipeline` that is called.
        step: index of the step, 0 for the first.
        num_steps: number of steps of the call.
        sigma: noise level after the step, in [0, 1]; 0 after the last.
    """


@hookspec
def training_step_done(step: int, loss: float, metrics: Mapping[str, float]) -> None:
    """Called after optimizer steps; `loss` and `metrics` are means since the last call.

    Args:
        step: number of optimizer steps done, at least 1.
        loss: mean of the loss since the last call.
        metrics: name -> mean since the last call of what the objective and the loop report.
    """


@hookspec
def adapter_saved(path: Path, step: int) -> None:
    """Called when trained weights were written to a file.

    Args:
        path: the file.
        step: number of optimizer steps done, at least 1.
    """
