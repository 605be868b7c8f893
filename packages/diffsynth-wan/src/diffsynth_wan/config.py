"""Configs of Wan's networks, and functions that infer them from the shapes in a file. Light: no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from diffsynth.core.loader.shapes import Shapes, count_items
from diffsynth.models.config import WanAutoencoderConfig

HEAD_DIM = 128
"""Head dimension of every published transformer.

Shapes do not show it: the norm of queries and keys spans all heads together.
"""

CLIP_HEAD_DIM = 80
"""Head dimension of CLIP ViT-H/14, which no shape shows."""

CAMERA_PIXELS = 8
"""Side of the squares of pixels that are folded into channels before the camera adapter: 8 per latent pixel."""

MAX_PROMPT_TOKENS = 512

UNSUPPORTED_MODULES = {
    r"(casual_audio_encoder|audio_injector|cond_encoder|trainable_cond_mask|frame_packer)\b": "Wan-S2V",
    r"(music_(injector|projection|encoder)|img_emb_refimage|patch_embedding_global|head_global)\b": "Wan-Dancer",
    r".*_mot_ref\b": "Video-As-Prompt",
}
"""Pattern of module names of Wan variants whose forward pass is not implemented here -> name of the variant."""


def _check_heads(dim: int, num_heads: int) -> None:
    if dim % num_heads or (dim // num_heads) % 2:
        raise ValueError(f"num_heads={num_heads} must divide dim={dim} into heads of an even number of channels")


@dataclass(frozen=True, kw_only=True)
class WanDiTConfig:
    """Config of the Wan transformer; the defaults are Wan2.1-T2V-1.3B.

    Args:
        dim: width of the tokens.
        ffn_dim: inner width of the feed-forward.
        num_heads: number of attention heads; `dim / num_heads` is the head dimension, 128 in every published file.
        num_layers: number of blocks.
        in_channels: channels of latents and condition latents together: 16 (text alone), 32 (camera), 36 (mask and
            image), 48 (control video and image; or the latents of TI2V), 52 (control video, mask and image).
        out_channels: latent channels: 16; 48 in TI2V-5B.
        text_dim: width of the text encoder's hidden states.
        image_dim: width of the image encoder's hidden states; 0 for a network without an image branch.
        image_tokens: number of learned positions for the tokens of two images (first-last-frame); 0 for none.
        reference_channels: latent channels of a reference image; 0 for a network that takes none.
        camera_channels: channels of the camera rays; 0 for a network without a camera adapter.
        camera_layers: number of blocks of the camera adapter.
        freq_dim: number of sinusoids in the time embedding.
        patch_size: frames, rows and columns of latent pixels in a token.
        eps: epsilon of all norms in the blocks.
        rope_theta: base of the rotary frequencies.
        frame_times: whether the network was trained with one time per frame, 0 for a given image (TI2V).
        reference_video: whether the network was trained to attend to a reference video (Animate-2). Shapes do not show
            it; the file's `CheckpointSpec.config` sets it.
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
        """Tuple of the numbers of channels of an attention head that RoPE rotates by time, height and width: `(44, 42,
        42)` for a head of 128.
        """
        head_dim = self.dim // self.num_heads
        space = 2 * (head_dim // 6)
        return head_dim - 2 * space, space, space


@dataclass(frozen=True, kw_only=True)
class WanVaceConfig:
    """Config of the VACE network; the defaults are Wan2.1-VACE-1.3B.

    Args:
        dim, ffn_dim, num_heads: same values as in the transformer.
        num_layers: number of blocks; each gives a hint to one of the transformer's blocks, at even spacing.
        in_channels: channels of the control: latents of two videos, and the mask at the resolution of the pixels.
        patch_size, eps: same values as in the transformer.
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
    """Config of Animate's pose and face networks; the defaults are Wan2.2-Animate-14B.

    Args:
        dim, num_heads: same values as in the transformer.
        num_layers: number of face blocks; they run after evenly spaced blocks of the transformer.
        latent_channels: latent channels of the pose video.
        motion_channels: channels of the motion encoder at each resolution, from the full image to 4 x 4; each step
            halves the side.
        style_dim: width of the motion encoder's linear layers.
        style_layers: number of these layers.
        motion_dim: number of motion directions.
        motion_embed_dim: width of the motion vector of a frame.
        face_hidden_dim: channels of the face encoder's convolutions.
        face_heads: face tokens of a latent frame, besides a learned one.
        patch_size, eps: same values as in the transformer.
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
        """Height and width, in pixels, of the square frames of the face video."""
        return 4 << (len(self.motion_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class WanMotionControllerConfig:
    """Config of the motion controller; the defaults are the published one for T2V-1.3B.

    Args:
        dim: width of the transformer.
        freq_dim: number of sinusoids in the embedding of the amount of motion.
    """

    dim: int = 1536
    freq_dim: int = 256


def infer_dit_config(shapes: Shapes) -> WanDiTConfig:
    """Return the `WanDiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file has modules of an unsupported variant, or sizes that no Wan network has.
    """
    _refuse_unsupported(shapes)
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    ffn_dim, _ = shapes["blocks.0.ffn.0.weight"]
    image_dim = shapes["img_emb.proj.1.weight"][1] if "img_emb.proj.1.weight" in shapes else 0
    if ("blocks.0.cross_attn.k_img.weight" in shapes) != (image_dim > 0):
        raise ValueError("the file has only one of img_emb.* and blocks.*.cross_attn.k_img; expected both or neither")
    if shapes["time_projection.1.weight"] != (6 * dim, dim):
        raise ValueError(f"time_projection.1.weight is {shapes['time_projection.1.weight']}; expected {(6 * dim, dim)}")
    out_channels = shapes["head.head.weight"][0] // prod(patch)
    return WanDiTConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=_heads(dim),
        num_layers=count_items(shapes, "blocks"),
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=shapes["text_embedding.0.weight"][1],
        image_dim=image_dim,
        image_tokens=shapes["img_emb.emb_pos"][1] if "img_emb.emb_pos" in shapes else 0,
        reference_channels=shapes["ref_conv.weight"][1] if "ref_conv.weight" in shapes else 0,
        camera_channels=_camera_channels(shapes),
        camera_layers=count_items(shapes, "control_adapter.residual_blocks") or 1,
        freq_dim=shapes["time_embedding.0.weight"][1],
        patch_size=(patch[0], patch[1], patch[2]),
        # Only the network for VAE 2.2 (48 channels) takes its image as a clean first frame; the others take it as
        # condition latents.
        frame_times=out_channels == 48,
    )


def infer_vace_config(shapes: Shapes) -> WanVaceConfig:
    """Return the `WanVaceConfig` of the VACE network in a file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the width is no multiple of the head dimension.
    """
    dim, in_channels, *patch = shapes["vace_patch_embedding.weight"]
    return WanVaceConfig(
        dim=dim,
        ffn_dim=shapes["vace_blocks.0.ffn.0.weight"][0],
        num_heads=_heads(dim),
        num_layers=count_items(shapes, "vace_blocks"),
        in_channels=in_channels,
        patch_size=(patch[0], patch[1], patch[2]),
    )


def infer_animate_config(shapes: Shapes) -> WanAnimateConfig:
    """Return the `WanAnimateConfig` of Animate's networks in a file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the width is no multiple of the head dimension.
    """
    dim, latent_channels, *patch = shapes["pose_patch_embedding.weight"]
    convs = "motion_encoder.enc.net_app.convs"
    halvings = count_items(shapes, convs) - 2
    first = shapes[f"{convs}.0.0.weight"][0]
    motion_embed_dim, motion_dim = shapes["motion_encoder.dec.direction.weight"]
    face_hidden_dim = shapes["face_encoder.conv2.conv.weight"][0]
    return WanAnimateConfig(
        dim=dim,
        num_heads=_heads(dim),
        num_layers=count_items(shapes, "face_adapter.fuser_blocks"),
        latent_channels=latent_channels,
        motion_channels=(first, *(shapes[f"{convs}.{n + 1}.conv2.1.weight"][0] for n in range(halvings))),
        style_dim=shapes[f"{convs}.{halvings + 1}.weight"][0],
        style_layers=count_items(shapes, "motion_encoder.enc.fc"),
        motion_dim=motion_dim,
        motion_embed_dim=motion_embed_dim,
        face_hidden_dim=face_hidden_dim,
        face_heads=shapes["face_encoder.conv1_local.conv.weight"][0] // face_hidden_dim,
        patch_size=(patch[0], patch[1], patch[2]),
    )


def infer_motion_controller_config(shapes: Shapes) -> WanMotionControllerConfig:
    """Return the `WanMotionControllerConfig` of a motion controller file, inferred from the shapes of its tensors.

    Its tensor names are common ones (`linear.0.weight`), so names and shapes must match exactly.

    Raises:
        ValueError: a shape differs, or there are other tensors.
    """
    dim, freq_dim = shapes["linear.0.weight"]
    expected = {"linear.0": (dim, freq_dim), "linear.2": (dim, dim), "linear.4": (6 * dim, dim)}
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in expected.items()}
    wanted |= {f"{name}.bias": shape[:1] for name, shape in expected.items()}
    if dict(shapes) != wanted:
        raise ValueError(f"expected three linear layers from {freq_dim} to 6 * {dim} channels and no other tensors")
    return WanMotionControllerConfig(dim=dim, freq_dim=freq_dim)


@dataclass(frozen=True, kw_only=True)
class WanTextEncoderConfig:
    """Config of UMT5's encoder (Chung et al. 2023, arXiv:2304.09151); the defaults are UMT5-XXL.

    Args:
        vocab_size: number of token embeddings.
        dim: width of the hidden states.
        dim_attn: width of all attention heads together.
        dim_ffn: inner width of the gated feed-forward.
        num_heads: number of attention heads.
        num_layers: number of blocks.
        num_buckets: number of buckets of relative positions; one half for earlier keys, one for later ones.
        max_distance: distance in tokens from which on all positions share a bucket.
        norm_eps: epsilon of the RMS norms.
    """

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim_attn % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim_attn={self.dim_attn}")
        if self.num_buckets % 4:
            raise ValueError(f"num_buckets={self.num_buckets} must be a multiple of 4")


def infer_text_encoder_config(shapes: Shapes) -> WanTextEncoderConfig:
    """Return the `WanTextEncoderConfig` of a text encoder file, inferred from the shapes of its tensors."""
    vocab_size, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return WanTextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        num_layers=count_items(shapes, "blocks"),
        num_buckets=num_buckets,
    )


