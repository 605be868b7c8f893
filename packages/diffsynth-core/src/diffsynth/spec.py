"""The facts a plugin declares: frozen, hashable where it helps, and free of torch.

Code is named by string, `"package.module:attribute"`, and resolved on first use (`resolve`), so that listing a
hundred models imports none of them. A *source* says where files are, also by string (`parse_source`):

    "Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors"     files of a hub repository
    "package://diffsynth_zimage/nano/dit.safetensors"         a file that ships inside a wheel
    "any-scheme://..."                                         whatever a plugin's `resolve_source` hook understands
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

API_VERSION = 1
"""What a plugin states as `DIFFSYNTH_API`."""


@dataclass(frozen=True, kw_only=True)
class TeaCacheSpec:
    """What TeaCache (Liu et al. 2024, arXiv:2411.19108) needs to know of a model: a polynomial, and of what.

    Args:
        coefficients: highest power first; from the signal's relative L1 change to the output's.
        signal: `"argument:NAME"`, an argument of the first repeated block, or `"module:NAME"`, what a submodule of it
            gives.
    """

    coefficients: tuple[float, ...]
    signal: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a user can name.

    Args:
        name: the repository's last segment in lower case, `"z-image-turbo"`.
        hub_id: `"owner/repository"` on ModelScope and Hugging Face; None for a model that ships in a wheel, and
            for a second one in a repository.
        family: the package's family name, `"z-image"`.
        task: the hub's task word, `"text-to-image"`.
        pipeline: reference to a `diffsynth.Pipeline` subclass.
        components: role -> source of its weights, in the order they are loaded.
        processors: role -> source of a tokenizer's or processor's folder.
        defaults: call arguments that this model wants and its pipeline does not, `{"num_inference_steps": 8}`.
        license: SPDX identifier, or the publisher's name for it.
        paper: arXiv id or address, if there is one.
        description: one line for listings.
        tiny: role -> fields changed on its architecture's tiny config, so that the tiny components of this model fit
            each other (`diffsynth.testing.tiny_hub`); models that share a file say the same of it.
        tiny_processors: processor role -> reference to `f(folder)` that writes a tiny one that works; a tokenizer that
            is left out becomes a byte-level one with Qwen3's chat template.
        tea_cache: published coefficients, if there are any.
        fps: frames per second that its videos show the world at, if it makes videos and its publisher says.
    """

    name: str
    family: str
    task: str
    pipeline: str
    components: Mapping[str, str]
    hub_id: str | None = None
    processors: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    license: str = "unknown"
    paper: str = ""
    description: str = ""
    tiny: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tiny_processors: Mapping[str, str] = field(default_factory=dict)
    tea_cache: TeaCacheSpec | None = None
    fps: float | None = None


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """An `nn.Module` class, its config, and how a file's shapes tell the config.

    Args:
        name: `"z_image_dit"`; what `recognize` answers and what a pipeline's role accepts.
        module: reference to the class; built as `module(config)`.
        config: reference to a frozen dataclass of plain values (a light module).
        infer_config: reference to `f(shapes: Mapping[str, tuple[int, ...]]) -> config` over the architecture's *own*
            parameter names (a light module). It raises `ValueError` with a reason when a family constant does not
            hold: that is how structure says no.
        required: own parameter names that every variant has; `{n}` stands for every index from 0 to the largest seen.
        tiny: reference to a config of the same kind, small enough for a test, that keeps the family's constants.
        tiny_inputs: reference to `f(config, generator) -> dict` of forward() arguments for the tiny config.
        atomic: references to classes whose parent reads their parameters without calling them; never wrapped inside.
        high_precision: name patterns of parameters that stay in the file's dtype when storage is lowered (`"*.norm*"`).
        repeated_blocks: names of the `ModuleList`s that stream and compile block by block.
        lora_targets: linear layers that a LoRA usually changes, by how their names end (`"to_q"`, `"ffn.0"`). Any
            linear layer may be changed; the conformance suite holds these to it.
    """

    name: str
    module: str
    config: str
    infer_config: str
    required: tuple[str, ...]
    tiny: str
    tiny_inputs: str
    atomic: tuple[str, ...] = ()
    high_precision: tuple[str, ...] = ()
    repeated_blocks: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """One published layout of an architecture, and the files that have it.

    Args:
        name: unique within the plugin, `"z_image_dit"` or `"z_image_dit/diffusers"`.
        architecture: name of the `ArchitectureSpec` it fills.
        rules: reference to a tuple of `diffsynth.core.loader.convert` rules; empty means: own names, the plan is the
            identity.
        signature: md5 identity of the layout (see `header.signature`); empty for a layout that no file proves.
        layout: resource `"package:path"` of key -> shape, gzipped JSON; empty if there is none.
        files: sources known to have this layout.
        config: fields that shapes cannot tell, given to the config over what `infer_config` says.
        file_stem: how the published files begin where a source leaves it open, as `transformer/*.safetensors` does:
            "model", or "diffusion_pytorch_model".
    """

    name: str
    architecture: str
    rules: str = ""
    signature: str = ""
    layout: str = ""
    files: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    file_stem: str = "model"


