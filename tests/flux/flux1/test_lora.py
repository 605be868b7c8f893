"""LoRAs of FLUX.1: every program's file as diffusers 0.42.1 converts it, the weights they make, and text encoders."""

import copy
import re
from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch
from diffusers import FluxControlPipeline
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from PIL import Image
from safetensors.torch import load_file, save_file

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.lora_bases import explain
from diffsynth.core.loader.recognize import recognize
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.core.lora import LoRA, LoRALayer, fit, fuse, parse
from diffsynth.core.lora.format import to_state_dict
from diffsynth.core.lora.spelling import spelled, spelling_of
from diffsynth.core.vram import Policy, wrap
from diffsynth.core.vram.managed import managed
from diffsynth.errors import KeyMismatch
from diffsynth_flux import FluxImagePipeline
from diffsynth_flux.flux1.checkpoints import ARCHITECTURES, LORA_TARGETS
from diffsynth_flux.flux1.config import TINY_DIT, FluxDiTConfig
from diffsynth_flux.flux1.dit import FluxDiT
from diffsynth_flux.flux1.tiny import tiny_dit_inputs
from flux1_oracles import load_tensors, oracle_dit, run_oracle, tiny_pipelines

DIT, _, CLIP, T5 = ARCHITECTURES[:4]
EDGES = ("*_in*", "final_layer*", "double_blocks.0.*", "double_blocks.18.*", "single_blocks.0.*", "single_blocks.37.*")
EVERY = ("*",)
SPELLINGS = {
    "kohya": EDGES,
    "comfyui": EDGES,
    "diffusers": EDGES,
    "ai-toolkit": EDGES,
    "bfl": EVERY,
    "fal": ("*_blocks.*", "final_layer.linear"),
    "xlabs": ("double_blocks.*_attn.*", "single_blocks.*.linear2"),
    "onetrainer": ("double_blocks.18.*_attn.*",),
}
"""Spelling -> the layers that diffusers' converter reads: it misses some, and for others it needs every layer."""


@pytest.fixture(scope="module")
def dit():
    """The network of the published size, without memory: diffusers splits weights of no other size."""
    return component.build(DIT, FluxDiTConfig())


def shapes_of(module):
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def random_lora(module, patterns=EVERY, *, rank=1, alpha=None):
    dice = torch.Generator().manual_seed(0)
    layers = {}
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.Linear) and any(fnmatch(name, pattern) for pattern in patterns):
            outputs, inputs = part.weight.shape
            up = torch.randn(outputs, rank, generator=dice)
            layers[name] = LoRALayer(torch.randn(rank, inputs, generator=dice), up, alpha)
    return LoRA(layers)


def written(lora, module, spelling, architecture=DIT):
    checkpoints = _discovery.catalog().layouts()[1]
    return spelled(lora, spelling_of(spelling, architecture), shapes_of(module), checkpoints)


def fitted(state_dict, module, architecture=DIT):
    return fit(parse(state_dict), module, _discovery.catalog().layouts()[1], architecture=architecture.name)


def assert_same(found, expected):
    """The changes are compared by what they make of a random vector: whole ones of the published size are too large."""
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        probe = torch.randn(layer.down.shape[1], generator=torch.Generator().manual_seed(1))
        ours, theirs = (each.scaled_up() @ (each.down.float() @ probe) for each in (found.layers[name], layer))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def without(lora, name):
    return LoRA({key: layer for key, layer in lora.layers.items() if key != name})


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_diffusers_reads_what_we_write_and_we_read_what_it_makes(dit, spelling):
    lora = random_lora(dit, SPELLINGS[spelling], rank=2)
    keys = written(lora, dit, spelling)
    assert_same(fitted(keys, dit), lora)
    if spelling == "bfl":
        keys |= {key: torch.ones(128) for key in dit.state_dict() if key.endswith("_norm.scale")}
    theirs = FluxLoraLoaderMixin.lora_state_dict(dict(keys))
    assert not any("alpha" in key for key in theirs)
    ours = fitted(theirs, dit)
    if spelling == "bfl":
        # diffusers swaps the halves of both matrices, also the ranks of A, for which B has no counterpart.
        ours, lora = without(ours, "final_layer.adaLN_modulation.1"), without(lora, "final_layer.adaLN_modulation.1")
    assert_same(ours, lora)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_what_is_said_of_a_file_is_what_loading_does(dit, spelling):
    """`diffsynth recognize` reads names and shapes alone."""
    keys = written(random_lora(dit, SPELLINGS[spelling]), dit, spelling)
    said = explain("x", {key: tuple(tensor.shape) for key, tensor in keys.items()}, _discovery.catalog().layouts()[1])
    assert said.startswith("x is a LoRA for "), said
    assert "(flux_dit)" in said or " flux_dit," in said, said
    assert said.endswith("Load that model, then add the LoRA to it."), said


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return FluxDiT(TINY_DIT).requires_grad_(False).eval()


