"""Hash the results of whole calls of every registered model, so that a refactoring can show that no number changed.

    uv run --all-packages tools/fingerprint.py --write tools/fingerprint.json     before the refactoring
    uv run --all-packages tools/fingerprint.py --check tools/fingerprint.json     after each part of it
    uv run --all-packages tools/fingerprint.py --only 'z-image/*cold*'            some cases, printed

Models are those of the tiny hub, in fp32 on one thread of the CPU; a case is one call. `NAME/steps` is the sha256 of
the latents after each step, with the branches that a step cache left out, and `NAME/output` that of what the call
returns: latents, a tensor of pixels, or images. A case is named by its model, its inputs, and what differs from the
base case: no policy, guidance in two calls, no window, no LoRA, no step cache, fp32, latents.

* z-image and wan2.1-t2v-1.3b: all combinations of policy, guidance, sliding window, LoRA and step cache that a pipeline
  takes.
* The other models: one of them at a time, each kind of input, bf16, decoded results, and two combined cases.
* Models with the tiny network of another one and other weights (`SAME_NETWORKS`): their inputs, and one combined case.
* Z-Image and Wan: batches, tiles, a `vram_limit`, and pipelines put together by `from_pretrained`.
* Training: gradients, losses and weights of two steps of `diffsynth_train`, by flow matching and by reconstruction, and
  gradients of Wan's velocity. Names of parameters are not part of the hash, so that they may change.

Combinations that a pipeline refuses by design are left out: a cold LoRA on weights on disk or in 8 bits, a step cache
with a sliding window, TeaCache without coefficients, `cfg_merge` where branches differ by more than tensors.

Hashes depend on torch, on the CPU's instructions and on the platform; these are recorded with them. `--check` compares
them first and says so when they differ: then write a file of the commit before the refactoring on the same machine, and
check against that. It exits with 1 and names the cases whose hash differs, that are missing, or that are new. A change
of numerics that is meant goes with a new file.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib
import importlib.resources
import itertools
import json
import logging
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ["DIFFSYNTH_SKIP_DOWNLOAD"] = "true"

import torch
from PIL import Image
from safetensors import safe_open

import diffsynth
from diffsynth import ModelConfig, registry
from diffsynth.testing import tiny_hub

POLICIES = ("none", "cpu-offload", "fp8", "dynamic", "disk")
GUIDANCES = {
    "guided": {"cfg_scale": 3.0},
    "unguided": {"cfg_scale": 1.0},
    "merged": {"cfg_scale": 3.0, "cfg_merge": True},
}
WINDOWS = {"whole": {}, "windows": {"sliding_window_size": 2, "sliding_window_stride": 1}}
LORAS = ("no-lora", "hot", "cold")
CACHES = {
    "no-cache": {},
    "first_block": {"step_cache": "first_block:threshold=100,max_reused=1"},
    "taylor": {"step_cache": "taylor:interval=2"},
    "tea": {"step_cache": "tea:threshold=0.3"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OUTPUTS = ("latents", "tensor", "pil")
FROZEN_WEIGHTS = ("disk", "fp8")
"""Policies under which a LoRA cannot be added to the weights."""

PRODUCT = ("z-image", "wan2.1-t2v-1.3b")
"""Models with all combinations."""

GRADIENT = Image.linear_gradient("L").resize((48, 32))
SAME_NETWORKS = re.compile(
    r"wan2.1-(t2v-14b|i2v-14b-720p|vace-14b|fun-14b-.*|fun-v1.1-14b-.*|fun-v1.1-1.3b-inp)|vace-.*-preview|.*-distilled"
    r"|flux.1-(krea|canny)-dev|flux.2-klein-(base-4b|9b|base-9b)"
)
"""Models with fewer cases, because another model has the same networks in miniature."""

IMAGE = Image.merge("RGB", (GRADIENT, GRADIENT.rotate(90), GRADIENT.rotate(45)))
CLIP = [IMAGE.rotate(9 * turn) for turn in range(9)]
MASKS = [GRADIENT.rotate(30 * turn).convert("RGB") for turn in range(9)]
STEPS = {"num_inference_steps": 4, "seed": 3, "progress_bar_cmd": lambda steps: steps}
TEXT = {"prompt": "a red puppy", "negative_prompt": "blurred", **STEPS}
SIZES = {
    "z-image": {"height": 48, "width": 64},
    "wan": {"height": 32, "width": 48, "num_frames": 9},
    "flux-1": {"height": 48, "width": 64},
    "flux-2": {"height": 48, "width": 64},
}
"""By family."""

CAMERA = {"camera_control_direction": "LeftUp", "camera_control_speed": 0.1, "input_image": IMAGE}
FACES = {"animate_pose_video": CLIP, "animate_face_video": CLIP[::-1], "input_image": IMAGE}
DANCE = {"animate2_reference_image": IMAGE, "animate2_reference_video": CLIP, "animate2_prompt_ref": "a dance"}
START = {"input_image": IMAGE.resize((64, 48)), "denoising_strength": 0.7}
EDIT = {"edit_image": [IMAGE, CLIP[5]], "edit_image_auto_resize": False}
Inputs = Mapping[str, Mapping[str, Any]]
INPUTS: tuple[tuple[str, Inputs], ...] = (
    ("z-image.*", {"text": {}, "image": START}),
    ("flux.1-fill.*", {"fill": {"flux_fill_image": IMAGE, "flux_fill_mask": GRADIENT}}),
    ("flux.1-(depth|canny).*", {"control": {"control_image": IMAGE}}),
    ("flux.1-kontext.*", {"references": {"kontext_images": [IMAGE, CLIP[5]]}, "text": {}}),
    ("flux.1-redux.*", {"variation": {"flux_redux_image": IMAGE}, "text": {}}),
    ("flux.1.*", {"text": {}, "image": START, "inpaint": {**START, "inpaint_mask": GRADIENT}}),
    (
        "flux.2.*",
        {
            "text": {},
            "image": START,
            "inpaint": {**START, "inpaint_mask": GRADIENT},
            "edit": EDIT,
            "cached": {**EDIT, "edit_image_kv_cache": True},
        },
    ),
    (".*flf2v.*", {"ends": {"input_image": IMAGE, "end_image": CLIP[5]}}),
    (".*-inp", {"image": {"input_image": IMAGE}, "ends": {"input_image": IMAGE, "end_image": CLIP[5]}}),
    (".*-i2v-.*", {"image": {"input_image": IMAGE}}),
    (".*-camera", {"camera": CAMERA, "rest": {"input_image": IMAGE}}),
    (
        ".*(v1.1|2.2).*-control",
        {"reference": {"control_video": CLIP, "reference_image": IMAGE}, "control": {"control_video": CLIP}},
    ),
    (".*-control", {"control": {"control_video": CLIP}, "image": {"control_video": CLIP, "input_image": IMAGE}}),
    (
        ".*vace.*",
        {
            "masked": {"vace_video": CLIP, "vace_video_mask": MASKS, "vace_reference_image": IMAGE},
            "control": {"vace_video": CLIP, "vace_scale": 0.5},
            "text": {},
        },
    ),
    (".*speedcontrol.*", {"speed": {"motion_bucket_id": 70}, "text": {}}),
    (".*-ti2v-.*", {"image": {"input_image": IMAGE, "width": 64}, "text": {"width": 64}}),
    (
        ".*animate-2.*",
        {"dance": DANCE, "next": {**DANCE, "animate2_refert_images": CLIP[-1:], "animate2_log_scale": -1.3}},
    ),
    (".*animate.*", {"pose": FACES, "scene": {**FACES, "animate_inpaint_video": CLIP, "animate_mask_video": MASKS}}),
    (".*", {"text": {}, "video": {"input_video": CLIP, "denoising_strength": 0.7}}),
)
"""Pattern of a model's name -> what it can be given; the first pattern counts, and the first inputs are the base."""

