"""Declarations that a plugin makes: frozen dataclasses of plain values. Imports no torch.

A *reference* names code by string, `"package.module:attribute"`, and is resolved on first use (`resolve`), so that
listing models imports none of them. A *source* names files by string (`parse_source`):

    "Tongyi-MAI/Z-Image-Turbo:transformer/*.safetensors"     files of a hub repository
    "package://diffsynth_zimage/nano/dit.safetensors"         a file that ships inside a wheel
    "any-scheme://..."                                         files that a plugin's `resolve_source` hook returns
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

API_VERSION = 2
"""Version of the plugin contract; a plugin states it as `DIFFSYNTH_API`."""


@dataclass(frozen=True, kw_only=True)
class TeaCacheSpec:
    """Coefficients of TeaCache (Liu et al. 2024, arXiv:2411.19108) for a model.

    Args:
        coefficients: of the polynomial from the signal's relative L1 change to the output's, highest power first.
        signal: tensor that is compared between steps: `"argument:NAME"`, an argument of the first repeated block, or
            `"module:NAME"`, the output of a submodule of that block.
    """

    coefficients: tuple[float, ...]
    signal: str


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model that users load by name.

    Args:
        name: last segment of the repository's name in lower case, `"z-image-turbo"`.
        hub_id: `"owner/repository"` on ModelScope and Hugging Face; None for a model that ships in a wheel, and for
            a second model in one repository.
        family: name of the model family, `"z-image"`.
        task: task name as on the hub, `"text-to-image"`.
        pipeline: reference to a `diffsynth.Pipeline` subclass.
        components: role -> source of its weights, in loading order.
        processors: role -> source of the folder of a tokenizer or processor.
        defaults: default call arguments that differ from the pipeline's, `{"num_inference_steps": 8}`.
        license: SPDX identifier, or the publisher's name of the license.
        paper: arXiv id or address; empty if there is none.
        description: one line for listings.
        tiny: role -> fields to change in its architecture's tiny config, so that the tiny components of this model
            fit each other (`diffsynth.testing.tiny_hub`); models that share a file must declare the same for it.
        tiny_processors: processor role -> reference to `f(folder)` that writes a tiny working processor; a tokenizer
            that is not listed becomes a byte-level one with Qwen3's chat template.
        tiny_inputs: reference to `f(size) -> dict` of the call arguments that the model needs beside a prompt, such as
            an image, for a result of `size`: those of "height", "width" (pixels) and "num_frames" that the pipeline
            takes. The conformance suite calls it; empty if the model needs none. See `diffsynth.testing.tiny_image`.
        tea_cache: published TeaCache coefficients; None if there are none.
        fps: frame rate in frames per second that the model was trained at; None for images, or if unpublished.
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
    tiny_inputs: str = ""
    tea_cache: TeaCacheSpec | None = None
    fps: float | None = None


@dataclass(frozen=True, kw_only=True)
class LoRASpelling:
    """The keys that a program gives the LoRAs of an architecture, for files that are written for it.

    Reading needs none of this: it knows the usual keys, and the module names of every declared layout.

    Args:
        name: name of the program, `"kohya"`.
        layout: name of the `CheckpointSpec` whose module names the program uses; empty for the architecture's own.
        prefix: text before every module name, `"lora_unet_"`.
        underscores: whether the dots of module names become underscores.
        down: end of the key of matrix A, which leads from a layer's inputs to the rank.
        up: end of the key of matrix B, which leads from the rank to the layer's outputs.
        alpha: end of the key of the number that is divided by the rank; empty for a program without it: the factor is
            then in matrix B.
        layers: patterns of the module names that the program knows, `"double_blocks.*"`; empty for all.
    """

    name: str
    layout: str = ""
    prefix: str = ""
    underscores: bool = False
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: str = ""
    layers: tuple[str, ...] = ()

    @classmethod
    def kohya(cls, prefix: str, *, name: str = "kohya", layout: str = "") -> LoRASpelling:
        """Return a `LoRASpelling` with the keys of kohya's sd-scripts, which other programs use, too: underscores,
        `lora_down`, `lora_up` and `alpha`.

        Args:
            prefix, name, layout: see `LoRASpelling`.
        """
        return cls(
            name=name,
            layout=layout,
            prefix=prefix,
            underscores=True,
            down="lora_down.weight",
            up="lora_up.weight",
            alpha="alpha",
        )


@dataclass(frozen=True, kw_only=True)
class ArchitectureSpec:
    """An `nn.Module` class, its config, and the function that infers the config from a file's shapes.

    Args:
        name: name that `recognize` returns and that a pipeline's role accepts, `"z_image_dit"`.
        module: reference to the class; built as `module(config)`. Empty with `not_runnable`.
        config: reference to a frozen dataclass of plain values (a light module).
        infer_config: reference to `f(shapes: Mapping[str, tuple[int, ...]]) -> config` over the architecture's *own*
            parameter names (a light module). It raises `ValueError` with a reason if a constant of the family does
            not hold; the file is then not recognised as this architecture.
        required: own parameter names that every variant has; `{n}` means every index from 0 to the largest in a file.
        tiny: reference to a config small enough for a test that keeps the family's constants.
        tiny_inputs: reference to `f(config, generator) -> dict` of forward() arguments for the tiny config.
        atomic: references to module classes that are moved as a whole, because they read parameters of a submodule
            without calling it.
        high_precision: name patterns of parameters that keep the file's dtype when weights are stored in a lower
            dtype (`"*.norm*"`).
        repeated_blocks: names of the lists (`ModuleList`s or `Sequential`s) whose items are blocks: a policy streams
            them one by one. The items of a list may have different classes, shapes and arguments.
        compiled_blocks: names of the lists whose items `compile_pipeline` compiles one by one. None is
            `repeated_blocks`; without any the module is compiled whole. `()` refuses to compile the module.
        cached_blocks: names of the lists whose items a step cache may skip: each item returns the tensors that it takes
            first, in the same shapes, and the next item takes them. None is `repeated_blocks`. `()` refuses step
            caches, as for a UNet, whose blocks also pass tensors to later blocks. In networks that a feature brings,
            such as ControlNets, nothing is skipped.
        accepted_as: names of other architectures: a pipeline's role that accepts one of them accepts this one, too. The
            module has their methods that the role names, and the config their fields that the pipeline reads.
        lora_targets: suffixes of the names of the linear layers that LoRAs usually change (`"to_q"`, `"ffn.0"`). A LoRA
            may change any linear layer; the conformance suite tests these.
        lora_spellings: how programs spell the keys of LoRAs, where that differs from the usual spellings in
            `diffsynth.core.lora.spelling`, or a name is missing there.
        widened_by_loras: names of linear layers to which a LoRA may add inputs, whose weights are zero before the LoRA,
            as those for control images; `infer_config` gives the config of the widened network. A LoRA with fewer
            inputs changes the first ones.
        not_runnable: what the files are, `"the transformer of X, which takes ..."`, for a network that can only be
            named so far; `module`, `tiny` and `tiny_inputs` are then empty, and `config` and `infer_config` may be. A
            file that a runnable architecture claims alike is taken by that one.
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
    compiled_blocks: tuple[str, ...] | None = None
    cached_blocks: tuple[str, ...] | None = None
    accepted_as: tuple[str, ...] = ()
    lora_targets: tuple[str, ...] = ()
    lora_spellings: tuple[LoRASpelling, ...] = ()
    widened_by_loras: tuple[str, ...] = ()
    not_runnable: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """One published layout of an architecture, and the files that have it.

    Args:
        name: unique within the plugin, `"z_image_dit"` or `"z_image_dit/diffusers"`.
        architecture: name of the `ArchitectureSpec` that the files hold weights of.
        rules: reference to a tuple of `diffsynth.core.loader.convert` rules; empty if the files use the architecture's
            own key names.
        signature: md5 of the layout (see `header.signature`); empty if no published file is known.
        layout: resource `"package:path"` of key -> shape, gzipped JSON; empty if there is none.
        files: sources known to have this layout.
        config: config fields that shapes do not determine; they replace those that `infer_config` returns.
        file_stem: beginning of the published file names if a source is a glob such as `transformer/*.safetensors`:
            "model", or "diffusion_pytorch_model".
        loras_only: whether only LoRAs have these names; no checkpoint is recognised or saved in the layout.
    """

    name: str
    architecture: str
    rules: str = ""
    signature: str = ""
    layout: str = ""
    files: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    file_stem: str = "model"
    loras_only: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerWrapperSpec:
    """Treatment of a layer class of another library by the VRAM engine.

    Args:
        layer: reference to the class; subclasses are included.
        atomic: move all weights of the layer together and do not split it into blocks. Needed for a layer that reads a
            parameter of a submodule without calling the submodule.
    """

    layer: str
    atomic: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """An attention backend.

    Args:
        name: unique among backends.
        backend: reference to an object with `refuses(call) -> str | None` and `__call__(call)`.
        priority: `auto` tries backends of higher priority first; torch's own backend has 0.
        workspace: reference to `f(call, device_type) -> int`, the bytes it allocates beside inputs and output, for
            memory plans; if empty, the object's method `workspace` is used, and without one the output's size.
    """

    name: str
    backend: str
    priority: int = 0
    workspace: str = ""


