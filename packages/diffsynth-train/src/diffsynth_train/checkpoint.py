"""What a run leaves behind: weights that load like any checkpoint, and the state to go on from, bit by bit."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core import device as devices
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.errors import TrainingError
from diffsynth_train.components import Component

logger = logging.getLogger(__name__)

STATE = "state.pt"


def save_weights(
    folder: Path, components: Iterable[Component], *, dtype: torch.dtype, step: int, notes: Mapping[str, str]
) -> list[Path]:
    """One safetensors file per component that learns, `<role>.safetensors`, with its config in the metadata.

    Args:
        folder: made if it is not there.
        components: those that do not learn are left out.
        dtype: on disk.
        step: steps taken.
        notes: further metadata.
    """
    paths = []
    for component in components:
        if not component.trained:
            continue
        path = folder / f"{component.role}.safetensors"
        save_checkpoint(
            component.module,
            path,
            architecture=component.architecture.name,
            config=component.config,
            metadata={**notes, "diffsynth.step": str(step)},
            dtype=dtype,
            base=component.base,
        )
        _discovery.notify("adapter_saved", path=path, step=step)
        paths.append(path)
    return paths


def save_state(
    folder: Path,
    *,
    step: int,
    seed: int,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    ema: Mapping[str, Tensor] | None,
    device: torch.device,
) -> None:
    """Everything that the next step depends on: fp32 weights, optimizer, mean, random states, and the step number.

    The data's position and the learning rate follow from the step number and the seed.
    """
    state = {
        "step": step,
        "seed": seed,
        "parameters": {name: parameter.detach() for name, parameter in parameters},
        "optimizer": optimizer.state_dict(),
        "ema": None if ema is None else dict(ema),
        "random": torch.get_rng_state(),
        "device_type": device.type,
        "random_device": None if device.type == "cpu" else devices.random_state(device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATE}.partial"
    torch.save(state, partial)
    partial.replace(folder / STATE)


def load_state(
    folder: Path,
    *,
    seed: int,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[int, dict[str, Tensor] | None]:
    """Put a saved state back; returns the steps taken and the mean of the weights, if one was kept.

    Raises:
        TrainingError: no state there, another seed, or other parameters.
    """
    path = folder / STATE
    if not path.is_file():
        raise TrainingError(f"{folder} holds no {STATE}; give the folder of a checkpoint, or --resume last")
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if state["seed"] != seed:
        raise TrainingError(f"{path} was trained with seed {state['seed']}, the recipe says {seed}: order would differ")
    named = dict(parameters)
    if differing := sorted(set(named) ^ set(state["parameters"])):
        raise TrainingError(f"{path} holds other parameters than the recipe trains, {differing[0]!r} for one")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"].cpu())
    # States of another kind of device do not fit, and its numbers would be others anyway.
    if state["random_device"] is not None and state.get("device_type", device.type) == device.type:
        devices.set_random_state(state["random_device"], device)
    return state["step"], state["ema"]


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is."""
    return root / f"step-{step:07d}"


def last_checkpoint(root: Path) -> Path:
    """The newest checkpoint below `root`.

    Raises:
        TrainingError: there is none.
    """
    found = sorted(path.parent for path in root.glob(f"step-*/{STATE}"))
    if not found:
        raise TrainingError(f"{root} holds no checkpoint to resume from")
    return found[-1]


def drop_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints below `root`."""
    found = sorted(path.parent for path in root.glob(f"step-*/{STATE}"))
    for folder in found[:-keep] if keep else []:
        logger.info("deleting %s", folder)
        shutil.rmtree(folder)
