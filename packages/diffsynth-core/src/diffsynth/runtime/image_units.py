"""Arguments and units that image pipelines share: rounding the size, encoding an input image, making the first latents,
and decoding the last ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.errors import shown
from diffsynth.models.flux_autoencoder import TILE_SIZE, TILE_STRIDE
from diffsynth.models.tiles import Tiling, check_tiles
from diffsynth.runtime.argument_types import RandDevice
from diffsynth.runtime.images import check_decoded, image_to_tensor, images_expected, images_to_batch, tensor_to_images
from diffsynth.runtime.request import MAX_SIDE
from diffsynth.runtime.unit import Phase, Unit, unit
from diffsynth.sampling.noise import add_noise, initial_noise
from diffsynth.terminal import module_logger

logger = module_logger(__name__)


class ImageArguments(TypedDict, total=False):
    """Negative prompt, input image, size, and how the image is computed: a base of the `TypedDict` of a family's call.

    Args:
        negative_prompt: Text that guidance steers away from; used only if `cfg_scale` is not 1.
        prompt_weighting: Whether brackets in prompts are weights of words: `(word:1.4)` raises what a word adds to the
            text encoder's result, `(word:0.7)` lowers it, `(word)` is 1.1; `\\(` is a bracket of the text.
        input_image: Image to start from, or a list of one per result; None starts from pure noise.
        denoising_strength: Noise level that the input image is raised to, in (0, 1]; 1 ignores the input. The number
            of steps stays the same.
        height, width: Size of the image in pixels, at least 1 and at most 32768; rounded up to a multiple of 16.
        resize_mode: How images of another aspect ratio than the result are scaled to its size: "stretch" changes their
            proportions, as diffusers does; "crop" scales to cover it and cuts off what is outside; "pad" scales to fit
            into it and adds black.
        tiled: Whether the autoencoder works in overlapping tiles, which takes less memory and gives other pixels. None
            uses tiles only if the memory plan for `vram_limit` needs them.
        tile_size: Height and width of a tile in latent pixels; one number sets both.
        tile_stride: Largest distance between neighbouring tiles in latent pixels; the rest of a tile is overlap.
        rand_device: Device on which the initial noise is generated; "cpu" gives the same noise on every machine.
    """

    negative_prompt: str | Sequence[str]
    prompt_weighting: bool
    input_image: Image.Image | Sequence[Image.Image] | Tensor | None
    denoising_strength: float
    height: int
    width: int
    resize_mode: ResizeMode
    tiled: bool | None
    tile_size: int | tuple[int, int]
    tile_stride: int | tuple[int, int]
    rand_device: RandDevice


def image_size(multiple: int, *, default: int = 1024) -> Unit:
    """Return a `Unit` that checks height and width (pixels) and rounds both up to multiples of `multiple`; it warns."""

    def round_size(*, height: int = default, width: int = default) -> tuple[int, int]:
        """Return height and width in pixels, rounded up.

        Args:
            height, width: Size of the result in pixels, at least 1 and at most 32768.
        """
        _check_side("height", height)
        _check_side("width", width)
        rounded = (round_up(height, multiple), round_up(width, multiple))
        if rounded != (height, width):
            logger.warning("%dx%d is rounded up to %dx%d, multiples of %d", height, width, *rounded, multiple)
        return rounded

    return unit("height", "width", phase=Phase.SHAPE)(round_size)


def round_up(value: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def check_tiling(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless the tiling arguments of a call are valid; see `set_tiling`."""
    set_tiling(**{name: values[name] for name in ("tiled", "tile_size", "tile_stride")})


