"""Configs of the Z-Image transformer and its ControlNets, and functions that infer them from the shapes in a file.

Light: no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from diffsynth.core.loader.shapes import Shapes, count_items
from diffsynth.errors import did_you_mean

if TYPE_CHECKING:
    import torch

VAE_FACTOR = 8
MAX_PROMPT_TOKENS = 512

TOKEN_MULTIPLE = 32
"""Image and caption are each padded to a multiple of this number of tokens, with learned tokens that take part."""

RefinerHints: TypeAlias = Literal["control_noise_refiner", "control_layers", "none"]
"""Blocks of a ControlNet that give hints to the transformer's noise refiner; see `ZImageControlNetConfig`."""


@dataclass(frozen=True, kw_only=True)
class ZImageBlockConfig:
    """Sizes of a block of Z-Image, in the transformer and in its ControlNets.

    Args:
        dim: width of the tokens.
        n_heads: number of query heads; `dim / n_heads` is the head dimension.
        n_kv_heads: number of key and value heads.
        norm_eps: epsilon of the RMS norms of attention, feed-forward and caption.
        qk_norm: whether queries and keys are RMS-normalised.

    Raises:
        ValueError: the numbers of heads do not divide the width and each other.
    """

    dim: int = 3840
    n_heads: int = 30
    n_kv_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} must divide dim={self.dim} and be a multiple of n_kv_heads={self.n_kv_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Number of channels of each attention head."""
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Inner width of the gated feed-forward, in channels."""
        return int(self.dim / 3 * 8)

    @property
    def time_dim(self) -> int:
        """Width, in channels, of the time embedding that modulates the layers."""
        return min(self.dim, 256)


@dataclass(frozen=True, kw_only=True)
class ZImageDiTConfig(ZImageBlockConfig):
    """Config of Z-Image's single-stream transformer; the defaults are Z-Image and Z-Image-Turbo.

    Args:
        dim, n_heads, n_kv_heads, norm_eps, qk_norm: see `ZImageBlockConfig`.
        n_layers: number of layers over image and caption together.
        n_refiner_layers: number of layers over the image alone, and over the caption alone, before the joint layers.
        cap_feat_dim: width of the text encoder's hidden states.
        in_channels: latent channels.
        patch_size: side of a token in latent pixels.
        axes_dims: channels of a head that RoPE rotates by time, height and width; their sum is the head dimension.
        axes_lens: number of positions per axis in training; not a limit.
        rope_theta: base of the rotary frequencies.
        t_scale: factor from the time in [0, 1] that forward() takes to the network's timestep.
        time_hidden_dim: inner width of the time MLP.

    Raises:
        ValueError: as for `ZImageBlockConfig`, or axes that do not fill a head.
    """

    n_layers: int = 30
    n_refiner_layers: int = 2
    cap_feat_dim: int = 2560
    in_channels: int = 16
    patch_size: int = 2
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1024, 512, 512)
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    time_hidden_dim: int = 1024

    def __post_init__(self) -> None:
        # Metadata is JSON: it gives lists where a hashable config needs tuples.
        object.__setattr__(self, "axes_dims", tuple(self.axes_dims))
        object.__setattr__(self, "axes_lens", tuple(self.axes_lens))
        super().__post_init__()
        if sum(self.axes_dims) != self.head_dim or any(dim % 2 for dim in self.axes_dims):
            raise ValueError(f"axes_dims={self.axes_dims} must be even and sum to dim / n_heads = {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class ZImageControlNetConfig(ZImageBlockConfig):
    """Config of a ControlNet of Z-Image; the defaults are Z-Image-Turbo-Fun-Controlnet-Union-2.1.

    Args:
        dim, n_heads, n_kv_heads, norm_eps, qk_norm: see `ZImageBlockConfig`.
        n_layers: number of control layers; each gives a hint to one of the transformer's layers, which are evenly
            spaced: 15 of 30 in 2.0 and 2.1, 3 in 2.1-lite, 6 in 1.0.
        n_refiner_layers: number of blocks of the transformer's noise refiner that get a hint; with `refiner_hints`
            "none", number of blocks over the control tokens alone.
        in_channels: channels of the control context. If odd, those of the control latents, one of a mask (1 where an
            image to inpaint is kept) and those of the latents of that image, in this order (33 in 2.0 and 2.1); if
            even, those of the control latents alone (16 in 1.0).
        patch_size: side of a token in latent pixels.
        refiner_hints: blocks that give hints to the transformer's noise refiner: "control_noise_refiner", blocks for
            this purpose (2.1); "control_layers", the control layers, which first run over the image's tokens alone
            (2.0); or "none" (1.0).

    Raises:
        ValueError: as for `ZImageBlockConfig`, or an unknown `refiner_hints`.
    """

    n_layers: int = 15
    n_refiner_layers: int = 2
    in_channels: int = 33
    patch_size: int = 2
    refiner_hints: RefinerHints = "control_noise_refiner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refiner_hints not in get_args(RefinerHints):
            known = get_args(RefinerHints)
            raise ValueError(
                f"refiner_hints={self.refiner_hints!r}: expected one of {', '.join(known)}"
                f"{did_you_mean(self.refiner_hints, known)}"
            )

    @property
    def latent_channels(self) -> int:
        """Number of channels of the control latents, without those of mask and image to inpaint."""
        return self.in_channels // 2 if self.inpaints else self.in_channels

    @property
    def inpaints(self) -> bool:
        """Whether the control context has a mask and the latents of an image to inpaint after the control latents."""
        return self.in_channels % 2 == 1


@dataclass(frozen=True, kw_only=True)
class ZImageOmniDiTConfig(ZImageDiTConfig):
    """Config of the transformer of Z-Image-Omni-Base, which takes reference images.

    Args:
        siglip_feat_dim: width of the hidden states of the image encoder.
        dim, n_heads, n_kv_heads, norm_eps, qk_norm, n_layers, n_refiner_layers, cap_feat_dim, in_channels, patch_size,
            axes_dims, axes_lens, rope_theta, t_scale, time_hidden_dim: see `ZImageDiTConfig`.

    Raises:
        ValueError: as for `ZImageDiTConfig`.
    """

    siglip_feat_dim: int = 1152


@dataclass(frozen=True, kw_only=True)
class Siglip2ImageEncoderConfig:
    """Config of the image encoder of SigLIP 2 for images of any shape (Tschannen et al. 2025, arXiv:2502.14786); the
    defaults are So400m/16, which Z-Image-Omni-Base uses.

    Args:
        hidden_size: width of the hidden states.
        num_heads: number of attention heads.
        num_layers: number of layers.
        intermediate_size: inner width of the feed-forward.
        patch_size: side of a patch in pixels.
        num_positions: number of trained position embeddings, a square number; they are resized to the grid of an image.
        max_patches: largest number of patches of an image.

    Raises:
        ValueError: the number of positions is no square number.
    """

    hidden_size: int = 1152
    num_heads: int = 16
    num_layers: int = 27
    intermediate_size: int = 4304
    patch_size: int = 16
    num_positions: int = 256
    max_patches: int = 256

    def __post_init__(self) -> None:
        if math.isqrt(self.num_positions) ** 2 != self.num_positions:
            raise ValueError(f"num_positions={self.num_positions}: expected a square number")


TINY_DIT = ZImageDiTConfig(
    dim=64,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=4,
    n_kv_heads=4,
    cap_feat_dim=32,
    axes_dims=(4, 6, 6),
    time_hidden_dim=48,
)

TINY_OMNI_DIT = ZImageOmniDiTConfig(**vars(TINY_DIT), siglip_feat_dim=144)

TINY_SIGLIP2 = Siglip2ImageEncoderConfig(
    hidden_size=144, num_heads=2, num_layers=2, intermediate_size=40, num_positions=16
)

TINY_CONTROLNET = ZImageControlNetConfig(dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=4)


def tiny_dit_inputs(config: ZImageDiTConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return a dict of arguments of `ZImageDiT.forward`: two images, captions of two lengths; fp32 on the CPU."""
    import torch

    mask = torch.arange(9)[None, :] < torch.tensor([[9], [5]])
    return {
        "latents": torch.randn(2, config.in_channels, 6, 10, generator=generator),
        "time": torch.tensor([0.3, 0.8]),
        "prompt_embeds": torch.randn(2, 9, config.cap_feat_dim, generator=generator),
        "prompt_mask": mask,
    }


def infer_dit_config(shapes: Shapes) -> ZImageDiTConfig:
    """Return the `ZImageDiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file is of another variant, or has sizes that no Z-Image network has.
    """
    if any(name.startswith("siglip_") for name in shapes):
        raise ValueError("it has siglip_* parameters: that is the Omni variant")
    return ZImageDiTConfig(**_dit_fields(shapes))


def infer_omni_dit_config(shapes: Shapes) -> ZImageOmniDiTConfig:
    """Return the `ZImageOmniDiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file has sizes that no Z-Image network has.
    """
    return ZImageOmniDiTConfig(**_dit_fields(shapes), siglip_feat_dim=shapes["siglip_embedder.1.weight"][1])


def infer_siglip2_config(shapes: Shapes) -> Siglip2ImageEncoderConfig:
    """Return the `Siglip2ImageEncoderConfig` of the image encoder in a file, inferred from the shapes of its tensors.

    The number of heads does not show in the shapes: heads of 72 channels are assumed, as in So400m.

    Raises:
        ValueError: the width is no multiple of 72, the patches are not square, or the positions are not.
    """
    hidden_size, values = shapes["vision_model.embeddings.patch_embedding.weight"]
    patch_size = math.isqrt(values // 3)
    if 3 * patch_size**2 != values or hidden_size % 72:
        raise ValueError(f"patches of {values} values and a width of {hidden_size}: expected squares of RGB and 72 n")
    return Siglip2ImageEncoderConfig(
        hidden_size=hidden_size,
        num_heads=hidden_size // 72,
        num_layers=count_items(shapes, "vision_model.encoder.layers"),
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        patch_size=patch_size,
        num_positions=shapes["vision_model.embeddings.position_embedding.weight"][0],
    )


def _dit_fields(shapes: Shapes) -> dict[str, Any]:
    """Return a dict of the fields of `ZImageDiTConfig` of a transformer file.

    Raises:
        ValueError: sizes that no Z-Image network has.
    """
    patch_size = _patch_size(shapes, "all_x_embedder")
    dim, patch_dim = shapes[f"all_x_embedder.{patch_size}-1.weight"]
    head_dim = _head_dim(shapes, "layers.0", dim)
    config = ZImageDiTConfig(
        dim=dim,
        n_layers=count_items(shapes, "layers"),
        n_refiner_layers=count_items(shapes, "noise_refiner"),
        n_heads=dim // head_dim,
        n_kv_heads=shapes["layers.0.attention.to_k.weight"][0] // head_dim,
        cap_feat_dim=shapes["cap_embedder.1.weight"][1],
        in_channels=patch_dim // patch_size**2,
        patch_size=patch_size,
        # RoPE uses a quarter of each head for time and the rest in equal parts for height and width.
        axes_dims=(head_dim // 4, head_dim * 3 // 8, head_dim * 3 // 8),
        time_hidden_dim=shapes["t_embedder.mlp.0.weight"][0],
    )
    _check_ffn_dim(shapes, "layers.0", config)
    return vars(config)


def infer_controlnet_config(shapes: Shapes) -> ZImageControlNetConfig:
    """Return the `ZImageControlNetConfig` of a ControlNet file, inferred from the shapes of its tensors.

    A file without `control_noise_refiner` is Union 2.0, as diffusers saves it. The published file of 2.0 holds that
    stack, untrained, and so has the shapes of 2.1; see `diffsynth_zimage.convert.CONTROLNET`.

    Raises:
        ValueError: the file is of no known variant, or has sizes that no Z-Image network has.
    """
    patch_size = _patch_size(shapes, "control_all_x_embedder")
    dim, patch_dim = shapes[f"control_all_x_embedder.{patch_size}-1.weight"]
    if patch_dim % patch_size**2:
        raise ValueError(f"patches of {patch_dim} values: expected a multiple of the {patch_size**2} pixels of a patch")
    head_dim = _head_dim(shapes, "control_layers.0", dim)
    refiner_layers = count_items(shapes, "control_noise_refiner")
    config = ZImageControlNetConfig(
        dim=dim,
        n_layers=count_items(shapes, "control_layers"),
        n_refiner_layers=refiner_layers or ZImageDiTConfig.n_refiner_layers,
        n_heads=dim // head_dim,
        n_kv_heads=shapes["control_layers.0.attention.to_k.weight"][0] // head_dim,
        in_channels=patch_dim // patch_size**2,
        patch_size=patch_size,
        refiner_hints=_refiner_hints(shapes, refiner_layers),
    )
    _check_ffn_dim(shapes, "control_layers.0", config)
    return config


def _refiner_hints(shapes: Shapes, refiner_layers: int) -> RefinerHints:
    if not refiner_layers:
        return "control_layers"
    hinting = sum(f"control_noise_refiner.{n}.after_proj.weight" in shapes for n in range(refiner_layers))
    if hinting not in (0, refiner_layers):
        raise ValueError(
            f"{hinting} of {refiner_layers} blocks of control_noise_refiner have after_proj; expected all or none"
        )
    return "control_noise_refiner" if hinting else "none"


def _head_dim(shapes: Shapes, block: str, dim: int) -> int:
    norm = f"{block}.attention.norm_q.weight"
    if norm not in shapes:
        raise ValueError(f"{norm} is missing; the head dimension cannot be inferred without it")
    (head_dim,) = shapes[norm]
    if head_dim % 16 or dim % head_dim:
        raise ValueError(f"head dimension {head_dim}: expected a multiple of 16 that divides the width {dim}")
    return head_dim


def _check_ffn_dim(shapes: Shapes, block: str, config: ZImageBlockConfig) -> None:
    ffn_dim = shapes[f"{block}.feed_forward.w1.weight"][0]
    if ffn_dim != config.ffn_dim:
        raise ValueError(f"feed-forward width {ffn_dim}: expected 8/3 of {config.dim}, {config.ffn_dim}")


def _patch_size(shapes: Shapes, embedder: str) -> int:
    found = [match for name in shapes if (match := re.fullmatch(rf"{embedder}\.(\d+)-(\d+)\.weight", name))]
    if len(found) != 1 or found[0][2] != "1":
        raise ValueError(f"{len(found)} patch embedders ({embedder}.P-1.weight); expected one, of a single frame")
    return int(found[0][1])