EXTRA = {
    "batch": {"prompt": ["a red puppy", "a cat"], "num_images": 2},
    "tiles": {"tiled": True, "tile_size": (4, 4), "tile_stride": (2, 2)},
    "other-seed": {"seed": 8, "sigma_shift": 2.0, "num_inference_steps": 3},
}
"""Arguments of further cases of `PRODUCT`."""

OWN = (
    (".*a14b.*/.*taylor.*", {"step_cache": "taylor:interval=2,warmup_steps=1"}),
    (".*-i2v-14b-.*/.*tea.*", {"step_cache": "tea:threshold=1e9"}),
    (".*animate-14b/.*windows.*", {"sliding_window_size": 1}),
)
"""Pattern of a case's name -> arguments without which its cache leaves nothing out, or one window is all of it."""

DOORS = {
    "z-image": ("diffsynth.pipelines.z_image", "ZImagePipeline"),
    "wan": ("diffsynth.pipelines.wan_video", "WanVideoPipeline"),
}
LORA_KEYS = re.compile(
    r"(?:blocks|layers)\.\d+\.(?:block\.)?(?:self_attn\.[qo]|attention\.to_q|attention\.to_out\.0|feed_forward\.w1|ffn\.0)\.weight"
    r"|double_blocks\.\d+\.img_(?:attn\.(?:qkv|proj)|mlp\.0)\.weight|single_blocks\.\d+\.linear[12]\.weight"
    r"|transformer_blocks\.\d+\.(?:attn\.(?:to_q|to_out\.0)|ff\.linear_in)\.weight"
    r"|single_transformer_blocks\.\d+\.attn\.(?:to_qkv_mlp_proj|to_out)\.weight"
)
"""Published names of the weights that LoRAs change here."""