TINY = (*LORA_TARGETS, "img_in", "final_layer.adaLN_modulation.1", "single_blocks.1.modulation.lin")


def tiny_lora(tiny, alpha=1.5):
    return random_lora(tiny, [f"*{name}" for name in TINY], rank=3, alpha=alpha)


def weights_of(module):
    return {name: weight.detach().clone() for name, weight in module.state_dict().items()}


def assert_added(tiny, before, lora, strength=1.0):
    """Every weight is `W + strength * alpha / rank * B A`, and the others are what they were."""
    for key, weight in tiny.state_dict().items():
        layer = lora.layers.get(key.removesuffix(".weight"))
        expected = before[key]
        if layer is not None:
            expected = expected + strength * layer.alpha / layer.down.shape[0] * layer.up @ layer.down
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("spelling", [*(name for name in SPELLINGS if name != "xlabs"), "peft"])
def test_a_file_changes_the_weights_by_its_product(tiny, spelling):
    """Also where q, k and v are one file's layer and three of another's."""
    lora, before = tiny_lora(tiny), weights_of(tiny)
    fuse(tiny, fitted(written(lora, tiny, spelling), tiny), 0.5)
    assert_added(tiny, before, lora, 0.5)


def test_a_file_of_xlabs_changes_queries_keys_and_values_of_the_single_blocks(tiny):
    """The first three of the parts of a fused weight have a name in the file; the feed-forward has none."""
    dim, before, keys = TINY_DIT.dim, weights_of(tiny), {}
    named = {
        "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3 * dim, dim),
        "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 3 * dim, dim),
        "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", dim, dim),
        "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", dim, dim),
        "single_blocks.1.processor.qkv_lora": ("single_blocks.1.linear1", 3 * dim, dim),
        "single_blocks.1.processor.proj_lora": ("single_blocks.1.linear2", dim, 5 * dim),
    }
    for name, (_, outputs, inputs) in named.items():
        keys |= {f"{name}.down.weight": torch.randn(2, inputs), f"{name}.up.weight": torch.randn(outputs, 2)}
    found = fitted(keys, tiny)
    fuse(tiny, found)
    for name, (ours, outputs, _) in named.items():
        change = tiny.get_submodule(ours).weight - before[f"{ours}.weight"]
        torch.testing.assert_close(change[:outputs], keys[f"{name}.up.weight"] @ keys[f"{name}.down.weight"])
        assert not change[outputs:].any()
    again = written(found, tiny, "xlabs")
    assert again.keys() == keys.keys()
    with pytest.raises(KeyMismatch, match=r"files of xlabs do not have"):
        written(tiny_lora(tiny), tiny, "xlabs")


