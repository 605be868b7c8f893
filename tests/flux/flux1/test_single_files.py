"""FLUX.1 from the single files of other programs: prefixes, whole pipelines, fp8, and formats that are not read."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from diffsynth import ModelConfig
from diffsynth.errors import CorruptFile, KeyMismatch, Unrecognized
from diffsynth.models.config import TINY_FLUX_AUTOENCODER
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_flux import FluxImagePipeline
from diffsynth_flux.flux1.config import TINY_DIT
from diffsynth_flux.flux1.dit import FluxDiT
from flux1_oracles import load_tensors, oracle_dit, tiny_pipelines


def own_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return FluxDiT(TINY_DIT).state_dict()


def layouts() -> dict[str, dict[str, Tensor]]:
    return {"original": own_state(), "diffusers": oracle_dit(TINY_DIT).state_dict()}


def assert_equal(module: nn.Module, expected: Mapping[str, Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


PREFIXES = ["model.diffusion_model.", "model.", "transformer.", "diffusion_model.", "module.", "model.transformer."]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_changes_nothing(prefix: str, layout: str) -> None:
    state = layouts()[layout]
    found, module = load_tensors({f"{prefix}{key}": tensor for key, tensor in state.items()})
    assert found.config == TINY_DIT
    assert_equal(module, load_tensors(state)[1].state_dict())


def test_a_file_of_the_whole_pipeline(tmp_path) -> None:
    """All networks of a pipeline in the file that ComfyUI saves; the tokenizers are given."""
    pipe, vae = tiny_pipelines()[0], FluxAutoencoder(TINY_FLUX_AUTOENCODER)
    parts = {**pipe.parts, "vae": vae}
    prefixes = {
        "dit": "model.diffusion_model.",
        "text_encoder_1": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
        "vae": "vae.",
    }
    file = {
        f"{prefix}{key}": tensor
        for role, prefix in prefixes.items()
        for key, tensor in parts[role].state_dict().items()
    }
    byte_tokenizer().save_pretrained(tmp_path)
    again = FluxImagePipeline.from_pretrained(
        model_configs=[ModelConfig(state_dict=file)],
        torch_dtype=torch.float32,
        device="cpu",
        tokenizer_1_config=ModelConfig(path=tmp_path),
        tokenizer_2_config=ModelConfig(path=tmp_path),
    )
    for role in prefixes:
        assert_equal(again.parts[role], parts[role].state_dict())


def in_fp8(state: Mapping[str, Tensor], *, scaled: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a file with its matrices in fp8, each with a scale of its own if `scaled`, and what they mean."""
    file, meant = {}, {}
    for number, (key, tensor) in enumerate(state.items()):
        if tensor.dim() != 2:
            file[key] = meant[key] = tensor
            continue
        scale = torch.tensor(0.25 + number / 256 if scaled else 1.0)
        file[key] = (tensor / scale).to(torch.float8_e4m3fn)
        meant[key] = file[key].float() * scale
        if scaled:
            file[f"{key.removesuffix('.weight')}.scale_weight"] = scale
    return file | ({"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if scaled else {}), meant


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("scaled", [False, True])
def test_files_in_fp8(scaled: bool, layout: str, prefix: str) -> None:
    """Without scales they are plain casts; with scales also where a weight is joined while it is read."""
    file, meant = in_fp8(layouts()[layout], scaled=scaled)
    found, module = load_tensors({f"{prefix}{key}": tensor for key, tensor in file.items()})
    assert found.config == TINY_DIT
    assert_equal(module, load_tensors(meant)[1].state_dict())


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_fp8_without_the_scales_that_it_needs_is_refused(layout: str) -> None:
    file, _ = in_fp8(layouts()[layout], scaled=True)
    scales = [key for key in file if key.endswith("scale_weight")]
    for left in (scales[1:], []):
        part = {key: tensor for key, tensor in file.items() if key not in scales or key in left}
        count = len(scales) - len(left)
        with pytest.raises(KeyMismatch, match=rf"in fp8 with scales, and {count} of its weights have none: .*\.weight"):
            load_tensors(part)


@pytest.mark.parametrize(("ending", "name"), [
    ("weight.absmax", "bitsandbytes"), ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
    ("qweight", "GPTQ or AWQ"), ("wcscales", "SVDQuant"),
])  # fmt: skip
def test_packed_weights_are_named(ending: str, name: str) -> None:
    key = "double_blocks.0.img_mlp.0"
    packed = {f"{key}.weight": torch.zeros(8192, 1, dtype=torch.uint8), f"{key}.{ending}": torch.zeros(64)}
    with pytest.raises(Unrecognized, match=f"is quantised with {name}"):
        load_tensors(own_state() | packed)


def test_gguf_is_named(tmp_path) -> None:
    (tmp_path / "flux1-dev-Q4_K_S.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(600))
    with pytest.raises(CorruptFile, match="is a GGUF file, quantised for other programs"):
        FluxImagePipeline.from_pretrained(model_configs=[ModelConfig(path=tmp_path / "flux1-dev-Q4_K_S.gguf")])