@dataclass(frozen=True, kw_only=True)
class SolverSpec:
    """A solver of the denoising loop, which users select by name (`solver="dpmpp_2m"`).

    Args:
        name: unique among solvers.
        solver: reference to `f(velocity, latents, sigmas, *, noise, on_step, progress) -> latents`; the arguments are
            those of `diffsynth.sampling.solver.euler`.
        evaluations_per_step: most calls of `velocity` in one step, at least 1.
        uses_noise: whether it calls `noise`, so that its result depends on more than the initial latents.
        paper: arXiv id or address; empty if there is none.
    """

    name: str
    solver: str
    evaluations_per_step: int = 1
    uses_noise: bool = False
    paper: str = ""


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """A quantization method of the weights of linear layers.

    Args:
        name: unique among plugins, "fp8_row".
        backend: reference to a function of the method's options, all with defaults, that returns a
            `diffsynth.core.quant.method.QuantMethod`.
        description: a few words for listings.
    """

    name: str
    backend: str
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """Training settings of a pipeline.

    Args:
        pipeline: reference to the pipeline class.
        trainable: roles that may be trained.
        lora_targets: role -> default suffixes of the names of layers to train a LoRA of.
        data: manifest column -> call argument of the pipeline (`{"image": "input_image", "prompt": "prompt"}`).
        schedule: reference to `f(num_steps) -> sigmas`; training samples indices of this table.
    """

    pipeline: str
    trainable: tuple[str, ...]
    lora_targets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=lambda: {"prompt": "prompt"})
    schedule: str = ""


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """A training objective (loss), which a recipe selects by name.

    Args:
        name: unique among objectives, as in `[objective] name = "flow_match"`.
        objective: reference to a class as `diffsynth_train.objectives.base` describes it.
    """

    name: str
    objective: str


