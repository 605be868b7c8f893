"""Tiles: overlapping rectangles of latents that an autoencoder processes one by one and blends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.progress import track
from diffsynth.core.repeats import repeated


class Tiling(TypedDict, total=False):
    """Arguments of tiled encoding and decoding.

    Args:
        tiled: whether to process overlapping tiles and blend them, with less memory and more work; False by default.
        tile_size: height and width of a tile in latent pixels.
        tile_stride: distance between neighbouring tiles in latent pixels, vertical and horizontal.
    """

    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Latent pixels `start` to `stop` (exclusive) of a tile along one axis.

    Args:
        start, stop: first pixel, and the one after the last.
        fade_in, fade_out: number of pixels at each end over which the blending weight ramps up or down.
    """

    start: int
    stop: int
    fade_in: int
    fade_out: int

    def scaled(self, scale: int) -> Span:
        """Return this `Span` with start, stop and fades multiplied by `scale`: latent pixels become image pixels."""
        return Span(self.start * scale, self.stop * scale, self.fade_in * scale, self.fade_out * scale)

    def weights(self) -> Float[Tensor, "size"]:
        """Return an fp32 tensor, the blending weight of each pixel of the span: 1 inside, linear ramps (above 0) over
        the fades at its ends.
        """
        index = torch.arange(1, self.stop - self.start + 1, dtype=torch.float32)
        rising = index / max(self.fade_in, 1)
        falling = index.flip(0) / max(self.fade_out, 1)
        return torch.minimum(rising, falling).clamp(max=1)


@dataclass(frozen=True)
class Tile:
    """Rectangle of latents."""

    rows: Span
    columns: Span

    def cut(self, frames: Float[Tensor, "*b h w"], scale: int = 1) -> Float[Tensor, "*b h2 w2"]:
        """Return a view of the tile's part of `frames`, which are `scale` times as high and wide as the latents."""
        rows, columns = self.rows.scaled(scale), self.columns.scaled(scale)
        return frames[..., rows.start : rows.stop, columns.start : columns.stop]

    def weights(self, scale: int = 1) -> Float[Tensor, "h w"]:
        """Return an fp32 tensor `h w`, the blending weights of the tile's pixels in an image `scale` times as large as
        the latents.
        """
        rows, columns = self.rows.scaled(scale).weights(), self.columns.scaled(scale).weights()
        return torch.minimum(rows[:, None], columns[None, :])


class Blend:
    """Weighted sum in fp32 of the tiles of images, or of a piece of a video.

    Args:
        height, width: size of the whole image in latent pixels.
        scale: side of the tiles' pixels relative to latent pixels; 1 for latents.
        like: a processed tile, whose leading axes, dtype and device the result has.
    """

    def __init__(self, height: int, width: int, scale: int, *, like: Float[Tensor, "*b h2 w2"]) -> None:
        self._scale = scale
        self._dtype = like.dtype
        size = (height * scale, width * scale)
        self._sum = like.new_zeros((*like.shape[:-2], *size), dtype=torch.float32)
        self._weight = self._sum.new_zeros(size)

    def add(self, tile: Tile, part: Float[Tensor, "*b h2 w2"]) -> None:
        """Add `part`, the processed pixels of `tile`, to the weighted sum."""
        weights = tile.weights(self._scale).to(part.device)
        tile.cut(self._sum, self._scale).add_(part.float() * weights)
        tile.cut(self._weight, self._scale).add_(weights)

    def result(self) -> Float[Tensor, "*b h w"]:
        """Return the whole image as a tensor: the weighted mean of the tiles added so far, in the dtype of the first
        tile.
        """
        return (self._sum / self._weight).to(self._dtype)


def cover(
    height: int,
    width: int,
    *,
    tiled: bool = False,
    tile_size: tuple[int, int] = (30, 52),
    tile_stride: tuple[int, int] = (15, 26),
    even: bool = False,
) -> list[Tile]:
    """Return a list of `Tile`s (rectangles) that cover `height` x `width` latent pixels, row by row; a single one if
    `tiled` is False.

    Args:
        height, width: size of the latents in latent pixels.
        tiled, tile_size, tile_stride: see `Tiling`.
        even: whether all tiles have one size and are at most `tile_stride` apart; else the last tile of a row or
            column may be smaller. A small tile has other statistics than its neighbours, which in networks with norms
            over the whole image shows as a seam.

    Raises:
        ValueError: a size or stride is not positive, or the stride leaves gaps.
    """
    if not tiled:
        return [Tile(Span(0, height, 0, 0), Span(0, width, 0, 0))]
    check_tiles(tile_size, tile_stride)
    spans = _even_spans if even else _spans
    rows = list(spans(height, tile_size[0], tile_stride[0]))
    columns = list(spans(width, tile_size[1], tile_stride[1]))
    return [Tile(down, across) for down in rows for across in columns]


def tile_by_tile(
    run: Callable[[Tensor], Tensor], x: Float[Tensor, "*b h_in w_in"], tiles: Sequence[Tile], scales: tuple[int, int]
) -> Float[Tensor, "*c h_out w_out"]:
    """Return one tensor blended from the results of `run` for each tile of `x`; a single tile gives `run(x)`, not cut.

    Args:
        run: maps a tile of `x` to a tile of the result.
        x: pixels or latents.
        tiles: tiles that cover `x`; see `cover`.
        scales: pixels per latent pixel along one side, in `x` and in the result.
    """
    if len(tiles) == 1:
        return run(x)
    scale_in, scale_out = scales
    blend = None
    for tile in track(tiles, total=len(tiles), unit="tiles"):
        part = repeated(run, tile.cut(x, scale_in))
        blend = blend or Blend(x.shape[-2] // scale_in, x.shape[-1] // scale_in, scale_out, like=part)
        blend.add(tile, part)
    assert blend is not None
    return blend.result()


def check_tiles(tile_size: tuple[int, int], tile_stride: tuple[int, int]) -> None:
    """Raise ValueError unless `tile_size` and `tile_stride` are pairs of positive integers and no stride is larger than
    its size.

    Raises:
        ValueError: a size or stride is not positive, or the stride leaves gaps.
    """
    for name, value in (("tile_size", tile_size), ("tile_stride", tile_stride)):
        if len(value) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in value):
            raise ValueError(f"{name}={value!r}: expected two positive integers, in latent pixels")
    if any(stride > size for size, stride in zip(tile_size, tile_stride, strict=True)):
        raise ValueError(f"tile_stride={tile_stride} is larger than tile_size={tile_size} and would leave gaps")


def _spans(extent: int, size: int, stride: int) -> Iterator[Span]:
    overlap = size - stride
    for start in range(0, extent, stride):
        is_last = start + size >= extent
        yield Span(start, min(start + size, extent), overlap if start else 0, 0 if is_last else overlap)
        if is_last:
            return


def _even_spans(extent: int, size: int, stride: int) -> Iterator[Span]:
    size = min(size, extent)
    gaps = -(-(extent - size) // stride)
    starts = [index * (extent - size) // max(gaps, 1) for index in range(gaps + 1)]
    for index, start in enumerate(starts):
        fade_in = starts[index - 1] + size - start if index else 0
        fade_out = start + size - starts[index + 1] if index < gaps else 0
        yield Span(start, start + size, fade_in, fade_out)
