"""LoRAs of FLUX.2: every program's file as diffusers 0.42.1 converts it, and the weights they make."""

import pytest
import torch
from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

import lora_files
from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.lora import fit, fuse, parse
from diffsynth.core.lora.spelling import spelled, spelling_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import resolve
from diffsynth_flux.flux2.checkpoints import ARCHITECTURES, LORA_TARGETS
from diffsynth_flux.flux2.config import TINY_DIT
from diffsynth_flux.flux2.dit import Flux2DiT
from lora_files import assert_added, assert_same, random_lora

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


def written(lora, module, spelling):
    return lora_files.written(lora, module, DIT, spelling)


def fitted(state_dict, module):
    return lora_files.fitted(state_dict, module, DIT)


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_makes(tiny, spelling, alpha):
    every = random_lora(tiny, alphas=[alpha])
    assert_same(fitted(written(every, tiny, spelling), tiny), every)
    if ends := SPELLINGS[spelling]:
        lora = random_lora(tiny, ends, alphas=[alpha])
        theirs = Flux2LoraLoaderMixin.lora_state_dict(written(lora, tiny, spelling))
        assert_same(fitted(theirs, tiny), lora)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_file_changes_the_weights_by_its_product(tiny, spelling):
    """Also where q, k and v are one layer of the file."""
    lora, before = random_lora(tiny, alphas=[1.5]), {key: one.clone() for key, one in tiny.state_dict().items()}
    fuse(tiny, fitted(written(lora, tiny, spelling), tiny), 0.5)
    assert_added(tiny, before, lora, 0.5)


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


def test_the_last_modulation_has_its_halves_in_the_order_of_our_network(tiny):
    """The original code has the shift first. diffusers leaves it so in a LoRA, and swaps it in the weights."""
    lora = random_lora(tiny, ["norm_out.linear"])
    keys = written(lora, tiny, "comfyui")
    assert_same(fitted(keys, tiny), lora)
    theirs = fitted(Flux2LoraLoaderMixin.lora_state_dict(dict(keys)), tiny).layers["norm_out.linear"]
    ours = lora.layers["norm_out.linear"]
    torch.testing.assert_close(theirs.up, torch.cat(ours.up.chunk(2)[::-1]))


def test_shortened_names_of_blocks(tiny):
    lora = random_lora(tiny, ["1.attn.to_q"])
    keys = {key.replace("transformer_", "sformer_"): one for key, one in written(lora, tiny, "diffusers").items()}
    keys = {key.replace("transformer.", "diffusion_model."): tensor for key, tensor in keys.items()}
    assert next(iter(keys)).startswith("diffusion_model.sformer_blocks.1.")
    assert_same(fitted(keys, tiny), lora)


def of_size(module, names, prefix):
    """Return LoRA keys of a few layers of a network, which may have no memory."""
    keys = {}
    for name in names:
        outputs, inputs = module.get_submodule(name).weight.shape
        keys |= {f"{prefix}{name}.lora_A.weight": torch.zeros(1, inputs)}
        keys |= {f"{prefix}{name}.lora_B.weight": torch.zeros(outputs, 1)}
    return keys


NETWORKS = {
    "flux_dit": ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "single_blocks.30.linear1"),
    "flux2_dit": ("transformer_blocks.0.attn.to_q", "transformer_blocks.4.ff.linear_in",
                  "single_transformer_blocks.19.attn.to_qkv_mlp_proj"),
    "qwen_image_dit": ("transformer_blocks.0.attn.to_q", "transformer_blocks.4.img_mlp.net.2",
                       "transformer_blocks.59.txt_mod.1"),
    "z_image_dit": ("layers.0.attention.to_q", "layers.29.feed_forward.w1"),
    "wan_dit": ("blocks.0.self_attn.q", "blocks.29.ffn.0"),
}  # fmt: skip
"""Architecture -> layers, in the last blocks, too."""
CONFIGS = {"flux2_dit": {"dim": 3072, "n_heads": 24, "n_layers": 5, "n_single_layers": 20, "ffn_dim": 9216,
                         "prompt_dim": 7680, "embeds_guidance": False}}  # fmt: skip
"""The config of klein-4B, which is as wide as FLUX.1."""


NAMES = {"flux_dit": "FLUX.1-dev", "flux2_dit": "FLUX.2-klein-4B", "qwen_image_dit": "Qwen-Image",
         "z_image_dit": "Z-Image", "wan_dit": "Wan2.1-T2V"}  # fmt: skip


@pytest.fixture(scope="module")
def networks():
    """The networks of the published sizes, without memory."""
    architectures = _discovery.catalog().layouts()[0]
    return {name: component.build(architectures[name], resolve(architectures[name].config)(**CONFIGS.get(name, {})))
            for name in NETWORKS}  # fmt: skip


@pytest.mark.parametrize("written", ["own", "kohya"])
@pytest.mark.parametrize("target", ["flux_dit", "flux2_dit"])
@pytest.mark.parametrize("source", NETWORKS)
def test_a_lora_of_another_line_is_refused_and_named(networks, source, target, written):
    """FLUX.1 and FLUX.2 have blocks of the same names in files of kohya, of other sizes."""
    if source == target:
        pytest.skip("its own")
    architectures, checkpoints = _discovery.catalog().layouts()
    network = networks[source]
    keys = of_size(network, NETWORKS[source], "diffusion_model.")
    if written == "kohya":
        own = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        keys = spelled(fit(parse(keys), network), spelling_of("kohya", architectures[source]), own, checkpoints)
    message = rf"nothing was changed: [01] of its \d layers fit.*It is a LoRA for [^ ]*{NAMES[source]}.* \({source}\)"
    with pytest.raises(KeyMismatch, match=message):
        fit(parse(keys), networks[target], checkpoints, architecture=target)
