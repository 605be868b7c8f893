"""Published files of FLUX.1 are recognised by signature and by structure, and fit the networks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

import parity
from diffsynth import ModelConfig, _discovery
from diffsynth.core.loader import component, convert
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.recognize import recognize
from diffsynth.errors import NotRunnable
from diffsynth.spec import resolve
from diffsynth_flux import FluxImagePipeline
from diffsynth_flux.flux1.config import TINY_DIT
from diffsynth_flux.flux1.dit import FluxDiT
from flux1_oracles import load_tensors

LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"
CATALOG = _discovery.catalog().layouts()

FILES = {
    "FLUX.1-dev--flux_dit": ("flux_dit", {}),
    "FLUX.1-dev--flux_dit--605c56": ("flux_dit", {}),
    "FLUX.1-schnell-type--flux_dit--old": ("flux_dit", {"guidance_embed": False}),
    "FLUX.1-dev--flux_text_encoder_clip": ("clip_text_encoder", {}),
    "FLUX.1-dev--flux_text_encoder_t5": ("t5_text_encoder", {}),
    "FLUX.1-dev--flux_vae_encoder+flux_vae_decoder": ("flux_autoencoder", {}),
    "FLUX.1-dev-ControlNet-Depth--flux_controlnet--43ad5a": ("flux_controlnet", {"num_modes": 0}),
    "FLUX.1-dev-Controlnet-Inpainting-Beta--flux_controlnet": ("flux_controlnet", {"control_channels": 68}),
    "FLUX.1-dev-Controlnet-Union-alpha--flux_controlnet": ("flux_controlnet", {"num_modes": 10}),
    "FLUX.1-Redux-dev--flux_redux_image_encoder": ("siglip_image_encoder", {}),
    "siglip-so400m-patch14-384--siglip_vision_model": ("siglip_image_encoder", {"image_size": 384}),
    "FLUX.1-Redux-dev--flux_redux_image_embedder": ("flux_redux_embedder", {}),
    "FLUX.1-dev-IP-Adapter--flux_ipadapter": ("flux_ip_adapter", {"n_blocks": 57, "num_tokens": 128}),
}
"""File -> its architecture, and fields of its config."""

NAMED = {
    "AttriCtrl-FLUX.1-Dev--flux_value_controller": ("flux_value_controller", {}),
    "Flex.2-preview--flux_dit": ("flex2_dit", {"in_channels": 196, "n_double_blocks": 8}),
    "InfiniteYou--flux_controlnet": ("infiniteyou_controlnet", {"n_double_blocks": 4, "n_single_blocks": 10}),
    "InfiniteYou--infiniteyou_image_projector": ("infiniteyou_image_projector", {}),
    "LoRA-Encoder-FLUX.1-Dev--flux_lora_encoder": ("flux_lora_encoder", {}),
    "LoRAFusion-preview-FLUX.1-dev--flux_lora_patcher": ("flux_lora_patcher", {}),
    "Nexus-GenV2--nexus_gen_generation_adapter+flux_dit": ("nexus_gen_decoder", {}),
    "Nexus-GenV2--nexus_gen_llm": ("nexus_gen_llm", {}),
    "Step1X-Edit--step1x_connector+flux_dit": ("step1x_dit", {"guidance_embed": False}),
}
"""Files that are recognised and cannot be run yet -> the name, and fields of the config."""


def header_of(name: str, prefix: str = "") -> Header:
    tensors = json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))["tensors"]
    nested = {outer: inner for outer, inner in tensors.items() if isinstance(inner, dict)}
    flat = {f"{outer}.{key}": shape for outer, inner in nested.items() for key, shape in inner.items()} or tensors
    flat = {f"{prefix}{key}": shape for key, shape in flat.items()}
    infos = {key: TensorInfo("BF16", tuple(shape)) for key, shape in flat.items()}
    return Header(infos, nested=tensors if nested else None)


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("name", FILES)
def test_a_published_file_is_one_architecture(name: str, tier: str) -> None:
    header = header_of(name)
    architecture, fields = FILES[name]
    (found,) = recognize(header, *CATALOG, tiers=[tier])
    assert found.architecture.name == architecture
    assert {field: getattr(found.config, field) for field in fields} == fields
    shapes = {key.removeprefix(found.prefix): header.shapes[key] for key in found.keys}
    plan = convert.plan(found.rules, shapes)
    with torch.device("meta"):
        module = resolve(found.architecture.module)(found.config)
    convert.check(plan, parity.shapes_of(module), where=name)


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_cannot_be_run_yet_is_named(name: str, tier: str) -> None:
    header = header_of(name)
    architecture, fields = NAMED[name]
    (found,) = recognize(header, *CATALOG, tiers=[tier])
    if (name, tier) == ("InfiniteYou--flux_controlnet", "structure"):
        assert found.architecture.name == "flux_controlnet"  # one of that size has the same shapes
        return
    assert (found.architecture.name, found.extra) == (architecture, ())
    assert {field: getattr(found.config, field) for field in fields} == fields
    with pytest.raises(NotRunnable, match=f"recognised, not yet runnable: .* \\({architecture}\\)"):
        component.load_component(found, header, device="meta", dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["Flex.2-preview--flux_dit", "Step1X-Edit--step1x_connector+flux_dit"])
def test_it_is_named_under_a_prefix_and_where_it_is_loaded(name: str) -> None:
    header = header_of(name, "model.diffusion_model.")
    (found,) = recognize(header, *CATALOG)
    assert (found.architecture.name, found.prefix) == (NAMED[name][0], "model.diffusion_model.")
    tensors = {key: torch.empty(info.shape, device="meta") for key, info in header_of(name).tensors.items()}
    for role in (None, "dit"):
        with pytest.raises(NotRunnable, match=f"recognised, not yet runnable: .*{NAMED[name][0]}"):
            FluxImagePipeline.from_pretrained(model_configs=[ModelConfig(state_dict=tensors, role=role)])


def test_names_of_diffsynth_studio() -> None:
    """Both versions of its network: the final norm has shift and scale, or, below `pipe.dit.`, scale and shift."""
    torch.manual_seed(0)
    state = FluxDiT(TINY_DIT).state_dict()
    architecture, checkpoints = CATALOG[0]["flux_dit"], {one.name: one for one in CATALOG[1]}
    for name in ("diffsynth_studio", "nexus_gen"):
        rules = resolve(checkpoints[f"{architecture.name}/{name}"].rules)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        back = {target: rule for rule in rules for target in rule.targets}
        written = {}
        for key in shapes:
            pattern, holes = next((p, h) for p in back if (h := convert.match(p, key)) is not None)
            rule = back[pattern]
            value = state[key].roll(len(state[key]) // 2, 0) if hasattr(rule, "order") else state[key]
            written[convert.fill(rule.sources[0], holes)] = value
        found, ours = load_tensors(written)
        assert found.checkpoint.name == f"flux_dit/{name}"
        assert all(torch.equal(tensor, state[key]) for key, tensor in ours.state_dict().items())
