"""The size of a video, and the way of pictures of that size into the autoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffsynth.models.tiles import Tiling
from diffsynth.runtime.image_units import round_up
from diffsynth.runtime.images import image_to_tensor
from diffsynth.runtime.progress import progress_bar
from diffsynth_wan.units.clips import Clip, clip_pieces

PATCH = 2
"""Side of a token of the network, in latent pixels."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What a call draws on.

    Args:
        num_frames: of the video, `time_factor * k + 1`.
        height, width: in pixels, whole tokens.
        vae_factor: pixels per latent pixel, along one side.
        time_factor: frames per latent frame; the first one stands alone.
        tiling: how the autoencoder cuts frames.
        device, dtype: of latents and conditions.
    """

    num_frames: int
    height: int
    width: int
    vae_factor: int
    time_factor: int
    tiling: Tiling
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        frames = (self.num_frames - 1) // self.time_factor + 1
        return frames, self.height // self.vae_factor, self.width // self.vae_factor

    def pixels(self, image: Image.Image) -> Float[Tensor, "1 3 height width"]:
        """An image as fp32 in [-1, 1] on the CPU, fitted to this size."""
        return image_to_tensor(image, self.height, self.width)

    def encode_clip(self, vae: Any, name: str, clip: Clip, *, num_frames: int | None = None) -> Tensor:
        """Latents `1 c t h w` of the first frames of a clip, decoded and encoded piece by piece; all frames by default.

        Args:
            vae: the autoencoder.
            name: of the argument, for messages.
            clip: long enough, see `check_clip`.
            num_frames: how many, if not as many as the video has.
        """
        frames = self.num_frames if num_frames is None else num_frames
        pieces = clip_pieces(
            name, clip, num_frames=frames, height=self.height, width=self.width, piece=self.time_factor
        )
        return self.encode_pieces(vae, pieces, num_frames=frames)

    def encode_pieces(self, vae: Any, pieces: Iterable[Tensor], *, num_frames: int) -> Tensor:
        """Latents `1 c t h w` of pixels in pieces: one frame, then `time_factor` at a time."""
        total = (num_frames - 1) // self.time_factor + 1
        shown: Iterable[Tensor] = progress_bar(pieces, description="encode", total=total) if total > 1 else pieces
        placed = (piece.to(self.device, self.dtype) for piece in shown)
        return torch.cat(list(vae.encode_pieces(placed, **self.tiling)), dim=2)

    def still_pieces(
        self, first: Float[Tensor, "1 3 height width"], last: Float[Tensor, "1 3 height width"] | None = None
    ) -> Iterator[Float[Tensor, "1 3 t height width"]]:
        """A clip in pieces that shows its first frame, then grey, and in the end its last frame if there is one."""
        grey = first.new_zeros(1, 3, self.time_factor, self.height, self.width)
        yield first[:, :, None]
        pieces = self.latent_size[0] - 1
        for index in range(pieces):
            if last is None or index < pieces - 1:
                yield grey
            else:
                yield torch.cat([grey[:, :, 1:], last[:, :, None]], dim=2)


def rounded_shape(
    height: int, width: int, num_frames: int, *, vae_factor: int, time_factor: int
) -> tuple[int, int, int]:
    """Sides rounded up to whole tokens, frames to one more than a multiple of `time_factor`.

    Raises:
        ValueError: one of them is no positive integer.
    """
    for name, value in (("height", height), ("width", width), ("num_frames", num_frames)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: expected a positive integer")
    multiple = PATCH * vae_factor
    return round_up(height, multiple), round_up(width, multiple), round_up(num_frames - 1, time_factor) + 1
