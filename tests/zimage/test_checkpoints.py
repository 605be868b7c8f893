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

from diffsynth.models import checkpoints as core_checkpoints
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, parse_source, resolve
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