@dataclass(frozen=True)
class Case:
    """One call. `inputs` are names of `INPUTS` or `EXTRA`; `door` says how the pipeline is loaded."""

    model: str
    inputs: str
    policy: str = "none"
    guidance: str = "guided"
    window: str = "whole"
    lora: str = "no-lora"
    cache: str = "no-cache"
    dtype: str = "fp32"
    output: str = "latents"
    door: str = "load"

    @property
    def name(self) -> str:
        """Model, inputs, and what is not as usual."""
        changed = [
            getattr(self, field.name)
            for field in fields(self)[2:]
            if field.name != "output" and getattr(self, field.name) != field.default
        ]
        return f"{self.model}/{self.inputs}/{'+'.join(changed) or 'base'}/{self.output}"

    @property
    def pipeline(self) -> tuple[str, ...]:
        """The fields that two cases share if they use one pipeline."""
        return (self.model, self.policy, self.dtype, self.door)


def cases() -> list[Case]:
    """All cases; those of one pipeline stand together, those with cold LoRAs last."""
    found: dict[Case, None] = {}
    for record in registry.list():
        found |= dict.fromkeys(one_at_a_time(record))
        if record.name in PRODUCT:
            found |= dict.fromkeys([*combinations(record), *extras(record)])
    possible = [case for case in found if is_possible(case)]
    return sorted(possible, key=lambda case: (case.pipeline, LORAS.index(case.lora)))


def is_possible(case: Case) -> bool:
    """Whether the documentation says that such a call is taken."""
    is_wan = registry.get(case.model).family == "wan"
    if not is_wan and (case.guidance == "merged" or case.window != "whole"):
        return False
    if case.window != "whole" and case.cache != "no-cache":
        return False
    return case.lora != "cold" or case.policy not in FROZEN_WEIGHTS


def one_at_a_time(record: registry.ModelRecord) -> Iterator[Case]:
    """The base case, what differs from it in one thing, and two combinations."""
    names = list(inputs_of(record))
    base = Case(record.name, names[0])
    for name in names:
        yield replace(base, inputs=name)
    yield replace(base, policy="disk", lora="hot", cache="first_block", output="tensor")
    yield replace(base, cache="tea")
    if SAME_NETWORKS.fullmatch(record.name):
        return
    yield from (replace(base, output=output) for output in OUTPUTS)
    yield from (replace(base, policy=policy) for policy in POLICIES)
    yield from (replace(base, guidance=guidance) for guidance in GUIDANCES)
    yield from (replace(base, window=window) for window in WINDOWS)
    yield from (replace(base, lora=lora) for lora in LORAS)
    yield from (replace(base, cache=cache) for cache in CACHES)
    yield replace(base, dtype="bf16")
    yield replace(base, policy="fp8", lora="hot", cache="taylor", guidance="unguided")


def combinations(record: registry.ModelRecord) -> Iterator[Case]:
    """All of them; pixels are drawn where neither a LoRA nor a cache adds to what the latents say."""
    name = next(iter(inputs_of(record)))
    for policy, guidance, window, lora, cache in itertools.product(POLICIES, GUIDANCES, WINDOWS, LORAS, CACHES):
        case = Case(record.name, name, policy, guidance, window, lora, cache)
        yield replace(case, output="tensor") if (lora, cache) == ("no-lora", "no-cache") else case


