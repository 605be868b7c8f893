"""Overlapping rectangles of latents, and how what was made of each is blended; for autoencoders of large pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor

from diffsynth.core.repeats import repeated


class Tiling(TypedDict, total=False):
    """How an autoencoder cuts pictures or frames, as pipelines name it.

    Args:
        tiled: in overlapping tiles, blended: less memory, more work. Off unless asked for.
        tile_size: height and width of a tile, in latent pixels.
        tile_stride: from one tile to the next; the rest of a tile is its overlap.
    """

    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Latent pixels `start` to `stop` (behind the last) along one axis, fading over `rise` and `fall` at its ends."""

    start: int
    stop: int
    rise: int
    fall: int

    def scaled(self, scale: int) -> Span:
        """The same in a picture that is `scale` times as large."""
        return Span(self.start * scale, self.stop * scale, self.rise * scale, self.fall * scale)

    def weights(self) -> Float[Tensor, "size"]:
        """1 inside and linear ramps to the ends, never 0."""
        place = torch.arange(1, self.stop - self.start + 1, dtype=torch.float32)
        rising = place / max(self.rise, 1)
        falling = place.flip(0) / max(self.fall, 1)
        return torch.minimum(rising, falling).clamp(max=1)


@dataclass(frozen=True)
class Tile:
    """A rectangle of latents."""

    rows: Span
    columns: Span

    def cut(self, frames: Float[Tensor, "*b h w"], scale: int = 1) -> Float[Tensor, "*b h2 w2"]:
        """This rectangle of frames that are `scale` times as large as latents; a view."""
        rows, columns = self.rows.scaled(scale), self.columns.scaled(scale)
        return frames[..., rows.start : rows.stop, columns.start : columns.stop]

    def weights(self, scale: int = 1) -> Float[Tensor, "h w"]:
        """How much each pixel counts against those of other tiles."""
        rows, columns = self.rows.scaled(scale).weights(), self.columns.scaled(scale).weights()
        return torch.minimum(rows[:, None], columns[None, :])


class Blend:
    """Tiles of pictures, or of one piece of a video, added up in fp32 as they come.

    Args:
        height, width: of the whole, in latent pixels.
        scale: of the tiles that come, against latents.
        like: whose first axes, dtype and device the whole has.
    """

    def __init__(self, height: int, width: int, scale: int, *, like: Float[Tensor, "*b h2 w2"]) -> None:
        self._scale = scale
        self._dtype = like.dtype
        size = (height * scale, width * scale)
        self._sum = like.new_zeros((*like.shape[:-2], *size), dtype=torch.float32)
        self._weight = self._sum.new_zeros(size)

    def add(self, tile: Tile, part: Float[Tensor, "*b h2 w2"]) -> None:
        """What was made of one tile."""
        weights = tile.weights(self._scale).to(part.device)
        tile.cut(self._sum, self._scale).add_(part.float() * weights)
        tile.cut(self._weight, self._scale).add_(weights)

    def result(self) -> Float[Tensor, "*b h w"]:
        """The weighted mean, in the dtype of the tiles. One tile alone comes out to the bit."""
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
    """Rectangles that cover `height` x `width` latents; one alone without `tiled`. See `Tiling`.

    Args:
        height, width: in latent pixels.
        tiled, tile_size, tile_stride: see `Tiling`.
        even: all tiles are of one size, at most a stride apart; else the last one is what is left. A small last tile
            has other statistics than its neighbours, which norms over a whole picture show as a seam.

    Raises:
        ValueError: a size or stride that is not positive, or a stride that leaves gaps.
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
    """What `run` makes of each tile, blended; one tile alone is the whole, to the bit.

    Args:
        run: from a tile of `x` to its part of the result.
        x: pixels or latents.
        tiles: that cover it; see `cover`.
        scales: pixels per latent pixel, of `x` and of the result.
    """
    if len(tiles) == 1:
        return run(x)
    scale_in, scale_out = scales
    blend = None
    for tile in tiles:
        part = repeated(run, tile.cut(x, scale_in))
        blend = blend or Blend(x.shape[-2] // scale_in, x.shape[-1] // scale_in, scale_out, like=part)
        blend.add(tile, part)
    assert blend is not None
    return blend.result()


def check_tiles(tile_size: tuple[int, int], tile_stride: tuple[int, int]) -> None:
    """Refuse tiles that cannot cover anything.

    Raises:
        ValueError: a size or stride that is not positive, or a stride that leaves gaps.
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
        rise = starts[index - 1] + size - start if index else 0
        fall = start + size - starts[index + 1] if index < gaps else 0
        yield Span(start, start + size, rise, fall)
