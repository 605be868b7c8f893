"""Tiny LoRAs and ControlNets of Qwen-Image under the file names of the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffsynth.core.loader.save import save_checkpoint
from diffsynth.core.lora import LoRA, LoRALayer, save_lora, target_layers
from diffsynth.models.dinov3 import Dinov3ImageEncoder
from diffsynth.models.image_config import TINY_DINOV3, TINY_SIGLIP
from diffsynth.models.image_to_lora import ImageToLoRA
from diffsynth.models.siglip import SiglipImageEncoder
from diffsynth_qwen_image import image_to_lora_config
from diffsynth_qwen_image.blockwise_controlnet import BlockwiseControlNet
from diffsynth_qwen_image.checkpoints import LORA_TARGETS
from diffsynth_qwen_image.config import TINY_DIT
from diffsynth_qwen_image.controlnet import QwenImageControlNet
from diffsynth_qwen_image.controlnet_config import TINY_BLOCKWISE, TINY_CONTROLNET
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.models import TINY
from parity import draw_weights, shapes_of

_UNION = replace(TINY_CONTROLNET, **TINY["dit"])
_PLAIN = replace(TINY_BLOCKWISE, dim=_UNION.dim)
CONTROLNETS = {
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny:model.safetensors": _PLAIN,
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Depth:model.safetensors": _PLAIN,
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Inpaint:model.safetensors": replace(_PLAIN, additional_in_dim=4),
    "InstantX/Qwen-Image-ControlNet-Union:diffusion_pytorch_model.safetensors": _UNION,
}
"""File of a ControlNet -> its config."""


def write_controlnets(root: Path) -> None:
    """Write the ControlNets of `CONTROLNETS` below the root of a tiny hub."""
    for seed, (source, config) in enumerate(CONTROLNETS.items()):
        model, _, file = source.partition(":")
        kind = "qwen_image_controlnet" if config is _UNION else "qwen_image_blockwise_controlnet"
        network = (QwenImageControlNet if config is _UNION else BlockwiseControlNet)(config)
        network.load_state_dict(draw_weights(shapes_of(network), seed))
        (root / model).mkdir(parents=True, exist_ok=True)
        save_checkpoint(network, root / model / file, architecture=kind, config=config, layout=kind)


def write_lora(root: Path, source: str, seed: int) -> None:
    """Write a LoRA with an alpha for each layer, as those of Lightning have."""
    with torch.device("meta"):
        dit = QwenImageDiT(replace(TINY_DIT, **TINY["dit"]))
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name in target_layers(dit, LORA_TARGETS):
        outputs, inputs = dit.get_submodule(name).weight.shape
        down, up = (torch.randn(shape, generator=generator) / 8 for shape in ((2, inputs), (outputs, 2)))
        layers[name] = LoRALayer(down, up, alpha=4.0)
    model, _, file = source.partition(":")
    (root / model).mkdir(parents=True, exist_ok=True)
    save_lora(LoRA(layers), root / model / file)


def write_image_to_lora(root: Path) -> None:
    """Write the image encoders, the networks that make LoRAs, and what they need of the published processors: image
    sides that are not limited to less than 1024 pixels, and "assistant" as one token.
    """
    dit = replace(TINY_DIT, **TINY["dit"])
    sizes = {16: dit.dim, 64: dit.ffn_dim, 96: 6 * dit.dim}
    encoders = {"SigLIP2-G384": SiglipImageEncoder(TINY_SIGLIP), "DINOv3-7B": Dinov3ImageEncoder(TINY_DINOV3)}
    files = {}
    for name, module in encoders.items():
        files[f"General-Image-Encoders/{name}/model"] = draw_weights(shapes_of(module), seed=1)
    for kind in ("style", "coarse", "fine"):
        tiny = getattr(image_to_lora_config, f"TINY_{kind.upper()}")
        groups = tuple(tuple((name, sizes[a], sizes[b]) for name, a, b in group) for group in tiny.groups)
        stacks = (("", "transformer_blocks", dit.n_layers),)
        config = replace(tiny, stacks=stacks, groups=groups, residual_dim=TINY["text_encoder"]["hidden_size"])
        weights = draw_weights(shapes_of(ImageToLoRA(config)), seed=2)
        files[f"Qwen-Image-i2L/Qwen-Image-i2L-{kind.title()}"] = {key: 0.2 * each for key, each in weights.items()}
    for name, tensors in files.items():
        path = root / "DiffSynth-Studio" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {key.removeprefix("vision_model."): tensor for key, tensor in tensors.items()}
        save_file(own | ({"embeddings.mask_token": torch.zeros(1, 1, 256)} if "DINO" in name else {}), path)
    processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)
    processor.save_pretrained(root / "Qwen/Qwen-Image-Edit/processor")
    tokenizer = AutoTokenizer.from_pretrained(root / "Qwen/Qwen-Image/tokenizer", trust_remote_code=False)
    tokenizer.add_tokens(["assistant"], special_tokens=True)
    tokenizer.save_pretrained(root / "Qwen/Qwen-Image/tokenizer")
