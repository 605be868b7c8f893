"""Tiny Qwen-Image networks of ours and of diffusers with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from transformers import (
    BatchFeature,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import parity
import wan_vae_oracle
from diffsynth.models.config import Qwen25VLTextEncoderConfig, WanAutoencoderConfig
from diffsynth.models.qwen25_vl import Qwen25VLTextEncoder
from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_qwen_image.config import QwenImageDiTConfig
from diffsynth_qwen_image.controlnet_config import QwenImageControlNetConfig
from diffsynth_qwen_image.dit import QwenImageDiT
from diffsynth_qwen_image.tiny import vision_tokenizer as qwen_tokenizer

SIZE = {"height": 80, "width": 48}
DIT = QwenImageDiTConfig(dim=64, n_heads=2, n_layers=2, prompt_dim=32, ffn_dim=256, axes_dims=(4, 14, 14))
TEXT = Qwen25VLTextEncoderConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=48,
    vocab_size=320,
    vision_hidden_size=32,
    vision_layers=2,
    vision_heads=2,
    vision_intermediate_size=48,
    full_attention_layers=(1,),
)
SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}
"""Published `scheduler/scheduler_config.json` of Qwen-Image."""

LIGHTNING_SCHEDULER = SCHEDULER | {"base_shift": 1.0986122886681098, "max_shift": 1.0986122886681098,
                                   "shift_terminal": None}  # fmt: skip
"""The scheduler of Qwen-Image-Lightning, as its authors' examples configure it: a shift of 3 for every size."""

IMAGE_PIXELS = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
"""Arguments of an image processor for images of at most 16 tokens."""


def oracle_dit(config: QwenImageDiTConfig, *, zero_cond_t: bool = False) -> QwenImageTransformer2DModel:
    """Return diffusers' network of a config.

    Args:
        config: of our network.
        zero_cond_t: whether appended images are modulated by the embedding of noise level 0.
    """
    return QwenImageTransformer2DModel(
        patch_size=config.patch_size,
        in_channels=config.patch_dim,
        out_channels=config.in_channels,
        num_layers=config.n_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.n_heads,
        joint_attention_dim=config.prompt_dim,
        axes_dims_rope=config.axes_dims,
        zero_cond_t=zero_cond_t,
        use_additional_t_cond=config.layered,
        use_layer3d_rope=config.layered,
    ).eval()


def oracle_controlnet(config: QwenImageControlNetConfig, seed: int = 4) -> QwenImageControlNetModel:
    """Return diffusers' ControlNet of a config, with random weights."""
    oracle = QwenImageControlNetModel(
        patch_size=config.patch_size,
        in_channels=config.patch_dim,
        out_channels=config.in_channels,
        num_layers=config.n_layers,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.n_heads,
        joint_attention_dim=config.prompt_dim,
        axes_dims_rope=config.axes_dims,
        extra_condition_channels=config.patch_size**2 if config.inpaints else 0,
    ).eval()
    oracle.load_state_dict(parity.draw_weights(parity.shapes_of(oracle), seed))
    return oracle


def oracle_encoder(image_token: int) -> Qwen2_5_VLForConditionalGeneration:
    """Return transformers' tiny Qwen2.5-VL, with its head."""
    text = {
        "hidden_size": TEXT.hidden_size,
        "num_hidden_layers": TEXT.num_layers,
        "num_attention_heads": TEXT.num_heads,
        "num_key_value_heads": TEXT.num_kv_heads,
        "intermediate_size": TEXT.intermediate_size,
        "vocab_size": TEXT.vocab_size,
        "rms_norm_eps": TEXT.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(TEXT.rope_sections)},
    }
    vision = {
        "depth": TEXT.vision_layers,
        "hidden_size": TEXT.vision_hidden_size,
        "num_heads": TEXT.vision_heads,
        "intermediate_size": TEXT.vision_intermediate_size,
        "out_hidden_size": TEXT.hidden_size,
        "fullatt_block_indexes": list(TEXT.full_attention_layers),
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=image_token)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def published_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of transformers' Qwen2.5-VL under the names of the published files, without the head."""
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items() if name != "lm_head.weight"}
    return {name.replace("language_model.", "model.", 1): weight for name, weight in renamed.items()}


