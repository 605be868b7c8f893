"""Sizes of Wan's networks, and how a file's shapes tell them. Light: no torch at import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]

HEAD_DIM = 128
"""Of every published network; shapes cannot tell heads, because queries and keys are normalised all heads together."""

CAMERA_PIXELS = 8
"""Side of the square of pixels that becomes channels in front of the camera adapter: that of a latent pixel."""

MAX_PROMPT_TOKENS = 512

FOREIGN_PARTS = {
    r"(casual_audio_encoder|audio_injector|cond_encoder|trainable_cond_mask|frame_packer)\b": "Wan-S2V",
    r"(music_(injector|projection|encoder)|img_emb_refimage|patch_embedding_global|head_global)\b": "Wan-Dancer",
    r".*_mot_ref\b": "Video-As-Prompt",
}
"""Names of parts that change the pass of the network in ways that are not here: pattern -> whose they are."""


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads or (dim // num_heads) % 2:
        raise ValueError(f"num_heads={num_heads} must divide dim={dim} into heads of an even number of channels")


@dataclass(frozen=True, kw_only=True)
class WanDiTConfig:
    """The Wan transformer; the defaults are Wan2.1-T2V-1.3B.

    Args:
        dim: width of the stream.
        ffn_dim: inner width of the feed-forward.
        num_heads: `dim / num_heads` is the head dimension, 128 in every published file.
        num_layers: blocks.
        in_channels: of latents and condition together: 16 (text alone), 32 (camera), 36 (mask and image), 48 (control
            and image; or TI2V's own latents), 52 (all of them).
        out_channels: latent channels: 16, of TI2V-5B 48.
        text_dim: width of the text encoder's hidden states.
        image_dim: width of the image encoder's hidden states; 0 for a network without an image branch.
        image_tokens: of two images, for which there are learned positions (first-last-frame); 0 without.
        reference_channels: latent channels of a reference image; 0 for a network that takes none.
        camera_channels: of the rays that the camera adapter takes; 0 for a network without one.
        camera_layers: blocks of the camera adapter.
        freq_dim: sinusoids that embed the time.
        patch_size: frames, rows and columns of latent pixels in a token.
        eps: of all norms in the blocks.
        rope_theta: base of the rotary frequencies.
        frame_times: trained with a time for each frame, 0 for an image that is given in its place (TI2V).
        reference_video: trained to attend to a reference video (Animate-2); shapes cannot tell, names of files do.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    image_dim: int = 0
    image_tokens: int = 0
    reference_channels: int = 0
    camera_channels: int = 0
    camera_layers: int = 1
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: float = 10000.0
    frame_times: bool = False
    reference_video: bool = False

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        _check_heads(self.dim, self.num_heads)
        if self.image_tokens and not self.image_dim:
            raise ValueError(f"image_tokens={self.image_tokens} without an image branch; set image_dim")

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """Channels of a head that are turned by time, height and width: 44, 42 and 42 of 128."""
        head_dim = self.dim // self.num_heads
        space = 2 * (head_dim // 6)
        return head_dim - 2 * space, space, space


@dataclass(frozen=True, kw_only=True)
class WanVaceConfig:
    """VACE's second stream; the defaults are Wan2.1-VACE-1.3B.

    Args:
        dim, ffn_dim, num_heads: as in the network beside it.
        num_layers: its blocks; they stand beside evenly spread blocks of the network.
        in_channels: of the control: two encoded videos, and the mask at the resolution of the pixels.
        patch_size, eps: as in the network.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 15
    in_channels: int = 96
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        _check_heads(self.dim, self.num_heads)


@dataclass(frozen=True, kw_only=True)
class WanAnimateConfig:
    """What Animate adds to an image-to-video network; the defaults are Wan2.2-Animate-14B.

    Args:
        dim, num_heads: as in the network beside it.
        num_layers: blocks that read the face; they stand behind evenly spread blocks of the network.
        latent_channels: of the pose video.
        motion_channels: of the motion encoder, from the full picture to 4 x 4; each step halves the picture.
        style_dim: width of the motion encoder's head.
        style_layers: linear layers of that head.
        motion_dim: directions of motion.
        motion_embed_dim: width of a frame's motion.
        face_hidden_dim: channels of the face encoder's convolutions.
        face_heads: tokens of a latent frame; one more is learned.
        patch_size, eps: as in the network.
    """

    dim: int = 5120
    num_heads: int = 40
    num_layers: int = 8
    latent_channels: int = 16
    motion_channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    style_dim: int = 512
    style_layers: int = 5
    motion_dim: int = 20
    motion_embed_dim: int = 512
    face_hidden_dim: int = 1024
    face_heads: int = 4
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "motion_channels", tuple(self.motion_channels))
        _check_heads(self.dim, self.num_heads)

    @property
    def face_size(self) -> int:
        """Side of the face video in pixels."""
        return 4 << (len(self.motion_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class WanMotionControllerConfig:
    """Speed control; the defaults are the published one for T2V-1.3B.

    Args:
        dim: as in the network beside it.
        freq_dim: sinusoids that embed the speed.
    """

    dim: int = 1536
    freq_dim: int = 256


def infer_dit_config(shapes: Shapes) -> WanDiTConfig:
    """The config of a file, from its shapes under our own names.

    Raises:
        ValueError: parts of another network, or a ratio that all Wan networks share does not hold.
    """
    _refuse_foreign_parts(shapes)
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.0.weight"]
    image_dim = shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else 0
    if ("blocks.0.cross_attn.k_img.weight" in shapes) != (image_dim > 0):
        raise ValueError("one of img_emb.* and blocks.*.cross_attn.k_img is there without the other")
    if shapes["time_projection.1.weight"] != (6 * dim, dim):
        raise ValueError(f"time_projection.1.weight is {shapes['time_projection.1.weight']}; expected {(6 * dim, dim)}")
    out_channels = shapes["head.head.weight"][0] // prod(patch)
    return WanDiTConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=_heads(dim),
        num_layers=_count(shapes, "blocks"),
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=shapes["text_embedding.0.weight"][1],
        image_dim=image_dim,
        image_tokens=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0,
        reference_channels=shapes["ref_conv.weight"][1] if "ref_conv.weight" in shapes else 0,
        camera_channels=_camera_channels(shapes),
        camera_layers=_count(shapes, "control_adapter.residual_blocks") or 1,
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch_size=(patch[0], patch[1], patch[2]),
        # The network of VAE 2.2 takes its image as a clean first frame, that of VAE 2.1 in channels beside the latents.
        frame_times=out_channels == 48,
    )


def infer_vace_config(shapes: Shapes) -> WanVaceConfig:
    """The config of the `vace_*` part of a file.

    Raises:
        ValueError: a width that is no multiple of the head dimension.
    """
    dim, in_channels, *patch = shapes["vace_patch_embedding.weight"]
    return WanVaceConfig(
        dim=dim,
        ffn_dim=shapes["vace_blocks.0.ffn.0.weight"][0],
        num_heads=_heads(dim),
        num_layers=_count(shapes, "vace_blocks"),
        in_channels=in_channels,
        patch_size=(patch[0], patch[1], patch[2]),
    )


def infer_animate_config(shapes: Shapes) -> WanAnimateConfig:
    """The config of Animate's part of a file.

    Raises:
        ValueError: a width that is no multiple of the head dimension.
    """
    dim, latent_channels, *patch = shapes["pose_patch_embedding.weight"]
    convs = "motion_encoder.enc.net_app.convs"
    halvings = _count(shapes, convs) - 2
    first = shapes[f"{convs}.0.0.weight"][0]
    motion_embed_dim, motion_dim = shapes["motion_encoder.dec.direction.weight"]
    face_hidden_dim = shapes["face_encoder.conv2.conv.weight"][0]
    return WanAnimateConfig(
        dim=dim,
        num_heads=_heads(dim),
        num_layers=_count(shapes, "face_adapter.fuser_blocks"),
        latent_channels=latent_channels,
        motion_channels=(first, *(shapes[f"{convs}.{n + 1}.conv2.1.weight"][0] for n in range(halvings))),
        style_dim=shapes[f"{convs}.{halvings + 1}.weight"][0],
        style_layers=_count(shapes, "motion_encoder.enc.fc"),
        motion_dim=motion_dim,
        motion_embed_dim=motion_embed_dim,
        face_hidden_dim=face_hidden_dim,
        face_heads=shapes["face_encoder.conv1_local.conv.weight"][0] // face_hidden_dim,
        patch_size=(patch[0], patch[1], patch[2]),
    )


def infer_motion_controller_config(shapes: Shapes) -> WanMotionControllerConfig:
    """The config of a speed controller. Its names are common ones, so shapes must fit exactly.

    Raises:
        ValueError: they do not, or there are other keys.
    """
    dim, freq_dim = shapes["linear.0.weight"]
    expected = {"linear.0": (dim, freq_dim), "linear.2": (dim, dim), "linear.4": (6 * dim, dim)}
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in expected.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in expected.items()}
    if dict(shapes) != wanted:
        raise ValueError(f"three layers to 6 times the width {dim}, and nothing else, were expected")
    return WanMotionControllerConfig(dim=dim, freq_dim=freq_dim)


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


def tiny_dit_inputs(config: WanDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `WanDiT.forward` for two short videos; fp32 on the CPU."""
    import torch

    return {
        "latents": torch.randn(2, config.in_channels, 3, 6, 4, generator=generator),
        "time": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 9, config.text_dim, generator=generator),
    }


def tiny_vace_inputs(config: WanVaceConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `WanVace.forward` beside block 0 of a network; fp32 on the CPU."""
    import torch

    from diffsynth_wan.dit import rotary_at
    from diffsynth_wan.extension import Stream

    network = WanDiTConfig(dim=config.dim, num_heads=config.num_heads)
    positions = (tuple(range(3)), tuple(range(2)), tuple(range(4)))
    stream = Stream(
        tokens=torch.randn(1, 24, config.dim, generator=generator),
        positions=positions,
        rotary=rotary_at(positions, network, torch.device("cpu")),
        context=torch.randn(1, 5, config.dim, generator=generator),
        time=torch.randn(1, 1, config.dim, generator=generator),
        modulation=torch.randn(1, 1, 6, config.dim, generator=generator),
    )
    control_latents = torch.randn(1, config.in_channels, 3, 4, 8, generator=generator)
    return {"stream": stream, "control_latents": control_latents, "beside": range(config.num_layers)}


def tiny_animate_inputs(config: WanAnimateConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `WanAnimateAdapter.forward` for two latent frames; fp32 on the CPU."""
    import torch

    return {
        "pose_latents": torch.randn(1, config.latent_channels, 2, 4, 8, generator=generator),
        "face_pixels": 2 * torch.rand(1, 3, 5, config.face_size, config.face_size, generator=generator) - 1,
    }


def tiny_motion_controller_inputs(config: WanMotionControllerConfig, generator: torch.Generator) -> dict[str, Any]:
    """Arguments of `WanMotionController.forward` for no and for most motion."""
    import torch

    return {"motion_bucket_id": torch.tensor([0.0, 100.0])}


def _heads(dim: int) -> int:
    if dim % HEAD_DIM:
        raise ValueError(f"width {dim}: expected a multiple of the head dimension {HEAD_DIM}")
    return dim // HEAD_DIM


def _camera_channels(shapes: Shapes) -> int:
    if "control_adapter.conv.weight" not in shapes:
        return 0
    return shapes["control_adapter.conv.weight"][1] // CAMERA_PIXELS**2


def _refuse_foreign_parts(shapes: Shapes) -> None:
    for pattern, whose in FOREIGN_PARTS.items():
        is_foreign = re.compile(pattern).match
        part = next((name for name in shapes if is_foreign(name)), None)
        if part is not None:
            raise ValueError(f"it has {part}, a part of {whose}, which this package does not run")


def _count(shapes: Shapes, name: str) -> int:
    """Items of the list `name`."""
    start = len(name.split("."))
    indices = {int(key.split(".")[start]) for key in shapes if key.startswith(f"{name}.")}
    return max(indices, default=-1) + 1
