"""Defaults of calls that loaded LoRAs set: from their files, from a plugin, or from the caller."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path

import pytest

import lora_networks as small
from diffsynth import ModelConfig, provenance
from diffsynth.core.lora import save_lora
from diffsynth.runtime.lora_defaults import published_lora
from tiny_z_image import SMALL, tiny_z_image

FAST = {"num_inference_steps": 3, "cfg_scale": 1.0}


@pytest.fixture
def pipe():
    return tiny_z_image().named("tiny", {"num_inference_steps": 6, "cfg_scale": 2.0})


def write(pipe, file: Path, seed: int = 1, **options) -> Path:
    layers = small.factors(pipe.dit, ["layers.0.attention.to_q"], seed=seed)
    return save_lora(small.state_dict("{}.lora_{A,B}.weight", layers), file, **options)


def defaults(pipe) -> tuple[int, float]:
    parameters = inspect.signature(pipe).parameters
    return parameters["num_inference_steps"].default, parameters["cfg_scale"].default


def steps(pipe, **arguments) -> int:
    made = []
    pipe("a", **SMALL, on_step=made.append, **arguments)
    return len(made)


def test_those_of_a_file_hold_until_it_is_cleared(pipe, tmp_path, caplog) -> None:
    file = write(pipe, tmp_path / "fast.safetensors", call_defaults=FAST)
    with caplog.at_level(logging.INFO, "diffsynth"):
        pipe.load_lora(pipe.dit, file, hotload=True)
    assert caplog.text.count("sets the defaults of calls: num_inference_steps=3, cfg_scale=1.0") == 1
    assert defaults(pipe) == (3, 1.0)
    assert steps(pipe) == 3
    assert steps(pipe, num_inference_steps=2, cfg_scale=2.0, negative_prompt="b") == 2
    assert defaults(copy.copy(pipe)) == (3, 1.0)
    pipe.clear_lora()
    assert defaults(pipe) == (6, 2.0)
    assert steps(pipe) == 6


def test_a_fused_lora_keeps_them(pipe, tmp_path) -> None:
    pipe.load_lora(pipe.dit, write(pipe, tmp_path / "fast.safetensors", call_defaults=FAST), hotload=False)
    pipe.clear_lora()
    assert defaults(pipe) == (3, 1.0)


def test_the_record_has_them_as_if_they_were_given(pipe, tmp_path) -> None:
    pipe.load_lora(pipe.dit, write(pipe, tmp_path / "fast.safetensors", call_defaults=FAST), hotload=True)
    record = provenance.record(pipe, {"prompt": "a", "seed": 0})
    assert (record["num_inference_steps"], record["cfg_scale"]) == (3, 1.0)
    assert record["loras"][0]["call_defaults"] == FAST
    record = provenance.record(pipe, {"prompt": "a", "seed": 0, "num_inference_steps": 5, "cfg_scale": 2.0})
    assert (record["num_inference_steps"], record["cfg_scale"]) == (5, 2.0)
    pipe.clear_lora()
    record = provenance.record(pipe, {"prompt": "a", "seed": 0, "cfg_scale": 2.0})
    assert (record["num_inference_steps"], record["cfg_scale"]) == (6, 2.0)


def test_the_caller_has_precedence(pipe, tmp_path) -> None:
    file = write(pipe, tmp_path / "fast.safetensors", call_defaults=FAST)
    pipe.load_lora(pipe.dit, file, hotload=True, call_defaults={})
    assert defaults(pipe) == (6, 2.0)
    pipe.clear_lora()
    pipe.load_lora(pipe.dit, file, hotload=True, call_defaults={"num_inference_steps": 9})
    assert defaults(pipe) == (9, 2.0)
    pipe.clear_lora()
    pipe.load_lora(pipe.dit, file, alpha=-0.5, hotload=True)
    assert defaults(pipe) == (6, 2.0)


def test_two_loras_must_agree(pipe, tmp_path) -> None:
    pipe.load_lora(pipe.dit, write(pipe, tmp_path / "fast.safetensors", call_defaults=FAST), hotload=True)
    other = write(pipe, tmp_path / "other.safetensors", seed=2, call_defaults={"num_inference_steps": 8})
    with pytest.raises(ValueError, match=r"other.safetensors sets num_inference_steps=8 .*fast.safetensors, which is"):
        pipe.load_lora(pipe.dit, other, hotload=True)
    assert len(pipe.loras) == 1
    pipe.load_lora(pipe.dit, other, hotload=True, call_defaults={})
    same = write(pipe, tmp_path / "same.safetensors", seed=3, call_defaults={"cfg_scale": 1})
    pipe.load_lora(pipe.dit, same, hotload=True)
    assert (defaults(pipe), len(pipe.loras)) == ((3, 1.0), 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"num_inferense_steps": 4},
            "'num_inferense_steps', which .* does not take; did you mean 'num_inference_steps'",
        ),
        ({"num_inference_steps": 0}, "sets a default that calls refuse: num_inference_steps=0: expected an integer"),
        ({"cfg_scale": "1"}, "sets a default that calls refuse: cfg_scale="),
    ],
)
def test_defaults_that_calls_refuse(pipe, tmp_path, wrong, message) -> None:
    file = write(pipe, tmp_path / "wrong.safetensors", call_defaults=wrong)
    with pytest.raises(ValueError, match=message):
        pipe.load_lora(pipe.dit, file)
    assert pipe.loras == ()
    pipe.load_lora(pipe.dit, file, call_defaults={})


def test_another_spelling_keeps_them(pipe, tmp_path) -> None:
    file = write(pipe, tmp_path / "fast.safetensors", call_defaults=FAST)
    written = pipe.convert_lora(file, tmp_path / "kohya.safetensors", spelling="kohya")
    pipe.load_lora(pipe.dit, written, hotload=True)
    assert defaults(pipe) == (3, 1.0)


PATCH = "DiffSynth-Studio/Z-Image-Turbo-DistillPatch"


@pytest.mark.parametrize(
    "folder",
    [PATCH, f"{PATCH}@v1", f"models--{PATCH.replace('/', '--')}/snapshots/0123"],
)
def test_a_published_file_is_known_by_its_repository(pipe, tmp_path, folder) -> None:
    path = tmp_path / folder / "model.safetensors"
    path.parent.mkdir(parents=True)
    pipe.load_lora(pipe.dit, write(pipe, path), hotload=True)
    assert defaults(pipe) == (8, 1.0)


def test_which_files_are_known(pipe) -> None:
    def found(cls, path, config=None):
        spec = published_lora(cls, config, [Path(path)])
        return spec and spec.name

    assert found(type(pipe), "style/model.safetensors") is None
    assert found(type(pipe), "any/model.safetensors", ModelConfig(PATCH, origin_file_pattern="x")) is None
    named = ModelConfig(model_id=PATCH, origin_file_pattern="model.safetensors")
    assert found(type(pipe), "any/model.safetensors", named) == "z-image-turbo-distill-patch"
    assert found(int, f"{PATCH}/model.safetensors") is None


@pytest.mark.parametrize(
    ("module", "path", "expected"),
    [
        ("qwen_image:QwenImagePipeline", "qwen-image-edit-2509-lightning-8steps-V1.0-bf16.safetensors", 8),
        ("qwen_image:QwenImagePipeline", "Qwen-Image-Lightning-4steps-V2.0.safetensors", 4),
        ("qwen_image:QwenImagePipeline", "DiffSynth-Studio/Qwen-Image-Distill-LoRA/model.safetensors", 15),
        ("wan:WanVideoPipeline", "Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank64.safetensors", 4),
        ("wan:WanVideoPipeline", "wan2.2_t2v_A14b_low_noise_lora_rank64_lightx2v_4step_1217.safetensors", 4),
        ("flux:FluxImagePipeline", "alimama-creative/FLUX.1-Turbo-Alpha/diffusion_pytorch_model.safetensors", 8),
        ("flux:FluxImagePipeline", "flux.1-turbo-alpha-lora.safetensors", 8),
        ("flux:FluxImagePipeline", "diffusion_pytorch_model.safetensors", None),
    ],
)
def test_published_loras_of_the_families(module, path, expected) -> None:
    from diffsynth.spec import resolve

    spec = published_lora(resolve(f"diffsynth_{module}"), None, [Path(path)])
    assert (spec and spec.defaults["num_inference_steps"]) == expected