def test_projections_with_alphas_of_their_own(tiny):
    """Three layers of diffusers with other ranks and alphas are one of the original network."""
    before, parts, block = weights_of(tiny), {}, "transformer.transformer_blocks.1.attn.to_"
    dim = TINY_DIT.dim
    for part, rank, alpha in (("q", 1, 4.0), ("k", 2, 1.0), ("v", 3, None)):
        parts[f"{block}{part}"] = LoRALayer(torch.randn(rank, dim), torch.randn(dim, rank), alpha)
    fuse(tiny, fitted(to_state_dict(LoRA(parts)), tiny))
    expected = torch.cat([layer.scale * layer.up @ layer.down for layer in parts.values()])
    key = "double_blocks.1.img_attn.qkv.weight"
    torch.testing.assert_close(tiny.state_dict()[key] - before[key], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("magnitude", ["lora_magnitude_vector", "dora_scale"])
def test_dora_of_split_and_of_fused_projections_is_the_same(tiny, magnitude):
    """Magnitudes belong to rows, so those of q, k and v are parts of those of the fused weight."""
    dim, key = TINY_DIT.dim, "double_blocks.0.txt_attn.qkv"
    down, up, sizes = torch.randn(2, dim), torch.randn(3 * dim, 2), torch.rand(3 * dim, 1) + 0.5
    fused = to_state_dict(LoRA({key: LoRALayer(down, up, 1.0)})) | {f"{key}.{magnitude}": sizes}
    split = {}
    for part, rows, lengths in zip("qkv", up.chunk(3), sizes.chunk(3), strict=True):
        name = f"transformer.transformer_blocks.0.attn.add_{part}_proj"
        split |= to_state_dict(LoRA({name: LoRALayer(down, rows, 1.0)})) | {f"{name}.{magnitude}": lengths}
    weight = tiny.state_dict()[f"{key}.weight"]
    changed = weight + 0.5 * up @ down
    expected = sizes * changed / changed.norm(dim=1, keepdim=True)
    for keys in (fused, split):
        module = copy.deepcopy(tiny)
        fuse(module, fitted(keys, module))
        torch.testing.assert_close(module.state_dict()[f"{key}.weight"], expected)


def control_lora(tiny):
    """Return the keys of a LoRA for a control image: matrices with biases of every layer, norms, and a wider input."""
    wide = component.build(DIT, replace(tiny.config, in_channels=128))
    lora = random_lora(wide, rank=2)
    keys = written(lora, wide, "bfl")
    for name, layer in lora.layers.items():
        if tiny.get_submodule(name).bias is not None:
            keys[f"{name}.lora_B.bias"] = torch.randn(layer.up.shape[0])
    return keys | {key: torch.rand(32) + 0.5 for key in tiny.state_dict() if key.endswith("_norm.scale")}


def test_a_control_lora_widens_the_input_and_replaces_norms(tiny):
    keys, before = control_lora(tiny), weights_of(tiny)
    pipe = FluxImagePipeline.from_components(dit=tiny, device="cpu", torch_dtype=torch.float32)
    pipe.load_lora(state_dict=keys)
    after = tiny.state_dict()
    assert tiny.config == replace(TINY_DIT, in_channels=128)
    change = keys["img_in.lora_B.weight"] @ keys["img_in.lora_A.weight"]
    widened = torch.nn.functional.pad(before["img_in.weight"], (0, 64))
    torch.testing.assert_close(after["img_in.weight"], widened + change)
    for key in before:
        if key.endswith("_norm.scale"):
            torch.testing.assert_close(after[key], keys[key])
        elif key.endswith(".bias"):
            expected = before[key] + keys[f"{key.removesuffix('.bias')}.lora_B.bias"]
            torch.testing.assert_close(after[key], expected)
    with pytest.raises(ValueError, match="needs a control image"):
        pipe.check(prompt="a")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_call_with_a_control_lora_is_that_of_the_network_it_makes(wrapped):
    """Also where the VRAM engine moves the weights, which are packed anew for the wider layer."""
    pipe = tiny_pipelines()[0]
    keys = control_lora(pipe.dit)
    if wrapped:
        wrap(pipe.dit, Policy.preset("cpu-offload", "cpu"), repeated=DIT.repeated_blocks)
        pipe = FluxImagePipeline.from_components(**pipe.parts, device="cpu", torch_dtype=torch.float32)
    pipe.load_lora(state_dict=keys, alpha=0.5)
    merged = FluxDiT(pipe.dit.config).requires_grad_(False).eval()
    merged.load_state_dict(pipe.dit.state_dict())
    parts = {**pipe.parts, "dit": merged}
    other = FluxImagePipeline.from_components(**parts, device="cpu", torch_dtype=torch.float32)
    image = Image.linear_gradient("L").convert("RGB")
    call = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 0, "output_type": "latents"}
    found = pipe("a", control_image=image, **call)
    assert torch.equal(found, other("a", control_image=image, **call))
    assert not torch.equal(found, pipe("a", control_image=image.rotate(90), **call))
    assert (managed(pipe.dit) is not None) == wrapped


def test_a_control_lora_on_weights_on_disk_changes_nothing(tmp_path):
    """Weights that stay on disk cannot be changed, so the network stays what it is."""
    tiny = FluxDiT(TINY_DIT).requires_grad_(False).eval()
    (file,) = save_checkpoint(tiny, tmp_path / "dit.safetensors", architecture=DIT.name, config=TINY_DIT)
    header = read_files([file])
    (found,) = recognize(header, *_discovery.catalog().layouts())
    module, source = component.open_component(found, header, dtype=torch.float32)
    component.materialize(module, source, device="meta")
    component.fill_buffers(module)
    wrap(module, Policy.preset("disk", "cpu"), source=source, repeated=DIT.repeated_blocks)
    pipe = FluxImagePipeline.from_components(dit=module, device="cpu", torch_dtype=torch.float32)
    with pytest.raises(ValueError, match="stored on disk, so a LoRA cannot be added to its weight"):
        pipe.load_lora(state_dict=control_lora(tiny))
    assert module.config == TINY_DIT
    assert managed(module) is not None


