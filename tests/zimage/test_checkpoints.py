"""Specs of Z-Image and of the shared networks match the published files."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from importlib.resources import files

import pytest
import torch
from torch import Tensor

from diffsynth import ModelConfig
from diffsynth.core.loader import component, recognize
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.errors import CorruptFile
from diffsynth.models import checkpoints as core_checkpoints
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, parse_source, resolve
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage import checkpoints as zimage

ARCHITECTURES = {
    spec.name: spec
    for spec in (*zimage.ARCHITECTURES, core_checkpoints.FLUX_AUTOENCODER, core_checkpoints.QWEN3_TEXT_ENCODER)
}
CHECKPOINTS = {
    spec.name: spec
    for spec in (*zimage.CHECKPOINTS, *core_checkpoints.CHECKPOINTS)
    if spec.architecture in ARCHITECTURES  # video autoencoders are tested in tests/models
}
WITH_LAYOUT = [name for name, spec in CHECKPOINTS.items() if spec.layout]
OWN_NAMES = [name for name, spec in CHECKPOINTS.items() if not spec.rules]


def read_layout(checkpoint: CheckpointSpec) -> dict[str, tuple[int, ...]]:
    package, _, path = checkpoint.layout.partition(":")
    packed = files(package).joinpath(path).read_bytes()
    return {name: tuple(shape) for name, shape in json.loads(gzip.decompress(packed))["tensors"].items()}


def has(required: str, names: set[str]) -> bool:
    pattern = re.compile(re.escape(required).replace(r"\{n\}", r"\d+"))
    return any(pattern.fullmatch(name) for name in names)


def tensors_of(value: object) -> Iterator[Tensor]:
    """Yield the tensors in the output of a network."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(inner)


@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_signature_is_that_of_the_layout(name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    facts = [(key, f"{key}:{'_'.join(map(str, shape))}") for key, shape in read_layout(checkpoint).items()]
    text = ",".join(sorted(fact for pair in facts for fact in pair))
    assert hashlib.md5(text.encode()).hexdigest() == checkpoint.signature


@pytest.mark.parametrize("name", OWN_NAMES)
def test_layouts_of_our_own_names_fit_without_rules(name: str) -> None:
    checkpoint = CHECKPOINTS[name]
    architecture, shapes = ARCHITECTURES[checkpoint.architecture], read_layout(checkpoint)
    with torch.device("meta"):
        module = resolve(architecture.module)(resolve(architecture.infer_config)(shapes))
    assert {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()} == shapes


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=lambda spec: spec.name)
def test_architecture_holds_what_it_declares(architecture: ArchitectureSpec) -> None:
    config = resolve(architecture.tiny)
    assert isinstance(config, resolve(architecture.config))
    module = resolve(architecture.module)(config)
    names = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert resolve(architecture.infer_config)(names) == config
    assert [required for required in architecture.required if not has(required, set(names))] == []
    for blocks in architecture.repeated_blocks:
        assert isinstance(module.get_submodule(blocks), torch.nn.ModuleList)
    with torch.no_grad():
        out = module(**resolve(architecture.tiny_inputs)(config, torch.Generator().manual_seed(0)))
    found = list(tensors_of(out))
    assert found
    assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_sources_parse_and_architectures_exist() -> None:
    assert all(parse_source(source).pattern for spec in CHECKPOINTS.values() for source in spec.files)
    assert {spec.architecture for spec in CHECKPOINTS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_layouts_load_strictly_by_structure(name: str) -> None:
    """Without the table of signatures: the same layout, its config, and every tensor on meta."""
    file = head(read_layout(CHECKPOINTS[name]))
    (found,) = recognize.recognize(file, ARCHITECTURES, list(CHECKPOINTS.values()), tiers=("structure",))
    assert found.architecture.name == CHECKPOINTS[name].architecture
    assert found.extra == ()
    (named,) = recognize.recognize(file, ARCHITECTURES, list(CHECKPOINTS.values()), tiers=("signature",))
    assert (named.checkpoint.name, named.config) == (name, found.config)
    component.load_component(found, file, device="meta", dtype=torch.bfloat16)


def head(tensors: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorInfo("BF16", shape) for name, shape in tensors.items()})


@pytest.mark.parametrize(
    ("dit", "vae"), [("z_image_dit", "flux_autoencoder/original"), ("z_image_omni_dit", "flux_autoencoder")]
)
def test_all_components_in_one_file(dit: str, vae: str) -> None:
    """With the prefixes of ComfyUI, and a number of its own."""
    parts = {"model.diffusion_model.": dit, "text_encoders.qwen3_4b.transformer.": "qwen3_text_encoder", "vae.": vae}
    tensors = {
        prefix + key: shape for prefix, name in parts.items() for key, shape in read_layout(CHECKPOINTS[name]).items()
    }
    file = head(tensors | {"text_encoders.qwen3_4b.logit_scale": ()})
    found = recognize.recognize(file, ARCHITECTURES, list(CHECKPOINTS.values()), tiers=("structure",))
    assert {one.prefix: one.checkpoint.name for one in found} == parts
    assert [key for one in found for key in one.extra] == ["text_encoders.qwen3_4b.logit_scale"]
    for one in found:
        component.load_component(one, file, device="meta", dtype=torch.bfloat16)


def test_gguf_is_named(tmp_path) -> None:
    file = tmp_path / "z_image_turbo-Q4_K_M.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(600))
    with pytest.raises(CorruptFile, match="is a GGUF file, quantised for other programs"):
        ZImagePipeline.from_pretrained(model_configs=[ModelConfig(path=file)])
