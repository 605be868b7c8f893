"""The networks of Qwen-Image-i2L: their published files, told apart by their residual, and the layers they change."""

from __future__ import annotations

import pytest
import torch

import parity
from diffsynth import _discovery
from diffsynth.core.loader import layouts
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.recognize import recognize
from diffsynth.models.image_config import tiny_image_to_lora_inputs
from diffsynth.models.image_to_lora import ImageToLoRA
from diffsynth_qwen_image import image_to_lora_config
from diffsynth_qwen_image.config import TINY_DIT
from diffsynth_qwen_image.dit import QwenImageDiT
from published_tensors import load_published

PUBLISHED = {
    "style": image_to_lora_config.STYLE,
    "coarse": image_to_lora_config.COARSE,
    "fine": image_to_lora_config.FINE,
}


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_the_published_files(kind, tier):
    architectures, checkpoints = _discovery.catalog().layouts()
    spec = next(each for each in checkpoints if each.name == image_to_lora_config.architecture_name(kind))
    shapes = layouts.layout_of(spec)
    file = Header({key: TensorInfo("BF16", shape) for key, shape in shapes.items()})
    (found,) = recognize(file, architectures, checkpoints, tiers=(tier,))
    assert (found.architecture.name, found.config) == (spec.architecture, PUBLISHED[kind])
    if tier == "signature":
        with torch.device("meta"):
            assert parity.shapes_of(ImageToLoRA(PUBLISHED[kind])) == shapes


@pytest.mark.parametrize("kind", PUBLISHED)
@torch.no_grad()
def test_the_layers_it_changes_are_those_of_the_transformer(kind):
    tiny = getattr(image_to_lora_config, f"TINY_{kind.upper()}")
    weights = parity.draw_weights(parity.shapes_of(ImageToLoRA(tiny)))
    network = load_published(weights, expect=image_to_lora_config.architecture_name(kind))
    assert network.config == tiny
    lora = network(**tiny_image_to_lora_inputs(tiny, torch.Generator().manual_seed(0)))
    with torch.device("meta"):
        names = {name for name, part in QwenImageDiT(TINY_DIT).named_modules() if isinstance(part, torch.nn.Linear)}
    assert len(lora) == 12
    assert set(lora) <= names


def test_other_networks_are_refused():
    shapes = parity.shapes_of(ImageToLoRA(image_to_lora_config.TINY_STYLE))
    with pytest.raises(ValueError, match="its residual has 0 tokens; expected 71"):
        image_to_lora_config.infer_coarse_config(shapes)