@dataclass(frozen=True, kw_only=True)
class WanImageEncoderConfig:
    """Config of CLIP's vision tower without its last block; the defaults are open_clip's XLM-RoBERTa ViT-H/14.

    Args:
        image_size: side of the square image, in pixels.
        patch_size: side of a token, in pixels.
        dim: width of the hidden states.
        dim_mlp: inner width of the feed-forward.
        num_heads: number of attention heads.
        num_layers: number of blocks: one less than the published tower has.
        norm_eps: epsilon of the layer norms.
    """

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    dim_mlp: int = 5120
    num_heads: int = 16
    num_layers: int = 31
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} must divide dim={self.dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size={self.patch_size} must divide image_size={self.image_size}")

    @property
    def num_tokens(self) -> int:
        """Number of tokens of an image, an int: the class token, and one for each patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


def infer_image_encoder_config(shapes: Shapes) -> WanImageEncoderConfig:
    """Return the `WanImageEncoderConfig` of an image encoder file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the patches are no square, or the width is no multiple of ViT-H's head dimension.
    """
    dim, _, patch_size, _ = shapes["patch_embedding.weight"]
    num_tokens = shapes["pos_embedding"][1]
    side = round((num_tokens - 1) ** 0.5)
    if side * side != num_tokens - 1:
        raise ValueError(f"{num_tokens} positions: expected a class token and a square of patches")
    if dim % CLIP_HEAD_DIM:
        raise ValueError(f"width {dim}: expected a multiple of {CLIP_HEAD_DIM}, the head dimension of ViT-H/14")
    return WanImageEncoderConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        dim=dim,
        dim_mlp=shapes["transformer.0.mlp.0.weight"][0],
        num_heads=dim // CLIP_HEAD_DIM,
        num_layers=count_items(shapes, "transformer"),
    )


@dataclass(frozen=True, kw_only=True)
class Wan22AutoencoderConfig(WanAutoencoderConfig):
    """Config of the autoencoder of Wan2.2-TI2V-5B; other fields are those of `WanAutoencoderConfig`.

    Args:
        dim: width of the encoder at its first resolution.
        decoder_dim: width of the decoder at its last resolution.
        patch_size: side of the squares of pixels that are folded into channels before the encoder.
    """

    latent_channels: int = 48
    dim: int = 160
    decoder_dim: int = 256
    patch_size: int = 2
    latents_mean: tuple[float, ...] = (
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    )  # fmt: skip

    @property
    def factor(self) -> int:
        """Number of pixels per latent pixel along the height or the width, an int."""
        return super().factor * self.patch_size


def infer_wan22_autoencoder_config(shapes: Shapes) -> Wan22AutoencoderConfig:
    """Return the `Wan22AutoencoderConfig` of an autoencoder file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file has another number of latent channels or another patch size.
    """
    published = Wan22AutoencoderConfig()
    latent_channels = shapes["conv2.weight"][0]
    if latent_channels != published.latent_channels:
        raise ValueError(
            f"it has {latent_channels} latent channels; latents_mean and latents_std are known for "
            f"{published.latent_channels} only"
        )
    dim, patch_channels = shapes["encoder.conv1.weight"][:2]
    if patch_channels % published.patch_size**2:
        raise ValueError(f"its encoder takes {patch_channels} channels; expected a multiple of 4 (squares of 2x2)")
    levels = count_items(shapes, "encoder.downsamples")
    # Each resolution is a list of residual blocks and, except for the last one, a downsampling layer.
    layers = range(count_items(shapes, "encoder.downsamples.0.downsamples"))
    blocks = sum(f"encoder.downsamples.0.downsamples.{index}.residual.2.weight" in shapes for index in layers)
    widths = [shapes[f"encoder.downsamples.{level}.downsamples.0.residual.2.weight"][0] for level in range(levels)]
    steps = [f"encoder.downsamples.{level}.downsamples.{blocks}.time_conv.weight" for level in range(levels - 1)]
    return Wan22AutoencoderConfig(
        in_channels=patch_channels // published.patch_size**2,
        dim=dim,
        decoder_dim=shapes["decoder.head.2.weight"][1],
        dim_mult=tuple(width // dim for width in widths),
        num_res_blocks=blocks,
        temporal_downsample=tuple(step in shapes for step in steps),
    )


def _heads(dim: int) -> int:
    if dim % HEAD_DIM:
        raise ValueError(f"width {dim}: expected a multiple of the head dimension {HEAD_DIM}")
    return dim // HEAD_DIM


def _camera_channels(shapes: Shapes) -> int:
    if "control_adapter.conv.weight" not in shapes:
        return 0
    return shapes["control_adapter.conv.weight"][1] // CAMERA_PIXELS**2


def _refuse_unsupported(shapes: Shapes) -> None:
    for pattern, variant in UNSUPPORTED_MODULES.items():
        found = next((name for name in shapes if re.match(pattern, name)), None)
        if found is not None:
            raise ValueError(f"it has {found}, a tensor of {variant}, which this package does not implement")
