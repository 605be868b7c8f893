"""Checkpoints of a training run: safetensors weights, and the state from which a run is resumed bit-exactly."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core import device as devices
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.core.replacing import replacing
from diffsynth.errors import TrainingError
from diffsynth.terminal import module_logger
from diffsynth_train.components import Component

logger = module_logger(__name__)

STATE = "state.pt"


def save_weights(
    folder: Path, components: Iterable[Component], *, dtype: torch.dtype, step: int, notes: Mapping[str, str]
) -> list[Path]:
    """Write `folder/<role>.safetensors` (role: name of a component) for each trained component, with its config as
    metadata, and return a list of the files' paths.

    Args:
        folder: output folder; created if missing.
        components: all components; those that are not trained are skipped.
        dtype: dtype of matrices in the file.
        step: number of steps done.
        notes: further metadata.

    Returns:
        the paths of the files.
    """
    paths = []
    for component in components:
        if not component.trained:
            continue
        path = folder / weights_file(component.role)
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


def weights_file(role: str) -> str:
    """Return the name of the file with the weights of a component, by its role."""
    return f"{role}.safetensors"


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
    """Write `folder/state.pt` with what the next step depends on: `parameters`, the optimizer's state, the weight
    average, random states, step and seed.

    The position in the data and the learning rate follow from the step number and the seed.
    """
    state = {
        "step": step,
        "seed": seed,
        "parameters": {name: parameter.detach() for name, parameter in parameters},
        "optimizer": optimizer.state_dict(),
        "optimizer_name": type(optimizer).__name__,
        "ema": None if ema is None else dict(ema),
        "random": torch.get_rng_state(),
        "device_type": device.type,
        "random_device": None if device.type == "cpu" else devices.random_state(device),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / STATE) as partial:
        torch.save(state, partial)


def load_state(
    folder: Path,
    *,
    seed: int,
    parameters: Iterable[tuple[str, nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[int, dict[str, Tensor] | None]:
    """Restore `parameters`, `optimizer` and the random state from a checkpoint folder, and return (steps done, averaged
    weights as a dict name -> tensor, or None if they were not averaged).

    Raises:
        TrainingError: the folder holds no state, a damaged one, or one with another seed, other parameters or another
            optimizer.
    """
    path = folder / STATE
    if not path.is_file():
        raise TrainingError(f"{folder} holds no {STATE}; pass the folder of a checkpoint, or --resume last")
    state = _read_state(path, device)
    if state["seed"] != seed:
        raise TrainingError(
            f"{path} was trained with seed {state['seed']}, the recipe has {seed}: the order of samples would differ"
        )
    named = dict(parameters)
    if differing := sorted(set(named) ^ set(state["parameters"])):
        raise TrainingError(f"{path} and the recipe train different parameters; first difference: {differing[0]!r}")
    if differing := [name for name in named if named[name].shape != state["parameters"][name].shape]:
        there, here = (tuple(each[differing[0]].shape) for each in (state["parameters"], named))
        raise TrainingError(
            f"{path} and the recipe train networks of other sizes: {differing[0]!r} is {there} there and {here} here"
        )
    there, here = state.get("optimizer_name", type(optimizer).__name__), type(optimizer).__name__
    if there != here:
        raise TrainingError(
            f"{path} was trained with {there}, the recipe has {here}: resume with the optimizer of the run, or begin "
            f"another run from its weights, with source= of the component"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(state["parameters"][name])
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # of the recipe, which may have another weight decay than the state
    torch.set_rng_state(state["random"].cpu())
    # The state of another device type cannot be restored, and results would differ there anyway.
    if state["random_device"] is not None and state.get("device_type", device.type) == device.type:
        devices.set_random_state(state["random_device"], device)
    return state["step"], state["ema"]


def step_folder(root: Path, step: int) -> Path:
    """Return the path `root/step-NNNNNNN` of the checkpoint after `step` steps, whether or not it exists."""
    return root / f"step-{step:07d}"


def last_checkpoint(root: Path) -> Path:
    """Return the path of the newest checkpoint in `root`: the folder `step-NNNNNNN` with the highest number that holds
    a `state.pt`; raise TrainingError if there is none, or if it is cut off.

    Raises:
        TrainingError: there is no checkpoint, or the newest is damaged; the message names the newest whole one.
    """
    found = sorted(path.parent for path in root.glob(f"step-*/{STATE}"))
    if not found:
        raise TrainingError(f"{root} holds no checkpoint to resume from")
    if not is_whole(found[-1]):
        raise TrainingError(f"{found[-1] / STATE} is empty or cut off. {_what_else(found[-1])}")
    return found[-1]


def check_output(root: Path, resume: Path | None) -> None:
    """Raise TrainingError if the output folder `root` holds checkpoints that a run does not continue: they would be
    taken for its own, and the run's first ones deleted as the oldest.

    Args:
        root: the output folder.
        resume: folder of the checkpoint that the run begins with; None begins anew.

    Raises:
        TrainingError: there are checkpoints, and `resume` is None, or an earlier one in `root`.
    """
    found = _whole_checkpoints(root)
    if not found or (resume is not None and resume.absolute() == found[-1].absolute()):
        return
    is_own = resume is not None and resume.absolute().parent == root.absolute()
    what = "later checkpoints" if is_own else "checkpoints of another run"
    raise TrainingError(
        f"{root} holds {what}, up to {found[-1].name}: continue with --resume last, delete them, or set another "
        f"output.folder"
    )


def is_whole(folder: Path) -> bool:
    """Whether the `state.pt` of a checkpoint folder is there to its end: an archive's list of contents is its last
    part. The content itself is not read.
    """
    return zipfile.is_zipfile(folder / STATE)


def drop_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoint folders (`step-NNNNNNN` with a whole `state.pt`) in `root`; delete
    none if `keep` is 0.
    """
    for folder in _whole_checkpoints(root)[:-keep] if keep else []:
        logger.info("deleting %s", folder)
        shutil.rmtree(folder)


def _whole_checkpoints(root: Path) -> list[Path]:
    return [folder for folder in sorted(path.parent for path in root.glob(f"step-*/{STATE}")) if is_whole(folder)]


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the dict that `save_state` wrote.

    Raises:
        TrainingError: the file is damaged, or holds something else.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damaged bytes end anywhere in the unpickler
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainingError(f"{path} is damaged: {reason:.200}. {_what_else(path.parent)}") from None
    expected = {"step", "seed", "parameters", "optimizer", "ema", "random", "random_device"}
    if not isinstance(state, dict) or (missing := sorted(expected - state.keys())):
        what = f"a {type(state).__name__}" if not isinstance(state, dict) else f"no {', '.join(missing)}"
        raise TrainingError(f"{path} is no state of a training run: it holds {what}. {_what_else(path.parent)}")
    return state


def _what_else(folder: Path) -> str:
    """Return a sentence that names the newest whole checkpoint beside a damaged one."""
    others = sorted(path.parent for path in folder.parent.glob(f"step-*/{STATE}") if path.parent != folder)
    whole = [other for other in others if is_whole(other)]
    if not whole:
        return "There is no other whole checkpoint beside it."
    return f"The newest whole checkpoint beside it is {whole[-1]}; run: --resume {whole[-1]}"
