"""Images from files as on the hub, without our metadata."""

import pytest
import torch
from safetensors.torch import save_file

import diffsynth
from diffsynth.core.loader.config import ModelConfig
from diffsynth.errors import MissingComponent, NoFiles, Unrecognized
from diffsynth.models.config import TINY_FLUX_AUTOENCODER, Qwen3TextEncoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.qwen3 import Qwen3TextEncoder
from diffsynth.runtime.role import Role
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage.config import TINY_DIT
from diffsynth_zimage.dit import ZImageDiT

DIT = "transformer/*.safetensors"
TEXT_ENCODER = "text_encoder/*.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CALL = {"prompt": "an apple", "height": 48, "width": 32, "num_inference_steps": 2, "seed": 0, "output_type": "latents"}


@pytest.fixture(scope="module")
def modules():
    torch.manual_seed(0)
    config = Qwen3TextEncoderConfig(
        hidden_size=TINY_DIT.cap_feat_dim,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=len(byte_tokenizer()),
    )
    dit = ZImageDiT(TINY_DIT)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return {"dit": dit, "text_encoder": Qwen3TextEncoder(config), "vae": FluxAutoencoder(TINY_FLUX_AUTOENCODER)}


@pytest.fixture
def hub(modules, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    folder = tmp_path / "Tongyi-MAI" / "Z-Image-Turbo"
    for name in ("transformer", "text_encoder", "vae", "tokenizer"):
        (folder / name).mkdir(parents=True)
    state = modules["dit"].state_dict()
    keys = sorted(state)
    for i in range(3):
        shard = folder / "transformer" / f"diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors"
        save_file({key: state[key].clone() for key in keys[i::3]}, shard)
    save_file(dict(modules["text_encoder"].state_dict()), folder / "text_encoder" / "model.safetensors")
    save_file(dict(modules["vae"].state_dict()), folder / "vae" / "diffusion_pytorch_model.safetensors")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def configs(*patterns):
    return [ModelConfig(model_id="Tongyi-MAI/Z-Image-Turbo", origin_file_pattern=pattern) for pattern in patterns]


def test_files_give_what_the_modules_give(hub, modules):
    loaded = ZImagePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=configs(DIT, TEXT_ENCODER, VAE),
        tokenizer_config=ModelConfig(model_id="Tongyi-MAI/Z-Image-Turbo", origin_file_pattern="tokenizer/"),
    )
    put_together = ZImagePipeline.from_components(
        **modules, tokenizer=byte_tokenizer(), device="cpu", torch_dtype=torch.float32
    )
    assert torch.equal(loaded(**CALL), put_together(**CALL))
    assert [file.name[-20:-12] for file in loaded.component_files["dit"]] == ["of-00003"] * 3


@pytest.mark.parametrize("name", ["z-image-turbo", "Z-Image-Turbo", "Tongyi-MAI/Z-Image-Turbo", "zimage:z-image-turbo"])
def test_load_by_any_spelling(hub, name):
    pipe = diffsynth.load(name, device="cpu", torch_dtype=torch.float32)
    assert pipe.model_name == "z-image-turbo"
    assert pipe("a", height=16, width=16, num_inference_steps=1).size == (16, 16)


def test_a_missing_component_is_named(hub):
    with pytest.raises(MissingComponent, match="ZImagePipeline needs vae; the files given hold dit, text_encoder"):
        ZImagePipeline.from_pretrained(device="cpu", model_configs=configs(DIT, TEXT_ENCODER))


def test_a_checkpoint_twice(hub):
    with pytest.raises(Unrecognized, match="a second flux_autoencoder; role vae"):
        ZImagePipeline.from_pretrained(device="cpu", model_configs=configs(DIT, VAE, VAE))


def test_a_checkpoint_of_another_role(hub, monkeypatch):
    roles = {**ZImagePipeline.roles, "vae": Role(architectures=("another_autoencoder",), optional=True)}
    monkeypatch.setattr(ZImagePipeline, "roles", roles)
    with pytest.raises(Unrecognized, match="this is a flux_autoencoder, which ZImagePipeline has no role for"):
        ZImagePipeline.from_pretrained(device="cpu", model_configs=configs(DIT, TEXT_ENCODER, VAE))


def test_an_unknown_argument(hub):
    with pytest.raises(TypeError, match=r"takes no 'vram_limt'; did you mean 'vram_limit'\? It takes torch_dtype, dev"):
        ZImagePipeline.from_pretrained(vram_limt=3)
    with pytest.raises(TypeError, match="takes no 'offload_mode'. It takes .* vram_limit and policy are all there is"):
        ZImagePipeline.from_pretrained(offload_mode="sequential_cpu_offload")
    with pytest.raises(TypeError, match="takes no 'tokeniser_config'; did you mean 'tokenizer_config'"):
        ZImagePipeline.from_pretrained(tokeniser_config=None)


def test_a_missing_shard_is_named_and_nothing_is_loaded(hub):
    (hub / "transformer" / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(NoFiles, match="diffusion_pytorch_model-00002-of-00003"):
        diffsynth.load("z-image-turbo", device="cpu")


def test_a_model_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    with pytest.raises(NoFiles, match="no file matches.*transformer.*Downloads are off"):
        diffsynth.load("z-image", base_path=tmp_path)


def test_an_unknown_model():
    with pytest.raises(diffsynth.errors.UnknownModel, match="'z-image-tubro'.*did you mean 'z-image-turbo'"):
        diffsynth.load("z-image-tubro")


def test_weights_states(hub):
    assert diffsynth.registry.get("z-image-turbo").weights == "present"
    assert diffsynth.registry.get("z-image").weights == "partial"


@pytest.mark.parametrize("policy", [None, "cpu-offload", "disk"])
def test_the_state_of_a_program_does_not_matter(hub, monkeypatch, policy):
    """Inference mode and other defaults than fp32 on the CPU changed results, or ended in errors of torch; files were
    looked up again in another folder.
    """
    monkeypatch.chdir(hub.parents[1])

    def result():
        pipe = diffsynth.load("z-image-turbo", device="cpu", torch_dtype=torch.float32, base_path=".", policy=policy)
        return pipe, pipe(**CALL)

    _, expected = result()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            pipe, found = result()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert not any(parameter.is_inference() for parameter in pipe.dit.parameters())
    monkeypatch.chdir(hub)
    assert torch.equal(pipe(**CALL), expected)


def test_no_dtype(hub):
    with pytest.raises(TypeError, match="torch_dtype='bfloat16': expected torch.bfloat16"):
        diffsynth.load("z-image-turbo", device="cpu", torch_dtype="bfloat16")