def extras(record: registry.ModelRecord) -> Iterator[Case]:
    """Other inputs under policies, batches, tiles, bf16 pixels, and other ways to load."""
    base, *others = inputs_of(record)
    for name, policy in itertools.product([*others, *EXTRA], ("none", "fp8", "disk")):
        yield Case(record.name, name, policy, output="tensor")
    for name, lora in itertools.product(others, LORAS):
        yield Case(record.name, name, lora=lora, cache="first_block")
    yield Case(record.name, base, dtype="bf16", policy="fp8")
    yield Case(record.name, base, dtype="bf16", policy="disk", lora="hot", cache="taylor")
    yield Case(record.name, "batch", dtype="bf16", guidance="unguided")
    for door in ("preset", "limit", "files", "keys"):
        yield Case(record.name, base, door=door)


def inputs_of(record: registry.ModelRecord) -> Inputs:
    """The inputs that a model can be given, by name."""
    return next(inputs for pattern, inputs in INPUTS if re.fullmatch(pattern, record.name))


def arguments_of(case: Case) -> dict[str, Any]:
    """All of a call but what listens to it."""
    record = registry.get(case.model)
    known = {**inputs_of(record), **EXTRA}
    given = TEXT | SIZES[record.family] | dict(known[case.inputs]) | {"output_type": case.output}
    if case.dtype == "bf16" and case.cache == "no-cache":
        given["num_inference_steps"] = 2  # slow on many CPUs
    given |= GUIDANCES[case.guidance] | WINDOWS[case.window] | CACHES[case.cache]
    for pattern, own in OWN:
        if re.fullmatch(pattern, case.name):
            given |= own
    return given


def load(case: Case, hub: Path) -> diffsynth.Pipeline:
    """The pipeline of a case, without LoRAs."""
    place = {"device": "cpu", "torch_dtype": DTYPES[case.dtype]}
    if case.door in ("files", "keys"):
        return load_by_files(case, hub, place)
    if case.door == "limit":
        place["vram_limit"] = 1.0
    policy = None if case.policy == "none" and case.door != "preset" else case.policy
    return diffsynth.load(case.model, policy=policy, base_path=hub, **place)


def load_by_files(case: Case, hub: Path, place: Mapping[str, Any]) -> diffsynth.Pipeline:
    """As scripts for DiffSynth-Studio do it; `keys` gives each file a policy of its own."""
    record = registry.get(case.model)
    module, name = DOORS[record.family]
    keys: dict[str, Any] = {}
    if case.door == "keys":
        keys = {"offload_dtype": "disk", "offload_device": "disk"}
        keys |= {f"{state}_device": "cpu" for state in ("onload", "preparing", "computation")}
        keys |= {f"{state}_dtype": torch.float8_e4m3fn for state in ("onload", "preparing")}
        keys["computation_dtype"] = DTYPES[case.dtype]
    sources = dict.fromkeys(record.components.values())
    configs = [model_config(source, hub, **keys) for source in sources]
    processors = {f"{role}_config": model_config(source, hub) for role, source in record.processors.items()}
    return getattr(importlib.import_module(module), name).from_pretrained(model_configs=configs, **place, **processors)


def model_config(source: str, hub: Path, **more: Any) -> ModelConfig:
    """A source of a record as a script spells it."""
    repository, _, pattern = source.partition(":")
    return ModelConfig(model_id=repository, origin_file_pattern=pattern, local_model_path=str(hub), **more)


def add_lora(pipe: diffsynth.Pipeline, case: Case, hub: Path) -> None:
    """Add a random LoRA to each network of the loop."""
    for role in ("dit", "dit2"):
        source = registry.get(case.model).components.get(role)
        if source is not None:
            network = getattr(pipe, role)
            lora = random_lora(files_of(source, hub))
            pipe.load_lora(network, state_dict=lora, hotload=case.lora == "hot", alpha=0.7, verbose=0)


def files_of(source: str, hub: Path) -> list[Path]:
    """The files of a component."""
    if source.startswith("package://"):
        package, _, path = source.removeprefix("package://").partition("/")
        return [Path(str(importlib.resources.files(package))) / path]
    repository, _, pattern = source.partition(":")
    return sorted((hub / repository).glob(pattern))


