import json
import re

from diffsynth.runtime.parameters_text import parameters_text
from parameters_reader import read_parameters

RECORD = {
    "model": "z-image-nano",
    "prompt": "a lighthouse,\nin fog: 8k",
    "seed": 965400086,
    "num_inference_steps": 20,
    "cfg_scale": 7.0,
    "solver": "euler_ancestral",
    "arguments": {"negative_prompt": "blur,\nhaze", "denoising_strength": 0.75},
    "versions": {"diffsynth-core": "0.1.0"},
    "weights": {"dit": {"dit.safetensors": "sha256:0123456789abcdef"}, "vae": {"vae.safetensors": "sha256:ff"}},
    "loras": [
        {"role": "dit", "files": {"style.safetensors": "sha256:fedcba9876543210"}},
        {"role": "dit", "files": {"own.safetensors": "sampled-sha256:00"}},
        {"role": "dit", "files": {"ink, wet.safetensors": "sha256:aaaaaaaaaabbbb"}},
    ],
}


def test_a_reader_of_a1111_has_every_value():
    assert read_parameters(parameters_text(RECORD, (64, 32))) == {
        "Prompt": "a lighthouse,\nin fog: 8k",
        "Negative prompt": "blur,\nhaze",
        "Steps": "20",
        "Sampler": "Euler a",
        "CFG scale": "7.0",
        "Seed": "965400086",
        "Size": "64x32",
        "Model hash": "0123456789",
        "Model": "z-image-nano",
        "Denoising strength": "0.75",
        "Lora hashes": "style: fedcba9876, ink, wet: aaaaaaaaaa",
        "Version": "diffsynth-core 0.1.0",
    }


def test_what_is_not_known_is_left_out():
    text = parameters_text({"model": None, "seed": 1, "weights": {"dit": {"a": "sha256:1", "b": "sha256:2"}}}, (8, 8))
    assert text == "Seed: 1, Size: 8x8"
    assert parameters_text({"prompt": ["a", "b"], "solver": "own"}, (8, 8)) == '["a", "b"]\nSampler: own, Size: 8x8'


def test_values_are_quoted_as_json():
    text = parameters_text({"prompt": "", "model": 'a, "b"', "seed": 3}, (8, 8))
    assert json.loads(re.search(r"Model: (\".*\")", text)[1]) == 'a, "b"'
    assert read_parameters(text + ", x: 1")["Model"] == 'a, "b"'