def tiny_pipelines(
    *, zero_cond_t: bool = False, scheduler: dict[str, Any] | None = None, layered: bool = False, **components: Any
) -> tuple[QwenImagePipeline, dict[str, Any]]:
    """Return our pipeline, and the components of diffusers' pipelines with the same weights.

    Args:
        zero_cond_t: see `oracle_dit`.
        scheduler: config of diffusers' scheduler; None is that of Qwen-Image.
        layered: whether they are those of Qwen-Image-Layered, with an autoencoder of four channels.
        components: further components of ours.
    """
    tokenizer = qwen_tokenizer()
    config, channels = replace(DIT, layered=layered), 4 if layered else 3
    dit = oracle_dit(config, zero_cond_t=zero_cond_t)
    vae = AutoencoderKLQwenImage(base_dim=8, input_channels=channels).eval()
    encoder = oracle_encoder(tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    for seed, module in enumerate((dit, encoder)):
        module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed=seed))
    weights = wan_vae_oracle.draw_weights(parity.shapes_of(vae))
    vae.load_state_dict(weights)
    ours = {
        "dit": QwenImageDiT(config).eval(),
        "text_encoder": Qwen25VLTextEncoder(TEXT).eval(),
        "vae": wan_vae_oracle.loaded(weights, "wan_autoencoder", WanAutoencoderConfig(dim=8, in_channels=channels)),
    }
    ours["dit"].load_state_dict(dit.state_dict())
    ours["text_encoder"].load_state_dict(published_names(encoder.state_dict()))
    processors = {"tokenizer": tokenizer, "processor": image_processor()}
    pipe = QwenImagePipeline.from_components(
        **ours, **processors, **components, device="cpu", torch_dtype=torch.float32
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(**(scheduler or SCHEDULER)),
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "transformer": dit,
    }
    return pipe, parts


def image_processor() -> Qwen2VLImageProcessorPil:
    """Return transformers' image processor for images of at most 16 tokens; it needs no torchvision."""
    return Qwen2VLImageProcessorPil(**IMAGE_PIXELS)


class OracleProcessor(Qwen2VLProcessor):
    """The processor of diffusers' pipelines without torchvision, which transformers needs for videos.

    It replaces the token of an image by as many as the image has, as transformers' does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor()

    def __call__(self, *, text: list[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        """Return token ids, their mask and token types, and the images' patches and grids."""
        images = images if isinstance(images, list) else [images]
        found = self.image_processor(images=images, return_tensors="pt")
        texts = []
        for each in text:
            parts = each.split("<|image_pad|>")
            counts = [int(grid.prod()) // 4 for grid in found["image_grid_thw"]]
            joined = [part + "<|image_pad|>" * count for part, count in zip(parts, counts, strict=False)]
            texts.append("".join([*joined, parts[-1]]))
        tokens = self.tokenizer(texts, padding=padding, padding_side="right", return_tensors=return_tensors)
        return BatchFeature({**tokens, **found})


def noise(seed: int, size: dict[str, int] = SIZE) -> Tensor:
    """Return the noise that our pipeline generates for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(1, DIT.in_channels, size["height"] // 8, size["width"] // 8, generator=generator)


def packed(latents: Tensor) -> Tensor:
    """Return latents `b c h w` as diffusers' tokens."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def unpacked(tokens: Tensor, size: dict[str, int] = SIZE) -> Tensor:
    """Return diffusers' tokens as latents `b c h w`."""
    rows, columns = size["height"] // 16, size["width"] // 16
    patches = tokens.view(len(tokens), rows, columns, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, 2 * rows, 2 * columns)


def counted_prefix(tokenizer: PreTrainedTokenizerFast, template: str) -> int:
    """Return the number of tokens before the prompt in a template of diffusers' pipelines, whose own number is that of
    the published tokenizer, and not of a tiny one.
    """
    return len(tokenizer(template.partition("{}")[0])["input_ids"])
