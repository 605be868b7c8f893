"""`--weights FOLDER|FILE` of a command: the components, size and training of a run of `diffsynth train`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth.cli.output import UserError
from diffsynth.errors import did_you_mean, shortened

if TYPE_CHECKING:
    from diffsynth.registry import ModelRecord
    from diffsynth.runtime.role import Role

_RECIPE, _STEP, _ARCHITECTURE = "diffsynth.recipe", "diffsynth.step", "diffsynth.architecture"


@dataclass(frozen=True)
class TrainedWeights:
    """The weights that a run of `diffsynth train` wrote.

    Args:
        components: role -> file or source: the trained ones, and those that the recipe names a file for.
        size: height and width of the training images, in pixels; empty if they are not known.
        steps: number of steps done.
        averaged: whether the weights are the averaged ones.
    """

    components: Mapping[str, str]
    size: Mapping[str, int] = field(default_factory=dict)
    steps: int | None = None
    averaged: bool = False

    def __str__(self) -> str:
        notes = [f"after {self.steps} steps"] if self.steps is not None else []
        notes += ["averaged"] if self.averaged else []
        size = [f"{self.size['height']}x{self.size['width']} pixels"] if self.size else []
        files = ", ".join(f"{role} {file}" for role, file in self.components.items())
        return f"weights: {files}" + (f" ({', '.join([*notes, *size])})" if notes or size else "")


def trained_weights(record: ModelRecord, path: Path) -> TrainedWeights:
    """Return the `TrainedWeights` of a file or folder of a run. Reads headers only.

    Args:
        record: of the model that the weights are for.
        path: a weight file; or the folder of a run, or of one of its checkpoints, `step-NNNNNNN`: of a run, the weights
            with the most steps are taken.

    Raises:
        UserError: nothing is there, or no weights of `diffsynth train`; weights for another pipeline.
        CheckpointError: a file is damaged.
    """
    files = _newest(path) if path.is_dir() else [path]
    if not path.exists():
        raise UserError(f"--weights {path}: there is no such file or folder")
    roles = _roles(record)
    notes = {file: _metadata(file) for file in files}
    components = {_role(file, notes[file], roles): str(file) for file in files}
    recipe = _recipe(next(iter(notes.values())))
    if recipe:
        _check_pipeline(record, path, recipe)
        components |= _other_components(recipe, roles, components)
    data = recipe.get("data") or {}
    size = {name: data[name] for name in ("height", "width") if isinstance(data.get(name), int)}
    steps = [int(one[_STEP]) for one in notes.values() if one.get(_STEP, "").isdigit()]
    return TrainedWeights(
        components,
        size if len(size) == 2 else {},
        max(steps) if steps else None,
        bool((recipe.get("ema") or {}).get("decay")),
    )


def _newest(folder: Path) -> list[Path]:
    """Return a list of the weight files of the checkpoint with the most steps in a folder: its own, or those of a
    subfolder `step-NNNNNNN`.
    """
    found = [
        files for each in (folder, *sorted(folder.glob("step-*"))) if (files := sorted(each.glob("*.safetensors")))
    ]
    if not found:
        raise UserError(
            f"--weights {folder}: the folder has no .safetensors files; expected that of a run of diffsynth train, "
            "or of one of its checkpoints"
        )
    return max(found, key=lambda files: (int(_metadata(files[0]).get(_STEP, "0") or 0), files[0].parent == folder))


def _metadata(file: Path) -> Mapping[str, str]:
    from diffsynth.core.loader.header import read_safetensors

    if file.suffix != ".safetensors":
        raise UserError(f"--weights {file}: expected a .safetensors file, or a folder")
    metadata = read_safetensors(file).metadata
    if _ARCHITECTURE not in metadata:
        raise UserError(
            f"--weights {file}: it does not say its architecture, so diffsynth train did not write it. Another file of "
            "a component: --component ROLE=FILE; a LoRA: --lora FILE"
        )
    return metadata


def _roles(record: ModelRecord) -> dict[str, Role]:
    from diffsynth.runtime.composition import compose
    from diffsynth.runtime.role import Role
    from diffsynth.spec import resolve

    return {name: role for name, role in compose(resolve(record.pipeline)).roles.items() if isinstance(role, Role)}


def _role(file: Path, metadata: Mapping[str, str], roles: Mapping[str, Role]) -> str:
    """Return the role of a file: its name if that is a role, else the only one that accepts its architecture."""
    from diffsynth import _discovery

    architecture = metadata[_ARCHITECTURE]
    known = [one.spec for one in _discovery.catalog().architectures]
    specs = [spec for spec in known if spec.name == architecture]
    fitting = [name for name, role in roles.items() if any(map(role.accepts, specs))]
    if file.stem in fitting or len(fitting) == 1:
        return file.stem if file.stem in fitting else fitting[0]
    if not fitting:
        near = did_you_mean(architecture, [spec.name for spec in known])
        raise UserError(f"--weights {file}: a {architecture}, and the model has no component of that kind{near}")
    raise UserError(f"--weights {file}: {shortened(fitting)} take a {architecture}; use --component ROLE={file}")


def _recipe(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        recipe = json.loads(metadata.get(_RECIPE, "{}"))
    except ValueError:
        return {}
    return recipe if isinstance(recipe, dict) else {}


def _check_pipeline(record: ModelRecord, path: Path, recipe: Mapping[str, Any]) -> None:
    from diffsynth import registry
    from diffsynth.errors import RegistryError

    trained_for = str(recipe.get("pipeline", ""))
    if trained_for and ":" not in trained_for:
        try:
            trained_for = registry.get(trained_for).pipeline
        except RegistryError:
            return  # a model that is not installed here; the architectures are checked nevertheless
    if trained_for and trained_for != record.pipeline:
        raise UserError(f"--weights {path}: trained for {trained_for}, and {record.name} is a {record.pipeline}")


def _other_components(
    recipe: Mapping[str, Any], roles: Mapping[str, Any], trained: Mapping[str, str]
) -> dict[str, str]:
    """Return a dict role -> file of the components that a recipe loads and does not train."""
    sections = recipe.get("components") or {}
    sources = {role: str(section.get("source") or "") for role, section in sections.items() if role in roles}
    found = {role: source for role, source in sources.items() if source and role not in trained}
    for role, source in found.items():
        if "://" not in source and not Path(source).exists():
            raise UserError(
                f"--weights: the recipe loads {role} from {source}, which is not there; give --component {role}=FILE"
            )
    return found