def random_lora(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """Matrices of rank 2 for published names; each layer has a seed of its own."""
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in filter(LORA_KEYS.fullmatch, opened.keys()):
                outputs, inputs = opened.get_slice(key).get_shape()
                seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
                generator, name = torch.Generator().manual_seed(seed), key.removesuffix(".weight")
                weights[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) / inputs**0.5
                weights[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) / 2
    if not weights:
        raise ValueError(f"no file of {[file.name for file in files]} has a weight that a LoRA here changes")
    return weights


class Hash:
    """A sha256 of values; of a tensor its dtype, shape and bytes count."""

    def __init__(self, value: Any = None) -> None:
        self._hash = hashlib.sha256()
        self.add(value)

    def add(self, value: Any) -> None:
        """Take in a tensor, an image, a list of either, or something whose `repr` says all."""
        if isinstance(value, torch.Tensor):
            plain = value.detach().contiguous()
            self._hash.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
            self._hash.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Image.Image):
            self._hash.update(f"{value.mode} {value.size}".encode() + value.tobytes())
        elif isinstance(value, list):
            self._hash.update(f"list {len(value)}".encode())
            for each in value:
                self.add(each)
        elif value is not None:
            self._hash.update(repr(value).encode())

    def hexdigest(self) -> str:
        """Return the hash of all added values."""
        return self._hash.hexdigest()


def of_call(pipe: diffsynth.Pipeline, case: Case) -> dict[str, str]:
    """The hashes of a call, none if the pipeline refuses it."""
    arguments, steps = arguments_of(case), Hash()

    def on_step(step: Any) -> None:
        for value in (step.index, step.num_steps, step.sigma, step.sigma_next, step.reused, step.latents):
            steps.add(value)

    try:
        pipe.check(**arguments)
    except (ValueError, diffsynth.errors.Refused):
        return {}
    output = Hash(pipe(**arguments, on_step=on_step))
    return {f"{case.name}/steps": steps.hexdigest(), f"{case.name}/output": output.hexdigest()}


def of_calls(chosen: Iterable[Case], hub: Path) -> dict[str, str]:
    """The hashes of cases; each pipeline is loaded once, and LoRAs come in the order of `LORAS`."""
    found: dict[str, str] = {}
    for key, group in itertools.groupby(chosen, key=lambda case: case.pipeline):
        started, pipe, lora = time.perf_counter(), None, LORAS[0]
        for case in group:
            try:
                pipe = pipe or load(case, hub)
                if case.lora != lora:
                    pipe.clear_lora()
                    add_lora(pipe, case, hub)
                    lora = case.lora
                found |= of_call(pipe, case)
            except Exception as error:
                found[case.name] = f"error: {type(error).__name__}"
                print(f"{case.name}: {type(error).__name__}: {error}", file=sys.stderr)
        print(f"{time.perf_counter() - started:6.1f} s  {' '.join(key)}", file=sys.stderr)
    return found


VAE = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_groups": 8}
NANO = "package://diffsynth_zimage/nano"
NANO_PARTS = {role: {"source": f"{NANO}/{role}.safetensors"} for role in ("dit", "text_encoder", "vae")}
LEARNING_NANO = NANO_PARTS | {"dit": {"source": f"{NANO}/dit.safetensors", "train": True}}
TRAININGS: dict[str, dict[str, Any]] = {
    "flow_match": {"components": LEARNING_NANO},
    "flow_match-bf16": {"components": LEARNING_NANO, "loop": {"precision": "bf16"}, "optimizer": {"name": "muon"}},
    "flow_match-recomputed": {"components": LEARNING_NANO, "loop": {"gradient_checkpointing": True, "micro_batch": 1}},
    "reconstruction": {
        "components": {"vae": {"architecture": "flux_autoencoder", "train": True, "config": VAE}},
        "objective": {"name": "reconstruction", "crop": 16, "noise": 0.05},
    },
}
"""Case -> changes to the training recipe."""


