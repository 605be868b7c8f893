"""The example plugin with a tiny autoencoder, which takes the place of FLUX.1's autoencoder in Z-Image."""

import re
import runpy
import sys
from importlib.resources import files

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import load_file, save_file

import diffsynth
from diffsynth import ModelConfig, _discovery
from diffsynth.core.loader import header, recognize
from diffsynth.core.vram.managed import managed
from diffsynth.errors import Unrecognized
from diffsynth.spec import resolve
from diffsynth_zimage import ZImagePipeline
from example_plugins import EXAMPLES, installed, run_conformance
from limited import let_blocks_travel
from parity import relative_error

EXAMPLE = EXAMPLES / "tiny_autoencoder"
NANO = files("diffsynth_zimage") / "nano"
CALL = {"prompt": "a red apple", "seed": 0, "num_inference_steps": 2, "output_type": "tensor"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Install the example beside Z-Image, make its weights as its README does, and return their file."""
    folder = tmp_path_factory.mktemp("tinyae")
    with installed("tiny_autoencoder", folder=folder, beside=["zimage"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_weights.py", str(folder / "tinyae.safetensors")])
        patch.chdir(folder)
        runpy.run_path(str(EXAMPLE / "make_weights.py"), run_name="__main__")
        yield folder / "tinyae.safetensors"


@pytest.fixture
def load(weights):
    def load(file=weights, **options):
        return diffsynth.load(
            "z-image-nano", components={"vae": file}, device="cpu", torch_dtype=torch.float32, **options
        )

    return load


def test_it_conforms(weights):
    assert "tiny_autoencoder has what roles of flux_autoencoder need" in run_conformance("tiny_autoencoder")


def test_it_equals_taesd(weights):
    """diffusers has the same network under the same tensor names."""
    torch.manual_seed(0)
    blocks = {"num_encoder_blocks": (1, 2, 1, 1), "num_decoder_blocks": (2, 1, 1, 1)}
    widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    theirs = AutoencoderTiny(latent_channels=6, **blocks, **widths).eval().requires_grad_(False)
    config = resolve("diffsynth_tinyae.config:infer_config")(
        {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    )
    ours = resolve("diffsynth_tinyae.vae:TinyAutoencoder")(config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    image, latents = torch.rand(2, 3, 24, 40) * 2 - 1, 3 * torch.randn(2, 6, 3, 5)
    assert relative_error(ours.encode(image), theirs.encode(image).latents) < 1e-6
    assert relative_error(ours.decode(latents), theirs.decode(latents).sample) < 1e-6


def test_it_decodes_and_encodes_in_place_of_the_models_own(load, weights):
    pipe, own = load(), diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)
    assert type(pipe.vae).__name__ == "TinyAutoencoder"
    assert [file.name for file in pipe.component_files["vae"]] == [weights.name]
    image, tiled = pipe(**CALL), pipe(**CALL, tiled=True, tile_size=12, tile_stride=8)
    assert image.shape == tiled.shape == (1, 3, 128, 128)
    assert not torch.equal(image, own(**CALL))
    latents = [each(**{**CALL, "output_type": "latents"}) for each in (pipe, own)]
    assert torch.equal(*latents)
    started = {"input_image": Image.new("RGB", (64, 64), "blue"), "denoising_strength": 0.5, "output_type": "latents"}
    assert not torch.equal(pipe(**CALL | started), own(**CALL | started))


@pytest.mark.parametrize("policy", ["cpu-offload", "disk"])
def test_a_policy_changes_no_bit(load, policy, monkeypatch):
    """Blocks of this size would stay on the device; here, all are streamed."""
    let_blocks_travel(monkeypatch)
    streamed = load(policy=policy)
    assert {"encoder.layers.1", "decoder.layers.2", "decoder.layers.4"} <= set(managed(streamed.vae).blocks)
    image = {"input_image": Image.new("RGB", (128, 128), "blue"), "denoising_strength": 0.5}
    assert torch.equal(streamed(**CALL, **image), load()(**CALL, **image))


def test_the_readme_runs(weights):
    (code,) = re.findall(r"^```python\n(.*?)^```", (EXAMPLE / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code.replace("seed=0", "seed=0, num_inference_steps=1"), names)
    assert names["image"].size == (128, 128)


def test_a_file_without_our_metadata_is_recognised_and_fills_the_role(weights, tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(weights), plain)
    (found,) = recognize.recognize(header.read([plain]), *_discovery.catalog().layouts())
    assert (found.architecture.name, found.tier) == ("tiny_autoencoder", "structure")
    pipe = ZImagePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[
            ModelConfig(path) for path in (NANO / "dit.safetensors", plain, NANO / "text_encoder.safetensors")
        ],
        tokenizer_config=ModelConfig.from_source("package://diffsynth_zimage/nano/tokenizer/"),
    )
    assert type(pipe.vae).__name__ == "TinyAutoencoder"


def test_two_autoencoders_are_refused(weights):
    """The second file found its role filled, and the message called it a second one of the first's architecture."""
    configs = [ModelConfig(path) for path in (NANO / "vae.safetensors", weights)]
    message = "a tiny_autoencoder; role vae of ZImagePipeline is filled already, by a flux_autoencoder"
    with pytest.raises(Unrecognized, match=message):
        ZImagePipeline.from_pretrained(device="cpu", model_configs=configs)
