"""LoRAs of FLUX.2: every program's file as diffusers 0.42.1 converts it, and the weights they make."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

from diffsynth import _discovery
from diffsynth.core.lora import LoRA, LoRALayer, fit, fuse, parse
from diffsynth.core.lora.spelling import spelled, spelling_of
from diffsynth_flux.flux2.checkpoints import ARCHITECTURES, LORA_TARGETS
from diffsynth_flux.flux2.config import TINY_DIT
from diffsynth_flux.flux2.dit import Flux2DiT

DIT = ARCHITECTURES[0]
OUTER = ("embedder", "linear_1", "linear_2", "modulation_img.linear", "modulation_txt.linear", "proj_out")
SPELLINGS = {
    "kohya": (*LORA_TARGETS, "x_embedder", "context_embedder", "timestep_embedder.linear_1", "proj_out"),
    "comfyui": (*LORA_TARGETS, *OUTER),
    "ai-toolkit": (*LORA_TARGETS, *OUTER),
    "diffusers": (*LORA_TARGETS, *OUTER, "norm_out.linear"),
    "peft": LORA_TARGETS,
    "onetrainer": (),
}
"""Spelling -> ends of the names of layers that diffusers' converter reads; it does not know that of OneTrainer.

It takes the halves of the last modulation in their original order, which are the other way round in its network.
"""


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return Flux2DiT(TINY_DIT).requires_grad_(False).eval()


def random_lora(module, ends=("",), *, rank=3, alpha=None):
    dice, layers = torch.Generator().manual_seed(0), {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and name.endswith(tuple(ends)):
            outputs, inputs = part.weight.shape
            up = torch.randn(outputs, rank, generator=dice)
            layers[name] = LoRALayer(torch.randn(rank, inputs, generator=dice), up, alpha)
    return LoRA(layers)


def written(lora, module, spelling):
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    return spelled(lora, spelling_of(spelling, DIT), own, _discovery.catalog().layouts()[1])


def fitted(state_dict, module):
    return fit(parse(state_dict), module, _discovery.catalog().layouts()[1], architecture=DIT.name)


def assert_same(found, expected):
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        change = found.layers[name].scaled_up() @ found.layers[name].down
        torch.testing.assert_close(change, layer.scaled_up() @ layer.down, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_makes(tiny, spelling, alpha):
    every = random_lora(tiny, alpha=alpha)
    assert_same(fitted(written(every, tiny, spelling), tiny), every)
    if ends := SPELLINGS[spelling]:
        lora = random_lora(tiny, ends, alpha=alpha)
        theirs = Flux2LoraLoaderMixin.lora_state_dict(written(lora, tiny, spelling))
        assert_same(fitted(theirs, tiny), lora)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_changes_the_weights_by_its_product(tiny, spelling):
    """Also where q, k and v are one layer of the file."""
    lora, before = random_lora(tiny, alpha=1.5), {key: one.clone() for key, one in tiny.state_dict().items()}
    fuse(tiny, fitted(written(lora, tiny, spelling), tiny), 0.5)
    for key, weight in tiny.state_dict().items():
        layer = lora.layers.get(key.removesuffix(".weight"))
        change = 0 if layer is None else 0.5 * layer.alpha / 3 * layer.up @ layer.down
        torch.testing.assert_close(weight, before[key] + change)


def test_a_lora_of_some_projections_is_a_part_of_a_fused_layer(tiny):
    """kohya's file has one layer for q, k and v: the rows of those that the LoRA leaves alone are zero."""
    lora = random_lora(tiny, ["0.attn.to_k"])
    keys = written(lora, tiny, "kohya")
    assert {key.split(".")[0] for key in keys} == {"lora_unet_double_blocks_0_img_attn_qkv"}
    found = fitted(keys, tiny)
    changed = {name for name, layer in found.layers.items() if layer.up.any()}
    assert changed == set(lora.layers)


def test_lokr_of_the_original_names_and_as_diffusers_converts_it(tiny):
    """A Kronecker product over q, k and v is split into their rows; diffusers joins the layers of its network."""
    dim = TINY_DIT.dim
    name, first, second = "double_blocks.1.txt_attn.qkv", torch.randn(6, 4), torch.randn(dim // 2, dim // 4)
    keys = {f"diffusion_model.{name}.lokr_w1": first, f"diffusion_model.{name}.lokr_w2": second}
    theirs = Flux2LoraLoaderMixin.lora_state_dict(dict(keys))
    assert list(theirs) == [f"transformer.transformer_blocks.1.attn.to_added_qkv.lokr_w{n}" for n in (1, 2)]
    product = torch.kron(first, second).chunk(3)
    for state_dict in (keys, theirs):
        found = fitted(state_dict, tiny)
        for part, rows in zip("qkv", product, strict=True):
            change = found.others[f"transformer_blocks.1.attn.add_{part}_proj.weight"]
            torch.testing.assert_close(change.difference(torch.zeros(dim, dim)), rows)


def test_shortened_names_of_blocks(tiny):
    lora = random_lora(tiny, ["1.attn.to_q"])
    keys = {key.replace("transformer_", "sformer_"): one for key, one in written(lora, tiny, "diffusers").items()}
    keys = {key.replace("transformer.", "diffusion_model."): tensor for key, tensor in keys.items()}
    assert next(iter(keys)).startswith("diffusion_model.sformer_blocks.1.")
    assert_same(fitted(keys, tiny), lora)