def recipe_of(changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recipe as the TOML file of it says it."""
    return {
        "pipeline": "z-image-nano",
        "seed": 1,
        "objective": {"name": "flow_match"},
        "processors": {"tokenizer": str(files_of(f"{NANO}/tokenizer", folder)[0])},
        "data": {"manifest": str(folder / "metadata.json"), "height": 16, "width": 32},
        "output": {"folder": str(folder / "output")},
        **changes,
        "optimizer": {"learning_rate": 1e-3, "clip": 0.0, **changes.get("optimizer", {})},
        "loop": {"steps": 2, "batch_size": 2, "precision": "fp32", **changes.get("loop", {})},
    }


def of_training(name: str) -> dict[str, str]:
    """The hashes of two steps of a recipe: gradients, losses, weights."""
    from diffsynth_train.config import Recipe, parse_section
    from diffsynth_train.loop import TrainingRun

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [{"image": f"{number}.png", "prompt": f"puppy {number}"} for number in range(3)]
        for number, row in enumerate(rows):
            CLIP[3 * number].save(folder / row["image"])
        (folder / "metadata.json").write_text(json.dumps(rows), encoding="utf-8")
        run = TrainingRun(parse_section(Recipe, recipe_of(TRAININGS[name], folder), where=""))
        gradients, losses = Hash(), Hash()
        for step in range(2):
            losses.add(float(run.step(step)["loss"]))
            gradients.add(of_all(parameter.grad for _, parameter in run.parameters))
        weights = Hash(of_all(parameter for _, parameter in run.parameters))
    parts = {"gradients": gradients, "losses": losses, "weights": weights}
    return {f"train/{name}/{part}": digest.hexdigest() for part, digest in parts.items()}


def of_velocity(model: str, hub: Path) -> dict[str, str]:
    """The hash of the gradients of all weights of a network, of the square of its velocity."""
    pipe = diffsynth.load(model, device="cpu", torch_dtype=torch.float32, base_path=hub)
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 16, 2, 4, 6, generator=generator)
    prompt = torch.randn(1, 7, 64, generator=generator)  # the width of the tiny text encoder
    pipe.dit.requires_grad_(True)
    with torch.enable_grad():
        pipe.velocity(latents, torch.tensor([0.7]), prompt_embeds=prompt).square().mean().backward()
    gradients = of_all(parameter.grad for parameter in pipe.dit.parameters())
    return {f"train/velocity-{model}/gradients": Hash(gradients).hexdigest()}


def of_all(tensors: Iterable[torch.Tensor | None]) -> list[str]:
    """A hash for each tensor, in an order that depends on nothing else."""
    return sorted(Hash(tensor).hexdigest() for tensor in tensors)


def environment() -> dict[str, str]:
    """Return the facts besides the code that hashes depend on."""
    return {
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def fingerprint(pattern: str) -> dict[str, str]:
    """The hashes of the cases whose names match, with `/steps` and `/output` left out."""
    trainings = [name for name in TRAININGS if matches(f"train/{name}", pattern)]
    velocity = PRODUCT[1] if matches(f"train/velocity-{PRODUCT[1]}", pattern) else ""
    chosen = [case for case in cases() if matches(case.name, pattern)]
    found: dict[str, str] = {}
    for name in trainings:
        found |= of_training(name)
    with tempfile.TemporaryDirectory() as place:
        hub = Path(place) / "hub"
        models = sorted({case.model for case in chosen} | ({velocity} if velocity else set()))
        if models:
            tiny_hub(hub, models)
        if velocity:
            found |= of_velocity(velocity, hub)
        return found | of_calls(chosen, hub)


def matches(name: str, pattern: str) -> bool:
    """Whether a glob, or a part of the name, says this one."""
    return fnmatch.fnmatchcase(name, pattern) or pattern in name


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """A line for each case that is not as before."""
    lines = [f"differs: {name}" for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    lines += [f"missing: {name}" for name in sorted(before.keys() - now.keys())]
    return lines + [f"new: {name}" for name in sorted(now.keys() - before.keys())]


def check(file: Path, pattern: str, now: Mapping[str, str]) -> int:
    """Compare with a file; 1 if a case is not as there."""
    known = json.loads(file.read_text(encoding="utf-8"))
    for name, value in environment().items():
        if known["environment"].get(name) != value:
            print(f"{name} is {value}, the file is of {known['environment'].get(name)}: hashes may differ for that")
    expected = {name: digest for name, digest in known["cases"].items() if matches(name.rpartition("/")[0], pattern)}
    lines = differences(expected, now)
    print("\n".join([*lines, f"{len(lines)} of {len(expected)} hashes are not as in {file.name}"]))
    return int(bool(lines))


def main() -> int:
    """1 if a case is not as in the file, or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases with this glob or text in their name")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with a file")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a file; without --check and --write, print")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    started = time.perf_counter()
    found = fingerprint(options.only)
    print(f"{len(found)} hashes in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    text = json.dumps({"environment": environment(), "cases": found}, indent=1, sort_keys=True) + "\n"
    failed = any(digest.startswith("error") for digest in found.values())
    if options.write and not failed:
        options.write.write_text(text, encoding="utf-8")
    if options.check:
        return check(options.check, options.only, found) or int(failed)
    if not options.write:
        print(text, end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