def test_the_network_of_a_control_lora_is_that_of_diffusers(tiny):
    """diffusers pads the input of its network and replaces the norms, as we do."""
    theirs, keys = oracle_dit(TINY_DIT), {}
    ours = load_tensors(theirs.state_dict())[1]
    for name, part in theirs.named_modules():
        if isinstance(part, torch.nn.Linear):
            outputs, inputs = part.weight.shape
            keys[f"transformer.{name}.lora_A.weight"] = torch.randn(2, 128 if name == "x_embedder" else inputs) / 16
            keys[f"transformer.{name}.lora_B.weight"] = torch.randn(outputs, 2) / 16
            keys[f"transformer.{name}.lora_B.bias"] = torch.randn(outputs) / 16
        elif isinstance(part, torch.nn.RMSNorm) or type(part).__name__ == "RMSNorm":
            keys[f"transformer.{name}.weight"] = torch.rand(part.weight.shape) + 0.5
    FluxImagePipeline.from_components(dit=ours, device="cpu", torch_dtype=torch.float32).load_lora(state_dict=keys)
    pipe = FluxControlPipeline(None, None, None, None, None, None, theirs)
    pipe.load_lora_weights(dict(keys))
    pipe.fuse_lora()
    inputs = tiny_dit_inputs(replace(TINY_DIT, in_channels=128), torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert parity.relative_error(ours(**inputs), run_oracle(theirs, inputs)) < 1e-4


def test_a_lora_of_the_base_changes_the_first_inputs_of_a_wider_network():
    """FLUX.1-Fill takes the LoRAs of FLUX.1-dev, which know nothing of its further channels."""
    fill = FluxDiT(replace(TINY_DIT, in_channels=384)).requires_grad_(False)
    before, lora = weights_of(fill), tiny_lora(FluxDiT(TINY_DIT))
    pipe = FluxImagePipeline.from_components(dit=fill, device="cpu", torch_dtype=torch.float32)
    pipe.load_lora(state_dict=written(lora, FluxDiT(TINY_DIT), "kohya"))
    change = fill.img_in.weight - before["img_in.weight"]
    layer = lora.layers["img_in"]
    torch.testing.assert_close(change[:, :64], layer.scale * layer.up @ layer.down, rtol=1e-4, atol=1e-5)
    assert not change[:, 64:].any()


TEXT = {
    "text_encoder_1": "text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q",
}
WRITERS = {
    "kohya": ("lora_te1_{}", "lora_te3_{}"),
    "kohya, two": ("lora_te1_{}", "lora_te2_{}"),
    "diffusers": ("text_encoder.{}", "text_encoder_2.{}"),
    "comfyui": ("text_encoders.clip_l.transformer.{}", "text_encoders.t5xxl.transformer.{}"),
    "onetrainer": ("lora_te1_{}", "lora_te2_{}"),
}


def modules_in(keys):
    return {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", key) for key in keys}


@pytest.mark.parametrize("writer", WRITERS)
def test_each_text_encoder_gets_its_layers(writer, tmp_path):
    """Also of a file that the pipeline writes for that program, which has the same keys."""
    pipe = tiny_pipelines()[0]
    keys, before = written(random_lora(pipe.dit, ["*qkv"]), pipe.dit, writer.partition(",")[0]), {}
    for (role, name), pattern in zip(TEXT.items(), WRITERS[writer], strict=True):
        weight = pipe.parts[role].get_submodule(name).weight
        before[role] = weight.detach().clone()
        named = pattern.format(name.replace(".", "_") if pattern.startswith("lora") else name)
        keys |= to_state_dict(LoRA({named: LoRALayer(torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))}))
    file, again = tmp_path / "lora.safetensors", tmp_path / "again.safetensors"
    save_file(keys, file)
    pipe.convert_lora(file, again, spelling=writer.partition(",")[0])
    if writer != "kohya, two":
        assert modules_in(load_file(again)) == modules_in(keys)
    pipe.load_lora(again)
    assert sorted(lora.role for lora in pipe.loras) == ["dit", "text_encoder_1", "text_encoder_2"]
    for role, name in TEXT.items():
        torch.testing.assert_close(pipe.parts[role].get_submodule(name).weight.detach(), before[role] + 1)
