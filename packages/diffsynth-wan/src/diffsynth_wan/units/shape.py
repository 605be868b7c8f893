"""Size of the video of a call, and encoding of images and clips to that size."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.core.data.image import ResizeMode
from diffsynth.core.progress import track
from diffsynth.models.tiles import Tiling, cover
from diffsynth.runtime.image_units import ignored_tiles
from diffsynth.runtime.images import image_to_tensor
from diffsynth.runtime.unit import Phase, unit
from diffsynth.sampling.windows import SlidingWindow
from diffsynth.terminal import module_logger
from diffsynth_wan.units.clips import Clip, clip_pieces
from diffsynth_wan.units.size import PATCH, rounded_shape

logger = module_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class VideoShape:
    """Size, device and dtype of the video of a call; encodes images and clips to them.

    Args:
        num_frames: frames of the video, `time_factor * k + 1`.
        height, width: pixels, multiples of the side of a token.
        vae_factor: pixels per latent pixel, along one side.
        time_factor: frames per latent frame; the first frame is a latent frame by itself.
        resize_mode: how images and frames of another aspect ratio are scaled to the video's size.
        tiling: tiles of the autoencoder.
        device, dtype: of latents and conditions.
    """

    num_frames: int
    height: int
    width: int
    vae_factor: int
    time_factor: int
    resize_mode: ResizeMode
    tiling: Tiling
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Tuple (frames, height, width): the size of the video's latents, in latent frames and latent pixels."""
        frames = (self.num_frames - 1) // self.time_factor + 1
        return frames, self.height // self.vae_factor, self.width // self.vae_factor

    def pixels(self, image: Image.Image) -> Float[Tensor, "1 3 height width"]:
        """Return an image, scaled to the video's size, as fp32 `1 3 height width` in [-1, 1] on the CPU."""
        return image_to_tensor(image, self.height, self.width, resize_mode=self.resize_mode)

    def encode_image(self, vae: Any, image: Image.Image) -> Float[Tensor, "1 c 1 h w"]:
        """Return the latents `1 c 1 h w` of an image, encoded as a video of one frame."""
        return self.encode_pieces(vae, [self.pixels(image)[:, :, None]], num_frames=1)

    def encode_clip(self, vae: Any, name: str, clip: Clip, *, num_frames: int | None = None) -> Tensor:
        """Return the latents `1 c t h w` of the first `num_frames` frames of `clip` (None: as many as the video has),
        read and encoded a few frames at a time.

        Args:
            vae: the autoencoder.
            name: name of the call's argument, for messages.
            clip: frames that passed `check_clip`.
            num_frames: number of frames to encode; None means those of the video.
        """
        frames = self.num_frames if num_frames is None else num_frames
        return self.encode_pieces(vae, self.clip_pieces(name, clip, num_frames=frames), num_frames=frames)

    def clip_pieces(
        self, name: str, clip: Clip, *, num_frames: int, is_mask: bool = False
    ) -> Iterator[Float[Tensor, "1 3 t height width"]]:
        """Return an iterator over the pixels of the first `num_frames` frames of `clip` at the video's size; see
        `clips.clip_pieces`.
        """
        return clip_pieces(
            name,
            clip,
            num_frames=num_frames,
            height=self.height,
            width=self.width,
            resize_mode=self.resize_mode,
            piece=self.time_factor,
            is_mask=is_mask,
        )

    def encode_pieces(self, vae: Any, pieces: Iterable[Tensor], *, num_frames: int) -> Tensor:
        """Return the latents `1 c t h w` of a video given as `pieces`, tensors of pixels: the first of one frame, the
        others of `time_factor` frames.
        """
        total = (num_frames - 1) // self.time_factor + 1
        moved = (piece.to(self.device, self.dtype) for piece in track(pieces, total=total, unit="pieces"))
        return torch.cat(list(vae.encode_pieces(moved, **self.tiling)), dim=2)

    def keyframe_pieces(
        self, first: Float[Tensor, "1 3 height width"], last: Float[Tensor, "1 3 height width"] | None = None
    ) -> Iterator[Float[Tensor, "1 3 t height width"]]:
        """Yield a clip as long as the video in pieces (tensors of a few frames): the frame `first`, then grey (0)
        frames, the last of them replaced by `last` if given.
        """
        grey = first.new_zeros(1, 3, self.time_factor, self.height, self.width)
        yield first[:, :, None]
        pieces = self.latent_size[0] - 1
        for index in range(pieces):
            if last is None or index < pieces - 1:
                yield grey
            else:
                yield torch.cat([grey[:, :, 1:], last[:, :, None]], dim=2)


@unit("height", "width", "num_frames", phase=Phase.SHAPE)
def round_shape(
    *, height: int = 480, width: int = 832, num_frames: int = 81, vae_factor: int, time_factor: int
) -> tuple[int, int, int]:
    """Return the ints (height, width, frames) of a call: pixels rounded up to multiples of `PATCH * vae_factor`, frames
    rounded up to `k * time_factor + 1`.

    Changes are logged.
    """
    rounded = rounded_shape(height, width, num_frames, vae_factor=vae_factor, time_factor=time_factor)
    if rounded[:2] != (height, width):
        logger.warning("%dx%d is rounded up to %dx%d, multiples of %d", height, width, *rounded[:2], PATCH * vae_factor)
    if rounded[2] != num_frames:
        logger.warning("%d frames are rounded up to %d, %dn + 1", num_frames, rounded[2], time_factor)
    return rounded


@unit("tiling", phase=Phase.SHAPE, ignores=ignored_tiles)
def set_tiling(
    *, tiled: bool = True, tile_size: tuple[int, int] = (30, 52), tile_stride: tuple[int, int] = (15, 26)
) -> Tiling:
    """Return the `Tiling` of the autoencoder in a call."""
    return {"tiled": tiled, "tile_size": tuple(tile_size), "tile_stride": tuple(tile_stride)}


@unit("video_shape", "prefix_frames", phase=Phase.SHAPE)
def set_video_shape(
    *,
    height: int,
    width: int,
    num_frames: int,
    resize_mode: ResizeMode = "stretch",
    tiling: Tiling,
    vae_factor: int,
    time_factor: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[VideoShape, int]:
    """Return `(VideoShape, 0)`: the sizes of the call, and the start value of the number of prefix frames, to which
    other units add.

    Raises:
        ValueError: tiles of no size, or that leave gaps.
    """
    shape = VideoShape(
        num_frames=num_frames,
        height=height,
        width=width,
        vae_factor=vae_factor,
        time_factor=time_factor,
        resize_mode=resize_mode,
        tiling=tiling,
        device=device,
        dtype=dtype,
    )
    cover(*shape.latent_size[1:], **shape.tiling)  # raises for bad tiles now rather than when the video is decoded
    return shape, 0


@unit("sliding_window", phase=Phase.NETWORK)
def set_sliding_window(
    *, sliding_window_size: int | None = None, sliding_window_stride: int | None = None, prefix_frames: int
) -> SlidingWindow | None:
    """Return a `SlidingWindow` with the size and stride of the call; None if it gives neither, ValueError if only one.

    Runs after all units that add prefix frames.
    """
    return SlidingWindow.from_arguments(sliding_window_size, sliding_window_stride, prefix_frames=prefix_frames)
