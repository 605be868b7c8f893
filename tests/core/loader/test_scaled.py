"""fp8 weights with scales in the key names of other programs, and files that hold a whole pipeline."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffsynth import _discovery
from diffsynth.core.loader import component, convert, header, layouts, scaled
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.layouts import rules_of
from diffsynth.core.loader.recognize import recognize
from diffsynth.errors import Unrecognized

ARCHITECTURES, CHECKPOINTS = _discovery.catalog().layouts()
LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"


def layout(name):
    facts = json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in facts["tensors"].items()}


def header_of(shapes):
    return Header({key: TensorInfo("F8_E4M3", shape) for key, shape in shapes.items()})


Z_IMAGE = layout("Z-Image-Turbo--z_image_dit")
FUSED = layouts.file_shapes(rules_of(next(one for one in CHECKPOINTS if one.name == "z_image_dit/fused")), Z_IMAGE)
CONFIG = recognize(header_of(Z_IMAGE), ARCHITECTURES, CHECKPOINTS)[0].config

SPELLINGS = {
    "one number": ("weight_scale", lambda shape: ()),
    "one number in an axis": ("scale_weight", lambda shape: (1,)),
    "one a row": ("weight_scale", lambda shape: (shape[0], 1)),
    "blocks": ("weight_scale_inv", lambda shape: (shape[0] // 16, shape[1] // 16)),
}


def with_scales(shapes, name, scale):
    scaled_keys = [
        key for key in shapes if key.endswith("weight") and key.startswith("layers.") and len(shapes[key]) == 2
    ]
    added = {f"{key.removesuffix('weight')}{name}": scale(shapes[key]) for key in scaled_keys}
    inputs = {f"{key.removesuffix('weight')}input_scale": () for key in scaled_keys}
    return shapes | added | inputs | {"scaled_fp8": (2,)}, scaled_keys


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_file_is_recognised_and_planned(spelling, fused):
    shapes, scaled_keys = with_scales(FUSED if fused else Z_IMAGE, *SPELLINGS[spelling])
    prefix = "model.diffusion_model." if fused else ""
    (found,) = recognize(header_of({prefix + key: shape for key, shape in shapes.items()}), ARCHITECTURES, CHECKPOINTS)
    assert (found.architecture.name, found.config, found.extra, found.prefix) == ("z_image_dit", CONFIG, (), prefix)
    plan = convert.plan(found.rules, {key.removeprefix(prefix): shapes[key.removeprefix(prefix)] for key in found.keys})
    assert plan.shapes == Z_IMAGE
    ops = {type(target.rule).__name__ for target in plan.targets.values()}
    assert "Dequantize" in ops
    assert ("Scaled" in ops) == fused  # that file splits what it scales
    dequantized = {source for target in plan.targets.values() for source in target.sources} & set(scaled_keys)
    assert dequantized == set(scaled_keys)


def test_a_scale_that_does_not_fit_its_weight():
    shapes, _ = with_scales(Z_IMAGE, "weight_scale", lambda shape: (7, 7, 7))
    with pytest.raises(Unrecognized, match=r"a scale of shape \(7, 7, 7\) does not fit a weight of shape"):
        recognize(header_of(shapes), ARCHITECTURES, CHECKPOINTS)


def test_scales_of_nothing_are_no_scales():
    found = scaled.find({"a.weight_scale": (), "b.weight": (2, 2), "b.weight_scale": (), "b.bias": (2,)})
    assert found.weights == {"b.weight": "b.weight_scale"}
    assert found.unused == ()


@pytest.mark.parametrize("fused", [False, True])
def test_the_weights_come_out_multiplied(toy, tmp_path, fused):
    net = toy.Net(toy.NetConfig())
    wanted = {
        key: torch.randn(value.shape) if value.is_floating_point() else value for key, value in net.state_dict().items()
    }
    file = {}
    for key, value in wanted.items():
        if ".q." in key or ".k." in key or ".v." in key:
            scale = value.abs().max() / 400
            value = (value / scale).to(torch.float8_e4m3fn)
            wanted[key] = value.float() * scale
            file[key], file[key.replace("weight", "scale_weight")] = value, scale
        else:
            file[key] = value
    if fused:
        for n in range(2):
            parts = [wanted.pop(f"layers.{n}.{part}.weight") for part in "qkv"]
            whole = torch.cat(parts)
            scale = whole.abs().max() / 400
            quantized = (whole / scale).to(torch.float8_e4m3fn)
            for part, value in zip("qkv", (quantized.float() * scale).chunk(3), strict=True):
                wanted[f"layers.{n}.{part}.weight"] = value
            file = {key: value for key, value in file.items() if not key.startswith(f"layers.{n}.")}
            file |= {f"blocks.{n}.qkv.weight": quantized, f"blocks.{n}.qkv.scale_weight": scale}
        file["final_norm.weight"], file["final_norm.bias"] = file.pop("norm.weight"), file.pop("norm.bias")
    file["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(file, tmp_path / "x.safetensors")
    tensors = header.read([tmp_path / "x.safetensors"])
    (found,) = recognize(tensors, toy.ARCHITECTURES, toy.CHECKPOINTS)
    module = component.load_component(found, tensors, device="cpu", dtype=torch.float32)
    assert all(torch.equal(value, wanted[key]) for key, value in module.state_dict().items())


def test_everything_in_one_file():
    """A file of ComfyUI: the network fused and scaled, the autoencoder in its original names, with prefixes."""
    network, _ = with_scales(FUSED, "scale_weight", lambda shape: ())
    parts = {
        "model.diffusion_model.": network,
        "vae.": layout("FLUX.1-dev--flux_vae_encoder+flux_vae_decoder"),
        "text_encoders.qwen3_4b.transformer.": layout("Z-Image-Turbo--z_image_text_encoder"),
    }
    whole = {prefix + key: shape for prefix, shapes in parts.items() for key, shape in shapes.items()}
    found = recognize(header_of(whole | {"text_encoders.qwen3_4b.logit_scale": ()}), ARCHITECTURES, CHECKPOINTS)
    assert {one.architecture.name: one.prefix for one in found} == {
        "z_image_dit": "model.diffusion_model.",
        "flux_autoencoder": "vae.",
        "qwen3_text_encoder": "text_encoders.qwen3_4b.transformer.",
    }
    assert next(one for one in found if one.architecture.name == "z_image_dit").config == CONFIG
    extra = [key for one in found for key in one.extra]
    assert extra == ["text_encoders.qwen3_4b.logit_scale"]
    claimed = [key for one in found for key in one.keys]
    assert len(claimed) == len(set(claimed))


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "pipe.dit.", "model.diffusion_model.", "transformer."]
)
def test_wrappers_and_wrappers_in_wrappers(wrapper):
    (found,) = recognize(header_of({wrapper + key: shape for key, shape in FUSED.items()}), ARCHITECTURES, CHECKPOINTS)
    assert (found.architecture.name, found.config, found.prefix) == ("z_image_dit", CONFIG, wrapper)


def test_another_size_by_structure():
    """An unpublished network of 12 layers of width 1536 with 12 heads, and a fine-tune's extra keys."""
    from diffsynth_zimage.config import ZImageDiTConfig

    config = ZImageDiTConfig(dim=1536, n_layers=12, n_heads=12, n_kv_heads=12, cap_feat_dim=1024)
    architecture = ARCHITECTURES["z_image_dit"]
    shapes = {key: tuple(value.shape) for key, value in component.build(architecture, config).state_dict().items()}
    (found,) = recognize(header_of(shapes | {"ema_step": ()}), ARCHITECTURES, CHECKPOINTS)
    assert (found.tier, found.config, found.extra) == ("structure", config, ("ema_step",))