@dataclass(frozen=True, kw_only=True)
class LayerWrapperSpec:
    """How the VRAM engine treats a layer class of another library.

    Args:
        layer: reference to the class, and so to those derived from it.
        atomic: its weights are all on the device whenever it runs: it is never cut. For a layer that reads a parameter
            of a part of it without calling that part.
    """

    layer: str
    atomic: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """An attention backend.

    Args:
        name: unique among backends.
        backend: reference to an object with `refuses(call) -> str | None` and `__call__(call)`.
        priority: `auto` tries higher ones first; torch's own has 0.
        workspace: reference to `f(call, device_type) -> int`, bytes that it takes beside inputs and output, for plans;
            empty asks the object's own `workspace`, and without one as much as the output is assumed.
    """

    name: str
    backend: str
    priority: int = 0
    workspace: str = ""


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """A quantization backend by reference; the contract stands in `diffsynth.core.quant`."""

    name: str
    backend: str


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """How a pipeline is trained.

    Args:
        pipeline: reference to the pipeline class.
        trainable: roles that may be trained.
        lora_targets: default module name suffixes for LoRA, by role.
        data: manifest column -> call argument of the pipeline (`{"image": "input_image", "prompt": "prompt"}`).
        schedule: reference to `f(num_steps) -> sigmas`, the table that training draws its indices from.
    """

    pipeline: str
    trainable: tuple[str, ...]
    lora_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=lambda: {"prompt": "prompt"})
    schedule: str = ""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """A training objective by reference; `objective` names a class that `diffsynth_train` documents."""

    name: str
    objective: str


@dataclass(frozen=True, kw_only=True)
class UnitSpec:
    """A unit that this plugin adds to somebody's pipeline.

    Args:
        pipeline: reference to the pipeline class it joins (subclasses included).
        unit: reference to the unit.
        after: name of the unit it runs after; empty means last, before the loop.
    """

    pipeline: str
    unit: str
    after: str = ""


@dataclass(frozen=True, kw_only=True)
class CommandSpec:
    """A command of the `diffsynth` program: `command` names a `click.Command`."""

    name: str
    command: str
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class DoorSpec:
    """A folder of re-export modules that joins `diffsynth.pipelines`, `package:folder`."""

    name: str
    folder: str


def resolve(reference: str) -> Any:
    """The object that `"package.module:attribute"` names.

    Raises:
        ValueError: the reference has no colon.
        ImportError: the module cannot be imported, ends the program, or lacks the attribute; the message names the
            reference.
    """
    module_name, colon, attribute = reference.partition(":")
    if not colon:
        raise ValueError(f"reference {reference!r} has no ':'; expected 'package.module:attribute'")
    try:
        module = importlib.import_module(module_name)
    except SystemExit as error:  # a module of a plugin does not end its host
        raise ImportError(
            f"reference {reference!r}: module {module_name!r} ends the program when it is imported "
            f"(SystemExit: {error.code}); leave that to a function"
        ) from error
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise ImportError(f"reference {reference!r}: module {module_name!r} has no {attribute!r}") from None
    return value


@dataclass(frozen=True)
class Source:
    """A parsed source string; exactly one of `scheme` and `model_id` is non-empty."""

    text: str
    scheme: str = ""
    location: str = ""
    model_id: str = ""
    pattern: str = ""


def parse_source(text: str) -> Source:
    """Split a source string (see the module's docstring).

    Raises:
        ValueError: neither `scheme://...` nor `owner/repository:pattern`.
    """
    scheme, separator, location = text.partition("://")
    if separator:
        return Source(text, scheme=scheme, location=location)
    model_id, colon, pattern = text.partition(":")
    if not colon or model_id.count("/") != 1:
        raise ValueError(f"source {text!r}: expected 'owner/repository:pattern' or 'scheme://location'")
    return Source(text, model_id=model_id, pattern=pattern)