@dataclass(frozen=True, kw_only=True)
class FeatureSpec:
    """A feature that a plugin adds to pipelines: to one class, to those of a family, or to every pipeline that has what
    the feature reads.

    Args:
        feature: reference to a `diffsynth.runtime.feature.Feature`.
        pipeline: reference to the pipeline class; subclasses are included.
        family: of the models whose pipelines get the feature, in place of `pipeline`. With neither, every pipeline
            whose units write what the feature's units read gets it.
    """

    feature: str
    pipeline: str = ""
    family: str = ""

    @property
    def is_for_all(self) -> bool:
        """Whether the feature is added to every pipeline that has what it reads."""
        return not self.pipeline and not self.family


@dataclass(frozen=True, kw_only=True)
class CommandSpec:
    """A command of the `diffsynth` program.

    Args:
        name: of the command, `diffsynth NAME`.
        command: reference to a `click.Command`.
        help: one line for `diffsynth --help`, so that the command's module is not imported for it.
    """

    name: str
    command: str
    help: str = ""


@dataclass(frozen=True, kw_only=True)
class WriterSpec:
    """A function that writes results to files whose names end in one suffix.

    Args:
        suffix: end of the file's name, with the dot: `".wav"`, `".nii.gz"`; unique among plugins, case is ignored. "/"
            is a folder.
        kind: what it writes: "image", "video", "audio", "tensors" or another name, as in `output_kind` of a pipeline
            class. A writer of the kind "tensors" can be used with every pipeline.
        writer: reference to `f(output, path, *, record, **settings)`, which writes one result and raises TypeError or
            ValueError, with the kind in the message, for an output that it cannot write.
        description: a few words for listings, "WAV, 16-bit PCM".
        also: other kinds that it writes, too.
        alpha: whether the format can hold transparency; asked for the kind "image".
    """

    suffix: str
    kind: str
    writer: str
    description: str = ""
    also: tuple[str, ...] = ()
    alpha: bool = True


