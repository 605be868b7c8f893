"""Published layouts of FLUX.2 are recognised by signature and by structure, with their configs; they load strictly."""

from __future__ import annotations

import pytest
import torch

from diffsynth import _discovery
from diffsynth.core.loader import component, convert, pickled, recognize
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.layouts import file_shapes, layout_of, rules_of
from diffsynth.core.loader.reader.ops import apply_rule
from diffsynth_flux.flux2.checkpoints import CHECKPOINTS
from diffsynth_flux.flux2.config import TINY_DIT, Flux2AutoencoderConfig, Flux2DiTConfig, MistralTextEncoderConfig
from diffsynth_flux.flux2.dit import Flux2DiT

KLEIN_4B = Flux2DiTConfig(dim=3072, n_heads=24, n_layers=5, n_single_layers=20, prompt_dim=7680, ffn_dim=9216,
                          embeds_guidance=False)  # fmt: skip
KLEIN_9B = Flux2DiTConfig(dim=4096, n_heads=32, n_layers=8, n_single_layers=24, prompt_dim=12288, ffn_dim=12288,
                          embeds_guidance=False)  # fmt: skip
CONFIGS = {
    "flux2_dit": Flux2DiTConfig(),
    "flux2_dit/klein": KLEIN_4B,
    "flux2_dit/klein_9b": KLEIN_9B,
    "flux2_autoencoder": Flux2AutoencoderConfig(),
    "mistral_text_encoder": MistralTextEncoderConfig(),
}
WITH_LAYOUT = {spec.name: spec for spec in CHECKPOINTS if spec.layout}


def head(tensors: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorInfo("BF16", tuple(shape)) for name, shape in tensors.items()})


def recognized(file: Header, *tiers: str) -> list[recognize.Recognized]:
    return recognize.recognize(file, *_discovery.catalog().layouts(), tiers=tiers or recognize.TIERS)


def loads_strictly(found: recognize.Recognized, file: Header) -> bool:
    module = component.load_component(found, file, device="meta", dtype=torch.bfloat16)
    return all(tensor.is_meta for tensor in module.state_dict().values())


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_a_published_layout_is_recognised_and_loaded(name: str, tier: str) -> None:
    file = head(layout_of(WITH_LAYOUT[name]))
    (found,) = recognized(file, tier)
    assert (found.checkpoint.name if tier == "signature" else name, found.config) == (name, CONFIGS[name])
    assert found.extra == ()
    assert loads_strictly(found, file)


def test_every_layout_has_its_config_here() -> None:
    assert set(CONFIGS) == set(WITH_LAYOUT)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "pipe.dit.", "diffusion_model."])
def test_a_prefix_changes_nothing(prefix: str) -> None:
    plain = layout_of(WITH_LAYOUT["flux2_dit/klein"])
    (found,) = recognized(head({f"{prefix}{name}": shape for name, shape in plain.items()}), "structure")
    assert (found.config, found.prefix) == (KLEIN_4B, prefix)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "model."])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_single_file_in_fp8_with_scales(layout: str, prefix: str) -> None:
    """In the names of the original code the scale of a fused weight is that of each of its parts."""
    torch.manual_seed(0)
    state = Flux2DiT(TINY_DIT).state_dict()
    rules = {spec.name: spec for spec in CHECKPOINTS}["flux2_dit/original"] if layout == "original" else None
    if rules is not None:
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        back = convert.invert(rules_of(rules), file_shapes(rules_of(rules), shapes))
        planned = convert.plan(back, shapes).targets
        state = {
            key: apply_rule(one.rule, tuple(state[source] for source in one.sources), one.index)
            for key, one in planned.items()
        }
    file, meant = {f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, {}
    for number, (key, tensor) in enumerate(state.items()):
        file[f"{prefix}{key}"] = meant[key] = tensor
        if tensor.dim() == 2:
            scale = torch.tensor(0.25 + number / 256)
            file[f"{prefix}{key}"] = (tensor / scale).to(torch.float8_e4m3fn)
            meant[key] = file[f"{prefix}{key}"].float() * scale
            file[f"{prefix}{key.removesuffix('.weight')}.scale_weight"] = scale
    loaded = [
        component.load_component(recognized(header)[0], header, device="cpu", dtype=torch.float32).state_dict()
        for header in (pickled.of_state_dict(file), pickled.of_state_dict(meant))
    ]
    assert loaded[0].keys() == Flux2DiT(TINY_DIT).state_dict().keys()
    assert all(torch.equal(tensor, loaded[1][key]) for key, tensor in loaded[0].items())


def test_a_text_encoder_without_the_rest_of_its_model_is_recognised() -> None:
    """A file of the language model alone has neither vision tower nor head."""
    shapes = layout_of(WITH_LAYOUT["mistral_text_encoder"])
    kept = {name: shape for name, shape in shapes.items() if name.startswith("language_model.model.")}
    (found,) = recognized(head(kept), "structure")
    assert found.config == MistralTextEncoderConfig()
    assert loads_strictly(found, head(kept))
