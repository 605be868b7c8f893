"""Tests of the tiny hub: published names and files, recognition by structure, loading, running, and errors."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import diffsynth
from diffsynth import _discovery
from diffsynth.core.loader import files, header, recognize
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.layouts import layout_of
from diffsynth.models.checkpoints import CHECKPOINTS
from diffsynth.runtime.role import Processor
from diffsynth.spec import ModelSpec, parse_source, resolve
from diffsynth.testing import hub as hub_module
from diffsynth.testing import tiny_hub
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage import checkpoints as zimage
from diffsynth_zimage.plugin import MODELS, TINY

FIRST_PARTY = [one.spec for one in _discovery.catalog().models if one.distribution.startswith("diffsynth-")]
IMAGES = [spec for spec in FIRST_PARTY if spec.task == "text-to-image"]
"""Image models only: video models need more arguments and time, and are run on a tiny hub by tests/rows/."""

ON_HUB = [spec for spec in IMAGES if not any("://" in source for source in spec.components.values())]
Z_IMAGE = {spec.name: spec for spec in MODELS}
TURBO = "Tongyi-MAI/Z-Image-Turbo"
TRANSFORMER = f"{TURBO}/transformer/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, [spec.name for spec in ON_HUB])
    return root


@pytest.fixture
def offline(hub, monkeypatch) -> Path:
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    return hub


def headers(root: Path, spec: ModelSpec) -> dict[str, header.Header]:
    place = {"local_model_path": str(root), "skip_download": True}
    return {
        role: header.read(files.find(ModelConfig.from_source(source, **place)))
        for role, source in spec.components.items()
    }


def test_the_files_are_those_of_the_hub(hub):
    expected = {
        f"{TURBO}/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        f"{TURBO}/transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        f"{TURBO}/transformer/diffusion_pytorch_model.safetensors.index.json",
        f"{TURBO}/text_encoder/model-00001-of-00002.safetensors",
        f"{TURBO}/text_encoder/model-00002-of-00002.safetensors",
        f"{TURBO}/text_encoder/model.safetensors.index.json",
        f"{TURBO}/vae/diffusion_pytorch_model.safetensors",
        f"{TURBO}/tokenizer/tokenizer.json",
        f"{TURBO}/tokenizer/tokenizer_config.json",
        "Tongyi-MAI/Z-Image/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "Tongyi-MAI/Z-Image/transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "Tongyi-MAI/Z-Image/transformer/diffusion_pytorch_model.safetensors.index.json",
    }
    there = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()}
    assert expected <= there
    assert not [name for name in there if name.startswith("Tongyi-MAI/Z-Image/") and "transformer" not in name]


def test_an_index_lists_every_tensor_where_it_is(hub):
    index = json.loads((hub / f"{TRANSFORMER}.safetensors.index.json").read_text(encoding="utf-8"))
    for shard in ("diffusion_pytorch_model-00001-of-00002", "diffusion_pytorch_model-00002-of-00002"):
        file = hub / TURBO / "transformer" / f"{shard}.safetensors"
        listed = {key for key, name in index["weight_map"].items() if name == file.name}
        assert listed == set(header.read([file]).tensors) != set()
    data = headers(hub, Z_IMAGE["z-image-turbo"])["dit"].tensors.values()
    assert index["metadata"]["total_size"] == sum(info.end - info.start for info in data)


def test_all_models_of_hubs_are_tried():
    assert {"z-image-turbo", "z-image"} <= {spec.name for spec in ON_HUB}
    assert {spec.name for spec in IMAGES} - {spec.name for spec in ON_HUB} == {"z-image-nano"}


@pytest.mark.parametrize("spec", ON_HUB, ids=lambda spec: spec.name)
def test_structure_alone_tells_every_file_and_its_config(spec, hub):
    architectures, checkpoints = _discovery.catalog().layouts()
    for role, tensors in headers(hub, spec).items():
        assert {name for name in tensors.metadata if name.startswith("diffsynth")} == set()
        (found,) = recognize.recognize(tensors, architectures, checkpoints)
        tiny = resolve(found.architecture.tiny)
        assert (found.tier, found.extra, found.prefix) == ("structure", (), "")
        assert found.config == dataclasses.replace(tiny, **spec.tiny.get(role, {}))
        # The stem is that of the files which a glob stands for.
        assert "*" not in spec.components[role] or found.checkpoint.file_stem in tensors.files[0].name


@pytest.mark.parametrize("name", ["z-image-turbo", "z-image"])
def test_keys_are_published_ones_and_constants_are_kept(name, hub):
    layouts = {one.architecture: layout_of(one) for one in (*CHECKPOINTS, *zimage.CHECKPOINTS) if not one.rules}
    tensors = headers(hub, Z_IMAGE[name])
    for role, name in {"dit": "z_image_dit", "text_encoder": "qwen3_text_encoder", "vae": "flux_autoencoder"}.items():
        assert set(tensors[role].tensors) < set(layouts[name])
        assert {info.dtype for info in tensors[role].tensors.values()} == {"BF16"}
        heads = [key for key in tensors[role].tensors if key.endswith(("norm_q.weight", "q_norm.weight"))]
        assert all(tensors[role].tensors[key].shape == layouts[name][key] == (128,) for key in heads)
        assert bool(heads) is (role != "vae")


@pytest.mark.parametrize("spec", ON_HUB, ids=lambda spec: spec.name)
def test_sizes(spec, hub):
    found = [path for tensors in headers(hub, spec).values() for path in tensors.files]
    assert 1_000_000 < sum(path.stat().st_size for path in found) < hub_module.MAX_MODEL_BYTES == 40_000_000


def test_size_of_all(hub):
    assert sum(path.stat().st_size for path in hub.rglob("*") if path.is_file()) < 1_000_000_000


@pytest.mark.parametrize("spec", ON_HUB, ids=lambda spec: spec.name)
def test_a_model_loads_and_generates(spec, offline):
    pipe = diffsynth.load(spec.hub_id, device="cpu", torch_dtype=torch.float32)
    image = pipe("an apple", height=64, width=64, num_inference_steps=2, seed=0)
    assert image.size == (64, 64)
    assert len(image.getcolors(64 * 64)) > 1000
    assert diffsynth.registry.get(spec.name).weights == "present"


def test_the_tokenizer_works_and_fits_the_text_encoder(hub):
    tokenizer = AutoTokenizer.from_pretrained(hub / TURBO / "tokenizer", local_files_only=True, trust_remote_code=False)
    assert len(tokenizer) == 261 <= TINY["text_encoder"]["vocab_size"]
    assert tokenizer.decode(tokenizer("Ein Apfel, 苹果")["input_ids"]) == "Ein Apfel, 苹果"
    messages = [{"role": "user", "content": "hi"}]
    template = {"tokenize": False, "add_generation_prompt": True}
    thinking = tokenizer.apply_chat_template(messages, enable_thinking=True, **template)
    assert thinking == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, enable_thinking=False, **template) == (
        thinking + "<think>\n\n</think>\n\n"
    )
    assert len(tokenizer("<|im_start|><think></think><|im_end|>")["input_ids"]) == 4


def test_the_same_bytes_again_and_a_hub_that_grows(hub, tmp_path):
    tiny_hub(tmp_path / "new", "z-image-turbo")
    name = f"{TRANSFORMER}-00002-of-00002.safetensors"
    assert (tmp_path / "new" / name).read_bytes() == (hub / name).read_bytes()
    assert not (tmp_path / "new" / "Tongyi-MAI" / "Z-Image").exists()
    base = hub / name.replace("Z-Image-Turbo", "Z-Image")
    assert base.read_bytes() != (hub / name).read_bytes()
    written = tiny_hub(tmp_path / "new", ["Tongyi-MAI/Z-Image"])
    assert tmp_path / "new" / name.replace("Z-Image-Turbo", "Z-Image") in written
    assert json.loads((tmp_path / "new" / hub_module.MARK).read_text())["models"] == ["z-image", "z-image-turbo"]


def test_a_model_from_a_wheel_needs_nothing(tmp_path):
    assert tiny_hub(tmp_path, ["z-image-nano"]) == []


def test_an_unknown_model(tmp_path):
    with pytest.raises(diffsynth.errors.UnknownModel, match="'z-image-tubro'.*did you mean 'z-image-turbo'"):
        tiny_hub(tmp_path, ["z-image-tubro"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_real_weights_is_left_alone(tmp_path):
    (tmp_path / "Tongyi-MAI").mkdir()
    with pytest.raises(FileExistsError, match="is not empty and not a tiny hub"):
        tiny_hub(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["Tongyi-MAI"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["z-image-turbo"], 0, "DIFFSYNTH_MODEL_BASE_PATH="),
        (["z-image-tubro"], 2, "UnknownModel: 'z-image-tubro' is not installed; did you mean 'z-image-turbo'?"),
    ],
)
def test_by_hand(arguments, code, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffsynth.testing", "tiny-hub", str(tmp_path / "hub"), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("diffsynth.testing", run_name="__main__")
    assert ended.value.code == code
    assert text in "".join(capsys.readouterr())
    assert (tmp_path / "hub" / TURBO).is_dir() is (code == 0)


def test_models_that_share_a_file_must_agree(tmp_path, monkeypatch):
    first, second = Z_IMAGE["z-image-turbo"], Z_IMAGE["z-image"]
    other = {**TINY, "text_encoder": {**TINY["text_encoder"], "vocab_size": 400}}
    changed = dataclasses.replace(second, tiny=other)
    monkeypatch.setattr(hub_module, "_chosen", lambda models: [first, changed])
    with pytest.raises(ValueError, match=r"'z-image-turbo' and 'z-image' share Tongyi-MAI/Z-Image-Turbo:text_encoder"):
        tiny_hub(tmp_path / "hub")


def _with_components(**sources: str) -> ModelSpec:
    turbo = Z_IMAGE["z-image-turbo"]
    return dataclasses.replace(turbo, components={**turbo.components, **sources})


def test_a_file_that_no_checkpoint_lists_has_the_names_of_its_architecture(tmp_path, monkeypatch):
    source = "Someone/Fine-Tune:transformer/*.safetensors"
    tuned = _with_components(dit=source)
    monkeypatch.setattr(hub_module, "_chosen", lambda models: [tuned])
    tiny_hub(tmp_path)
    found = headers(tmp_path, tuned)["dit"]
    assert found.files[0].name == "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert "layers.1.attention.to_q.weight" in found.tensors


def test_two_components_in_one_file(tmp_path, monkeypatch):
    source = "Someone/All-In-One:all.safetensors"
    whole = _with_components(text_encoder=source, vae=source)
    monkeypatch.setattr(hub_module, "_chosen", lambda models: [whole])
    tiny_hub(tmp_path)
    found = recognize.recognize(headers(tmp_path, whole)["vae"], *_discovery.catalog().layouts())
    assert {one.architecture.name for one in found} == {"qwen3_text_encoder", "flux_autoencoder"}


def test_a_file_of_an_architecture_whose_own_names_nobody_publishes(tmp_path, monkeypatch):
    architectures, checkpoints = _discovery.catalog().layouts()
    renamed = [one for one in checkpoints if one.rules or one.architecture not in ("z_image_dit", "z_image_omni_dit")]
    monkeypatch.setattr(_discovery.Catalog, "layouts", lambda self: (architectures, renamed))
    with pytest.raises(ValueError, match=r"'z-image': no checkpoint of z_image_dit or z_image_omni_dit lists 'Tongyi"):
        tiny_hub(tmp_path / "hub", "z-image")


def test_a_processor_that_nobody_can_make_small(tmp_path, monkeypatch):
    roles = {**ZImagePipeline.roles, "tokenizer": Processor(source="a/b:c/", loader="transformers:AutoProcessor")}
    monkeypatch.setattr(ZImagePipeline, "roles", roles)
    with pytest.raises(ValueError, match=r"model 'z-image': no tiny tokenizer.*tiny_processors\['tokenizer'\]"):
        tiny_hub(tmp_path / "hub", "z-image")
    own = {"tokenizer": "diffsynth.testing.tiny_processors:write_byte_tokenizer"}
    spec = dataclasses.replace(Z_IMAGE["z-image"], tiny_processors=own)
    monkeypatch.setattr(hub_module, "_chosen", lambda models: [spec])
    source = parse_source(spec.processors["tokenizer"])
    assert tmp_path / "hub" / source.model_id / "tokenizer" in tiny_hub(tmp_path / "hub")