@dataclass(frozen=True, kw_only=True)
class DoorSpec:
    """A folder of re-exporting modules that is added to the package `diffsynth.pipelines`.

    Args:
        name: unique among folders.
        folder: `"package:folder"`, whose modules become `diffsynth.pipelines.<module>`.
    """

    name: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class GuidanceSpec:
    """A guidance: a way to make one velocity of the predictions of several branches.

    Args:
        name: unique among guidances, without ':'; the text form of a call's argument `guidance` begins with it,
            `"apg:eta=0.5"`.
        guidance: reference to a subclass of `diffsynth.runtime.guidance.Guidance`.
        paper: arXiv id or address; empty if there is none.
    """

    name: str
    guidance: str
    paper: str = ""


@dataclass(frozen=True, kw_only=True)
class LoRASpec:
    """A published LoRA, or several alike, with which calls need other defaults than the model's: fewer steps, no
    guidance, another schedule.

    Args:
        name: unique within the plugin, "qwen-image-lightning-4-steps".
        pipeline: reference to the pipeline class whose calls get the defaults; subclasses are included.
        defaults: argument -> default of a call while the LoRA is loaded.
        files: sources `"owner/repository:pattern"` of its files. A file is known by its repository and its name in it.
        names: patterns of names of files, `"*-Lightning-4steps-*.safetensors"`, that are known in every folder. Case is
            ignored.
    """

    name: str
    pipeline: str
    defaults: Mapping[str, Any]
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


def resolve(reference: str) -> Any:
    """Import and return the object that a reference `"package.module:attribute"` names.

    Raises:
        ValueError: the reference has no colon.
        ImportError: the module cannot be imported, raises SystemExit or the like, or lacks the attribute; the message
            names the reference.
    """
    module_name, colon, attribute = reference.partition(":")
    if not colon:
        raise ValueError(f"reference {reference!r} has no ':'; expected 'package.module:attribute'")
    try:
        module = importlib.import_module(module_name)
    except Exception:
        raise
    except KeyboardInterrupt as error:  # of the user, for all that is known
        error.add_note(f"while {module_name!r} was imported, for the reference {reference!r}")
        raise
    except BaseException as error:  # SystemExit and others: a plugin's module must not end the host program
        raise ImportError(
            f"reference {reference!r}: module {module_name!r} ends the program when it is imported "
            f"({type(error).__name__}: {error}); do that inside a function only"
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
    """A parsed source string; exactly one of `scheme` and `model_id` is non-empty.

    Args:
        text: the whole string.
        scheme: text before `://`, "package".
        location: text after it.
        model_id: repository on the hub, "owner/repository".
        pattern: glob inside the repository.
    """

    text: str
    scheme: str = ""
    location: str = ""
    model_id: str = ""
    pattern: str = ""


@functools.lru_cache(1024)
def parse_source(text: str) -> Source:
    """Return a `Source` parsed from a text: "owner/repo:*.safetensors" gives `model_id` and `pattern`,
    "package://name/path" gives `scheme` and `location`.

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
