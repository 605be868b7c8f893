"""Defaults of a published model whose files are loaded without its name, by `from_pretrained`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffsynth import _discovery
from diffsynth.runtime.interface import PlannablePipeline
from diffsynth.runtime.request import LOOP_NAMES
from diffsynth.runtime.unit import equals_default
from diffsynth.spec import ModelSpec

_SIZES = ("height", "width", "num_frames")


def model_of_files(pipeline: type, files: Iterable[Path]) -> ModelSpec | None:
    """Return the `ModelSpec` of the model of a pipeline class that files belong to by their folders, those of a
    repository; None if there is none, or more than one.

    Args:
        pipeline: the class.
        files: of the networks that the loop calls.
    """
    reference, paths = f"{pipeline.__module__}:{pipeline.__qualname__}", list(files)
    specs = [declared.spec for declared in _discovery.catalog().models]
    found = [
        spec
        for spec in specs
        if spec.hub_id and spec.pipeline == reference and any(is_in_repository(spec.hub_id, path) for path in paths)
    ]
    return found[0] if len(found) == 1 else None


def other_defaults(pipe: PlannablePipeline, model: ModelSpec, read: Iterable[str]) -> Mapping[str, Any]:
    """Return a dict argument -> default of `model`, for those that have another default in the pipeline. Sizes and
    arguments of the loop are left out: they are a matter of taste and time.

    Args:
        pipe: the pipeline.
        model: the model whose files it has.
        read: the arguments of interest.
    """
    own = pipe.__signature__.parameters
    return {
        name: model.defaults[name]
        for name in read
        if name in model.defaults
        and name in own
        and name not in (*LOOP_NAMES, *_SIZES)
        and not equals_default(model.defaults[name], own[name].default)
    }


def is_in_repository(hub_id: str, path: Path) -> bool:
    """Whether a file lies in the folder of a repository of the hub, downloaded here or by huggingface_hub.

    Args:
        hub_id: "owner/repository".
        path: of the file.
    """
    text, cached = f"/{path.as_posix()}", f"/models--{hub_id.replace('/', '--')}/"
    return f"/{hub_id}/" in text or f"/{hub_id}@" in text or cached in text
