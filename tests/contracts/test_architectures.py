"""What every registered architecture promises: it runs, it saves and loads to the bit, its layouts plan whole."""

import gzip
import importlib.resources
import json

import pytest
import torch

from diffsynth import _discovery
from diffsynth.core.loader import convert, header, load, recognize, save
from diffsynth.spec import resolve

CATALOG = _discovery.catalog()
ARCHITECTURES = {one.spec.name: one.spec for one in CATALOG.architectures}
CHECKPOINTS = {one.spec.name: one.spec for one in CATALOG.checkpoints}
LAYOUTS = {name: spec for name, spec in CHECKPOINTS.items() if spec.layout}


def tiny(architecture):
    torch.manual_seed(0)
    config = resolve(architecture.tiny)
    return resolve(architecture.module)(config).eval(), config


def run(module, architecture, config):
    inputs = resolve(architecture.tiny_inputs)(config, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module(**inputs)


def layout_header(checkpoint):
    package, _, path = checkpoint.layout.partition(":")
    facts = json.loads(gzip.decompress(importlib.resources.files(package).joinpath(path).read_bytes()))
    tensors = {key: header.TensorInfo("BF16", tuple(shape)) for key, shape in facts["tensors"].items()}
    return header.Header(tensors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiny_forward_is_finite_and_reproducible(name):
    module, config = tiny(ARCHITECTURES[name])
    first, again = (run(module, ARCHITECTURES[name], config) for _ in range(2))
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_save_and_load_change_no_bit(name, tmp_path):
    architecture = ARCHITECTURES[name]
    module, config = tiny(architecture)
    save.save_checkpoint(module, tmp_path / "x.safetensors", architecture=name, config=config)
    tensors = header.read([tmp_path / "x.safetensors"])
    (found,) = recognize.recognize(tensors, ARCHITECTURES, list(CHECKPOINTS.values()))
    loaded = load.load_component(found, tensors, device="cpu", dtype=torch.float32)
    assert (found.tier, found.config) == ("metadata", config)
    assert torch.equal(run(loaded, architecture, config), run(module, architecture, config))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_a_published_layout_plans_with_nothing_missing(name, tier):
    tensors = layout_header(LAYOUTS[name])
    (found,) = recognize.recognize(tensors, ARCHITECTURES, list(CHECKPOINTS.values()), tiers=(tier,))
    assert found.architecture.name == LAYOUTS[name].architecture
    module = load.build(found.architecture, found.config)
    assert all(parameter.is_meta for parameter in module.parameters())
    wanted = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert convert.check(convert.plan(found.rules, tensors.shapes), wanted, where=name) == []
