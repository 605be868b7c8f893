"""Published layouts of Qwen-Image are recognised by signature and structure, with their configs, and load strictly."""

from __future__ import annotations

import pytest
import torch

from diffsynth import ModelConfig, _discovery
from diffsynth.core.loader import component, recognize
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.layouts import layout_of
from diffsynth.errors import CorruptFile, NotRunnable
from diffsynth.models.config import Qwen25VLTextEncoderConfig, WanAutoencoderConfig
from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_qwen_image.checkpoints import CHECKPOINTS
from diffsynth_qwen_image.config import QwenImageDiTConfig

CONFIGS = {
    "qwen_image_dit": QwenImageDiTConfig(),
    "qwen_image_dit/layered": QwenImageDiTConfig(layered=True),
}
WITH_LAYOUT = {spec.name: spec for spec in CHECKPOINTS if spec.layout}


def head(tensors: dict[str, tuple[int, ...]]) -> Header:
    return Header({name: TensorInfo("BF16", tuple(shape)) for name, shape in tensors.items()})


def recognized(file: Header, *tiers: str) -> list[recognize.Recognized]:
    return recognize.recognize(file, *_discovery.catalog().layouts(), tiers=tiers)


@pytest.mark.parametrize("tier", ["signature", "structure"])
@pytest.mark.parametrize("name", WITH_LAYOUT)
def test_a_published_layout_is_recognised_and_loaded(name: str, tier: str) -> None:
    file = head(layout_of(WITH_LAYOUT[name]))
    (found,) = recognized(file, tier)
    assert (found.checkpoint.name if tier == "signature" else name, found.config) == (name, CONFIGS[name])
    assert found.extra == ()
    module = component.load_component(found, file, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_every_layout_has_its_config_here() -> None:
    assert set(CONFIGS) == set(WITH_LAYOUT)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "pipe.dit.", "transformer."])
def test_a_prefix_changes_nothing(prefix: str) -> None:
    plain = layout_of(WITH_LAYOUT["qwen_image_dit"])
    (found,) = recognized(head({f"{prefix}{name}": shape for name, shape in plain.items()}), "structure")
    assert (found.config, found.prefix) == (QwenImageDiTConfig(), prefix)


def published(name: str) -> dict[str, tuple[int, ...]]:
    """Return key -> shape of the published layout of a checkpoint, of this family or of core."""
    return layout_of(next(spec for spec in _discovery.catalog().layouts()[1] if spec.name == name))


TEXT_ENCODER, VAE = "qwen2.5_vl_text_encoder", "wan_autoencoder"


def nested(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return names of Qwen2.5-VL as newer versions of transformers write them."""
    renamed = {name if name.startswith("model.") else f"model.{name}": shape for name, shape in names.items()}
    old = {"model.embed_tokens.", "model.layers.", "model.norm."}
    return {
        name.replace("model.", "model.language_model.", 1) if name.startswith(tuple(old)) else name: shape
        for name, shape in renamed.items()
    }


def without_head(names: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in names.items() if name != "lm_head.weight"}


@pytest.mark.parametrize(
    ("part", "change", "config"),
    [
        (TEXT_ENCODER, without_head, Qwen25VLTextEncoderConfig()),
        (TEXT_ENCODER, lambda names: nested(without_head(names)), Qwen25VLTextEncoderConfig()),
        (VAE, dict, WanAutoencoderConfig()),
    ],
    ids=["text encoder", "text encoder, newer names", "autoencoder, names of Wan"],
)
def test_split_files_of_other_tools(part: str, change, config) -> None:
    file = head(change(published(part)))
    (found,) = recognized(file, "structure")
    assert (found.architecture.name, found.config, found.extra) == (part, config, ())
    component.load_component(found, file, device="meta", dtype=torch.bfloat16)


def test_all_components_in_one_file() -> None:
    """With the prefixes of ComfyUI, and a number of its own."""
    parts = {"model.diffusion_model.": "qwen_image_dit", "text_encoders.qwen25_7b.transformer.": TEXT_ENCODER}
    parts["vae."] = VAE
    tensors = {prefix + key: shape for prefix, name in parts.items() for key, shape in published(name).items()}
    file = head(tensors | {"text_encoders.qwen25_7b.logit_scale": ()})
    found = recognized(file, "structure")
    assert {one.prefix: one.checkpoint.name for one in found} == parts
    assert [key for one in found for key in one.extra] == ["text_encoders.qwen25_7b.logit_scale"]
    for one in found:
        module = component.load_component(one, file, device="meta", dtype=torch.bfloat16)
        assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_qwen_video_edit_is_named() -> None:
    """It is Qwen-Image below a prefix, with two more layers: without its name it would load as Qwen-Image."""
    names = {f"pipe.dit.{key}": shape for key, shape in published("qwen_image_dit").items()}
    names |= {"in_proj.proj.weight": (3072, 16, 1, 2, 2), "in_proj.proj.bias": (3072,)}
    names |= {"out_proj.proj.weight": (64, 3072), "out_proj.proj.bias": (64,)}
    for tier in ("signature", "structure"):
        (found,) = recognized(head(names), tier)
        assert (found.architecture.name, found.extra) == ("qwen_video_edit_dit", ())
        with pytest.raises(NotRunnable, match="recognised, not yet runnable: the transformer of Qwen-Video-Edit"):
            component.load_component(found, head(names), device="meta", dtype=torch.bfloat16)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in names.items()}
    with pytest.raises(NotRunnable, match="not yet runnable: the transformer of Qwen-Video-Edit"):
        QwenImagePipeline.from_pretrained(model_configs=[ModelConfig(state_dict=tensors)])


def test_gguf_is_named(tmp_path) -> None:
    file = tmp_path / "qwen-image-Q4_K_M.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(600))
    with pytest.raises(CorruptFile, match="is a GGUF file, quantised for other programs"):
        QwenImagePipeline.from_pretrained(model_configs=[ModelConfig(path=file)])
