"""Small configs, inputs and a tokenizer for Wan's networks and models: for tests, the conformance suite and the tiny
hub.

Light: torch and transformers are imported when a function runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_wan.config import (
    Wan22AutoencoderConfig,
    WanAnimateConfig,
    WanDiTConfig,
    WanImageEncoderConfig,
    WanMotionControllerConfig,
    WanTextEncoderConfig,
    WanVaceConfig,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

TINY_DIT = WanDiTConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=2, text_dim=64, freq_dim=64)
TINY_VACE = WanVaceConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=1)
TINY_ANIMATE = WanAnimateConfig(
    dim=256,
    num_heads=2,
    num_layers=1,
    motion_channels=(8, 12, 16),
    style_dim=24,
    style_layers=2,
    motion_dim=6,
    motion_embed_dim=20,
    face_hidden_dim=32,
    face_heads=2,
)
TINY_MOTION_CONTROLLER = WanMotionControllerConfig(dim=256, freq_dim=64)
TINY_TEXT_ENCODER = WanTextEncoderConfig(
    vocab_size=120, dim=32, dim_attn=48, dim_ffn=56, num_heads=4, num_layers=2, num_buckets=8
)
TINY_IMAGE_ENCODER = WanImageEncoderConfig(image_size=56, dim=160, dim_mlp=96, num_heads=2, num_layers=2)
TINY_WAN22_AUTOENCODER = Wan22AutoencoderConfig(dim=8, decoder_dim=8)

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
"""Special tokens of the tiny tokenizer, with the ids that they have in UMT5's: 0, 1 and 2."""

VOCAB_SIZE = len(SPECIAL_TOKENS) + 256


def tiny_dit_inputs(config: WanDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `WanDiT.forward` for two short videos; fp32 on the CPU."""
    import torch

    return {
        "latents": torch.randn(2, config.in_channels, 3, 6, 4, generator=generator),
        "time": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 9, config.text_dim, generator=generator),
    }


def tiny_vace_inputs(config: WanVaceConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `WanVace.forward` for hints to the first blocks of a network; fp32 on the CPU."""
    import torch

    from diffsynth_wan.dit import rotary_embedding
    from diffsynth_wan.extension import Stream

    network = WanDiTConfig(dim=config.dim, num_heads=config.num_heads)
    positions = (tuple(range(3)), tuple(range(2)), tuple(range(4)))
    stream = Stream(
        tokens=torch.randn(1, 24, config.dim, generator=generator),
        positions=positions,
        rotary=rotary_embedding(positions, network, torch.device("cpu")),
        context=torch.randn(1, 5, config.dim, generator=generator),
        time=torch.randn(1, 1, config.dim, generator=generator),
        modulation=torch.randn(1, 1, 6, config.dim, generator=generator),
    )
    control_latents = torch.randn(1, config.in_channels, 3, 4, 8, generator=generator)
    return {"stream": stream, "control_latents": control_latents, "hinted": range(config.num_layers)}


def tiny_animate_inputs(config: WanAnimateConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `WanAnimateAdapter.forward` for two latent frames; fp32 on the CPU."""
    import torch

    return {
        "pose_latents": torch.randn(1, config.latent_channels, 2, 4, 8, generator=generator),
        "face_pixels": 2 * torch.rand(1, 3, 5, config.face_size, config.face_size, generator=generator) - 1,
    }


def tiny_motion_controller_inputs(config: WanMotionControllerConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `WanMotionController.forward` for the least and the most motion."""
    import torch

    return {"motion_bucket_id": torch.tensor([0.0, 100.0])}


def tiny_text_encoder_inputs(config: WanTextEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `WanTextEncoder.forward` for two prompts of different length; on the CPU."""
    import torch

    return {
        "input_ids": torch.randint(config.vocab_size, (2, 11), generator=generator),
        "attention_mask": (torch.arange(11)[None, :] < torch.tensor([[11], [6]])).long(),
    }


def tiny_image_encoder_inputs(config: WanImageEncoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `WanImageEncoder.forward`: two small images, not square; fp32 on the CPU."""
    import torch

    return {"image": torch.rand(2, 3, 40, 72, generator=generator) * 2 - 1}


def tiny_wan22_autoencoder_inputs(config: Wan22AutoencoderConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `Wan22Autoencoder.forward`: a video of two latent frames; fp32 on the CPU."""
    import torch

    size = (config.time_factor + 1, 2 * config.factor, config.factor)
    return {"video": torch.rand(1, config.in_channels, *size, generator=generator) * 2 - 1}


def image_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the argument `input_image`, an image of `size`; see `ModelSpec.tiny_inputs`."""
    from diffsynth.testing import tiny_image

    return {"input_image": tiny_image(size)}


def first_and_last_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the arguments `input_image` and `end_image`, two images of `size`."""
    from diffsynth.testing import tiny_image

    return {"input_image": tiny_image(size), "end_image": tiny_image(size, turn=1)}


def control_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the argument `control_video`, a clip of `size`."""
    from diffsynth.testing import tiny_clip

    return {"control_video": tiny_clip(size)}


def control_and_reference_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the arguments `control_video`, a clip of `size`, and `reference_image`."""
    from diffsynth.testing import tiny_image

    return {**control_inputs(size), "reference_image": tiny_image(size, turn=2)}


def camera_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the arguments `input_image`, an image of `size`, and `camera_control_direction`."""
    return {**image_inputs(size), "camera_control_direction": "LeftUp"}


def speed_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the argument `motion_bucket_id`, half of the largest amount of motion."""
    return {"motion_bucket_id": 50.0}


def vace_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the arguments `vace_video` and `vace_video_mask`, clips of `size`, and
    `vace_reference_image`.
    """
    from diffsynth.testing import tiny_clip, tiny_image

    clip = tiny_clip(size)
    return {"vace_video": clip, "vace_video_mask": clip[::-1], "vace_reference_image": tiny_image(size, turn=1)}


def animate_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the arguments `input_image`, `animate_pose_video` and `animate_face_video` of `size`, and a
    `num_frames` of 4 more: those of the character's image, which the result does not have.
    """
    from diffsynth.testing import tiny_clip

    pose, face = tiny_clip(size), tiny_clip(size)[::-1]
    return {
        **image_inputs(size),
        "animate_pose_video": pose,
        "animate_face_video": face,
        "num_frames": size["num_frames"] + 4,
    }


def animate2_inputs(size: Mapping[str, int]) -> dict[str, Any]:
    """Return a dict with the arguments `animate2_reference_image` and `animate2_reference_video` of `size`."""
    from diffsynth.testing import tiny_clip, tiny_image

    return {"animate2_reference_image": tiny_image(size, turn=3), "animate2_reference_video": tiny_clip(size)}


def write_tiny_tokenizer(folder: Path) -> None:
    """Write the files of a tiny tokenizer like UMT5's to `folder`, in the format that `AutoTokenizer` reads."""
    tiny_tokenizer().save_pretrained(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a `PreTrainedTokenizerFast` of a few kilobytes that works like UMT5's: one token per byte, and an end
    token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, end, unknown = SPECIAL_TOKENS
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        padding_side="right",
        model_max_length=512,
    )