def ignored_tiles(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict argument -> reason: the sizes of tiles, in a call without tiles; else it is empty."""
    return {} if values["tiled"] else dict.fromkeys(("tile_size", "tile_stride"), "tiled is off")


def check_input_image(values: Mapping[str, Any]) -> None:
    """Raise ValueError unless a call has as many input images as results, or one; the size of a tensor is checked when
    it is encoded.
    """
    images, batch_size = values["input_image"], values["batch_size"]
    if isinstance(images, Image.Image):
        return
    if isinstance(images, Tensor) and (images.ndim != 4 or images.shape[1] != 3):
        raise ValueError(f"input_image is a tensor of shape {tuple(images.shape)}; expected (b, 3, height, width)")
    if len(images) not in (1, batch_size):
        raise ValueError(f"input_image has {len(images)} images; expected {images_expected(batch_size)}")


@unit("tiling", phase=Phase.SHAPE, switches={"tiled": True}, check=check_tiling, ignores=ignored_tiles)
def set_tiling(
    *,
    tiled: bool | None = None,
    tile_size: int | tuple[int, int] = TILE_SIZE,
    tile_stride: int | tuple[int, int] = TILE_STRIDE,
) -> Tiling:
    """Return the `Tiling` of the autoencoder in a call: `tiled` is False for None, tiles are pairs of ints.

    Raises:
        ValueError: tiles of no size, or that leave gaps.
    """
    if tiled not in (None, True, False):
        raise ValueError(f"tiled={tiled!r}: expected True, False, or None, which leaves it to the plan")
    size, stride = (tuple(side) if isinstance(side, Sequence) else (side, side) for side in (tile_size, tile_stride))
    check_tiles(size, stride)
    return {"tiled": bool(tiled), "tile_size": size, "tile_stride": stride}


@unit("input_latents", phase=Phase.ENCODE, only_with="input_image", check=check_input_image)
def encode_input_image(
    vae: Any,
    *,
    input_image: Image.Image | Sequence[Image.Image] | Tensor | None = None,
    height: int,
    width: int,
    resize_mode: ResizeMode = "stretch",
    tiling: Tiling,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Float[Tensor, "b c h w"]:
    """Return the latents of the input image, a tensor `b c h w` with an item for each result."""
    assert input_image is not None, "the unit runs only with it"
    pixels = images_to_batch(input_image, height=height, width=width, resize_mode=resize_mode).to(device, dtype)
    return vae.encode(pixels, **tiling).expand(batch_size, -1, -1, -1)


def check_strength(values: Mapping[str, Any], start: str = "input_image") -> None:
    """Raise ValueError if a call begins at a noise level below 1 without something to begin with, which noise alone is
    not.

    Args:
        values: of the call.
        start: the argument for what is raised to the noise level.

    Raises:
        ValueError: `denoising_strength` is below 1, and the argument `start` is None.
    """
    if (strength := values.get("denoising_strength", 1)) != 1 and values.get(start) is None:
        raise ValueError(
            f"denoising_strength={strength} is given without {start}: at that noise level the loop begins with "
            f"{start}, and not with noise alone. Pass {start}, or leave denoising_strength out"
        )


def ignored_input(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a dict name -> reason: `input_latents`, in a call that begins with noise alone; else it is empty."""
    return {"input_latents": "denoising_strength is 1"} if values.get("denoising_strength", 1) == 1 else {}


def encode_each(
    vae: Any, images: Iterable[Image.Image], *, tiling: Tiling, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "1 c h w"], ...]:
    """Return the latents of images, each at its own size, as a tuple of tensors `1 c h w`.

    Args:
        vae: the autoencoder.
        images: upright RGB images, whose sides it can encode.
        tiling: tiles of the autoencoder.
        device, dtype: of the pixels and latents.
    """
    return tuple(
        vae.encode(image_to_tensor(image, image.height, image.width).to(device, dtype), **tiling) for image in images
    )


def image_latents(factor: int, *, noise_dtype: torch.dtype | None = None) -> Unit:
    """Return a `Unit` that makes the latents `b c h w` of the first step: noise, or `input_latents` noised to the first
    noise level.

    Args:
        factor: height and width of a latent pixel, in pixels.
        noise_dtype: dtype in which the noise is generated, which changes its values; None is that of the call.
    """

    def initial_latents(
        *,
        input_latents: Float[Tensor, "b c h w"] | None = None,
        sigmas: Float[Tensor, "steps_plus_1"],
        height: int,
        width: int,
        latent_channels: int,
        seeds: list[int | None],
        rand_device: RandDevice = "cpu",
        device: torch.device,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b c h w"]:
        shape = (latent_channels, height // factor, width // factor)
        drawn = noise_dtype or dtype
        noise = initial_noise(shape, seeds, rand_device=rand_device, dtype=drawn, device=device).to(dtype)
        return noise if input_latents is None else add_noise(input_latents, noise, sigmas[0])

    options = {"check": check_strength, "ignores": ignored_input}
    return unit("latents", random=True, phase=Phase.LATENTS, **options)(initial_latents)


@unit("output")
def decode_image(
    vae: Any, *, latents: Float[Tensor, "b c *t h w"], tiling: Tiling, output_type: str
) -> list[Image.Image] | list[list[Image.Image]] | Float[Tensor, "b channels *t height width"]:
    """Return the images of latents: a list of PIL images, or a tensor in [-1, 1] if `output_type` is "tensor".

    Each item of latents `b c t h w` is `t` images, such as the layers of one: they are decoded one by one, and the
    result has a list of `t` PIL images for each item, or is a tensor `b channels t height width`.
    """
    if latents.ndim == 5:
        pixels = torch.stack([vae.decode(each, **tiling) for each in latents.unbind(2)], dim=2)
    else:
        pixels = vae.decode(latents, **tiling)
    if output_type == "tensor":
        check_decoded(pixels)  # clamping hides infinity
        return pixels.clamp(-1, 1)
    if pixels.ndim == 5:
        return [tensor_to_images(images) for images in pixels.transpose(1, 2)]
    return tensor_to_images(pixels)


def _check_side(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIDE:
        raise ValueError(f"{name}={shown(value)}: expected a positive integer of at most {MAX_SIDE}, in pixels")
