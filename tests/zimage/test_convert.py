"""Our key rules give the values of diffusers' converters."""

import gzip
import importlib.resources
import json

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_vae_checkpoint,
    convert_z_image_transformer_checkpoint_to_diffusers,
)

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth_zimage.config import TINY_DIT, TINY_OMNI_DIT
from diffsynth_zimage.dit import ZImageDiT
from diffsynth_zimage.omni import ZImageOmniDiT

CATALOG = _discovery.catalog()
ARCHITECTURES = {one.spec.name: one.spec for one in CATALOG.architectures}
CHECKPOINTS = [one.spec for one in CATALOG.checkpoints]


def load_tensors(tensors):
    header = pickled.of_state_dict(tensors)
    (found,) = recognize.recognize(header, ARCHITECTURES, CHECKPOINTS)
    return found, component.load_component(found, header, device="cpu", dtype=torch.float32).state_dict()


def fused_file(network=ZImageDiT, config=TINY_DIT):
    """Return a tiny network under the names of single-file checkpoints, with q, k and v in one matrix."""
    torch.manual_seed(0)
    state = network(config).state_dict()
    names = {
        "all_x_embedder.2-1.": "x_embedder.",
        "all_final_layer.2-1.": "final_layer.",
        ".attention.to_out.0.": ".attention.out.",
        ".attention.norm_q.": ".attention.q_norm.",
        ".attention.norm_k.": ".attention.k_norm.",
    }
    fused = {}
    for key, tensor in state.items():
        if ".attention.to_q." in key:
            parts = [state[key.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            fused[key.replace("to_q", "qkv")] = torch.cat(parts)
        elif ".attention.to_k." not in key and ".attention.to_v." not in key:
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            fused[key] = tensor
    return fused | {"norm_final.weight": torch.ones(TINY_DIT.dim)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fused_z_image(prefix):
    fused = {f"{prefix}{key}": tensor for key, tensor in fused_file().items()}
    found, ours = load_tensors(fused)
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(dict(fused))
    assert (found.checkpoint.name, found.prefix) == ("z_image_dit/fused", prefix)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_fused_omni_base():
    fused = fused_file(ZImageOmniDiT, TINY_OMNI_DIT)
    found, ours = load_tensors(fused)
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(dict(fused))
    assert found.checkpoint.name == "z_image_omni_dit/fused"
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_published_names_under_a_prefix_alone():
    """Files of this layout, which diffusers' converter does not convert, load with our rules."""
    torch.manual_seed(0)
    state = ZImageDiT(TINY_DIT).state_dict()
    found, ours = load_tensors({f"model.diffusion_model.{key}": tensor for key, tensor in state.items()})
    assert found.prefix == "model.diffusion_model."
    assert all(torch.equal(ours[key], state[key]) for key in state)


def test_original_flux_autoencoder():
    path = next(one.layout for one in CHECKPOINTS if one.name == "flux_autoencoder/original").partition(":")[2]
    facts = json.loads(gzip.decompress(importlib.resources.files("diffsynth.models").joinpath(path).read_bytes()))
    generator = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in facts["tensors"].items()}
    found, ours = load_tensors(tensors)
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    theirs = convert_ldm_vae_checkpoint(dict(tensors), config)
    assert found.checkpoint.name == "flux_autoencoder/original"
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].reshape(ours[key].shape)) for key in ours)
