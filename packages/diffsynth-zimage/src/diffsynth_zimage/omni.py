"""Transformer of Z-Image-Omni-Base: Z-Image with reference images and their features in the sequence.

The caption is a list of segments, and a reference image stands between two of them: it follows a segment in time, and
its features follow it. Reference images, their features and the segments before the prompt are clean: they are
modulated by the time without noise, whatever the noise level of the image that is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from diffsynth.nn import RMSNorm
from diffsynth_zimage.config import TOKEN_MULTIPLE, ZImageOmniDiTConfig
from diffsynth_zimage.dit import ContextBlock, ZImageDiT, rotary_embedding
from diffsynth_zimage.extension import Stream
from diffsynth_zimage.tokens import image_positions, padded_length

_REFINED = "z_image_omni_refined_features"
"""Key of a call's state: the features of the reference images and their tokens after the refiner."""


class ZImageOmniDiT(ZImageDiT):
    """Transformer of Z-Image-Omni-Base. Parameter names are those of the published `transformer/*.safetensors`.

    In `forward`, `prompt_mask` has, with n reference images, the number of the segment of each token, 1 to n + 2, and 0
    for padding: reference image i follows segment i, the image that is computed follows segment n + 1. Without any, the
    caption is one segment, which the image follows.
    """

    config: ZImageOmniDiTConfig

    def __init__(self, config: ZImageOmniDiTConfig) -> None:
        super().__init__(config)
        self.siglip_embedder = nn.Sequential(
            RMSNorm(config.siglip_feat_dim, eps=config.norm_eps), nn.Linear(config.siglip_feat_dim, config.dim)
        )
        self.siglip_refiner = nn.ModuleList(ContextBlock(config) for _ in range(config.n_refiner_layers))
        self.siglip_pad_token = nn.Parameter(torch.zeros(1, config.dim))

    def append_references(
        self,
        stream: Stream,
        images: Sequence[Float[Tensor, "1 c h w"]],
        features: Sequence[Float[Tensor, "rows columns e"]],
    ) -> Stream:
        """Return a `Stream` with reference images and their features, which all items of the batch share.

        Args:
            stream: of `embed`, with a caption of two segments more than there are images.
            images: clean, scaled latents; sizes may differ.
            features: hidden states of the image encoder for each image.

        Raises:
            ValueError: the caption has another number of segments, or a side is no multiple of the patch size.
        """
        count, batch = len(images), len(stream.image)
        if {len(each) for each in stream.caption_segments} != {count + 2} or len(features) != count:
            raise ValueError(
                f"{count} images and {len(features)} features with captions of "
                f"{[len(each) for each in stream.caption_segments]} segments; expected {count + 2} segments"
            )
        ends = [_end_times(each) for each in stream.caption_segments]
        tokens, positions = [stream.image], [stream.positions[:, : stream.image.shape[1]].expand(batch, -1, -1)]
        for index, latents in enumerate(images):
            grid = self._grid(latents)
            length = padded_length(grid[0] * grid[1])
            tokens.append(self._embed_image(latents, length).expand(batch, -1, -1))
            positions.append(torch.stack([image_positions(each[index], grid, length) for each in ends]))
        image = torch.cat(tokens, dim=1)
        captions = stream.positions[:, stream.image.shape[1] :].expand(batch, -1, -1)

        clean_caption = [sum(map(padded_length, each[:count])) for each in stream.caption_segments]
        is_clean = torch.zeros(batch, image.shape[1] + stream.caption.shape[1], dtype=torch.bool)
        is_clean[:, stream.image.shape[1] : image.shape[1]] = True
        for item, length in zip(is_clean, clean_caption, strict=True):
            item[image.shape[1] : image.shape[1] + length] = True
        joint_mask = stream.joint_mask
        if joint_mask is not None:  # the references stand before the caption's tokens, of which some are masked
            joint_mask = F.pad(joint_mask, (image.shape[1] - stream.image.shape[1], 0), value=True)
        changed = replace(stream, image=image, joint_mask=joint_mask, time_embed=self._times(stream, is_clean))
        changed = self.set_positions(changed, torch.cat((*positions, captions), dim=1))
        sizes = [tuple(latents.shape[-2:]) for latents in images]
        return changed.with_layers_extension(_Features(tuple(features), tuple(sizes), tuple(ends)))

    def append_features(
        self,
        stream: Stream,
        features: Sequence[Float[Tensor, "rows columns e"]],
        positions: Int[Tensor, "b s axes"],
    ) -> Stream:
        """Return a `Stream` with the refined features of the reference images after the caption's tokens, and a block
        of padding for the image that is computed, which has no features.

        The refined features do not depend on the noise level: they are computed once in a call and branch of guidance.

        Args:
            stream: with refined tokens.
            features: hidden states of the image encoder for each image.
            positions: of the features' tokens, with padding, on the CPU.
        """
        state = {} if stream.step is None else stream.step.call_state
        made_of, tokens = state.get(_REFINED, (None, stream.image))
        if made_of is not features:
            tokens = self._refine_features(features, positions, stream.image)
            state[_REFINED] = (features, tokens)

        batch = len(tokens)
        is_clean = torch.ones(batch, tokens.shape[1], dtype=torch.bool)
        is_clean[:, -TOKEN_MULTIPLE:] = False
        joint_mask = stream.joint_mask
        if joint_mask is not None:
            joint_mask = F.pad(joint_mask, (0, tokens.shape[1]), value=True)
        noisy = stream.time_embed[:, :1]  # that of the image's first token
        times = torch.cat((stream.time_embed, self._mixed(noisy, is_clean)), dim=1)
        changed = replace(
            stream, caption=torch.cat((stream.caption, tokens), dim=1), joint_mask=joint_mask, time_embed=times
        )
        return self.set_positions(changed, torch.cat((stream.positions, positions), dim=1))

    def init_weights(self) -> None:
        """Set the module's weights for training from scratch; see `ZImageDiT.init_weights`."""
        super().init_weights()
        nn.init.normal_(self.siglip_pad_token, std=0.02)

    def _caption_length(self, segments: tuple[int, ...]) -> int:
        return sum(map(padded_length, segments))

    def _positions(self, segments: list[tuple[int, ...]], grid: tuple[int, int]) -> Int[Tensor, "b s axes"]:
        image_len, caption_len = padded_length(grid[0] * grid[1]), max(map(self._caption_length, segments))
        # With n reference images the image follows segment n + 1 of n + 2; without any, the only one.
        times = [_end_times(each)[max(len(each) - 2, 0)] for each in segments]
        image = torch.stack([image_positions(each, grid, image_len) for each in times])
        caption = torch.stack([_caption_positions(each, caption_len) for each in segments])
        return torch.cat((image, caption), dim=1)

    def _embed_caption(
        self, prompt_embeds: Tensor, segments: list[tuple[int, ...]], caption_len: int, dtype: torch.dtype
    ) -> Float[Tensor, "b c e"]:
        """Return the caption's tokens, a tensor `b c e`: each segment, followed by its padding."""
        longest = max(map(sum, segments))
        text = self.cap_embedder(prompt_embeds).to(dtype)
        padding = self.cap_pad_token.to(dtype).expand(len(text), 1, -1)
        order = torch.full((len(text), caption_len), longest, dtype=torch.long)  # the index of the padding
        for row, lengths in zip(order, segments, strict=True):
            start = place = 0
            for length in lengths:
                row[place : place + length] = torch.arange(start, start + length)
                start, place = start + length, place + padded_length(length)
        return torch.cat((text[:, :longest], padding), dim=1).take_along_dim(order[:, :, None].to(text.device), dim=1)

    def _refine_features(
        self, features: Sequence[Float[Tensor, "rows columns e"]], positions: Tensor, like: Tensor
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens of the features after the refiner, a tensor `b s e`, in the batch and dtype of `like`."""
        parts = []
        for each in features:
            # The published code reads the memory of the features with channels first as if it were tokens.
            flat = each.permute(2, 0, 1).reshape(-1, each.shape[-1])
            embedded = self.siglip_embedder(flat).to(like.dtype)
            parts += [embedded, self._feature_padding(padded_length(len(flat)) - len(flat), embedded)]
        parts.append(self._feature_padding(TOKEN_MULTIPLE, parts[0]))
        tokens = torch.cat(parts).expand(len(like), -1, -1)
        rotary = rotary_embedding(positions, self.config, tokens.device)
        for block in self.siglip_refiner:
            tokens = block(tokens, rotary, None)
        return tokens

    def _feature_padding(self, count: int, like: Tensor) -> Float[Tensor, "s e"]:
        return self.siglip_pad_token.to(like.dtype).expand(count, -1)

    def _times(self, stream: Stream, is_clean: Bool[Tensor, "b s"]) -> Float[Tensor, "b s t"]:
        if stream.time_embed.dim() != 2:
            raise ValueError("the stream has a time for each token already; append all reference images at once")
        return self._mixed(stream.time_embed[:, None], is_clean)

    def _mixed(self, noisy: Float[Tensor, "b 1 t"], is_clean: Bool[Tensor, "b s"]) -> Float[Tensor, "b s t"]:
        """Return the embedded time of each token: that without noise where `is_clean`, else `noisy`."""
        time = torch.full((1,), self.config.t_scale, device=noisy.device)
        clean = self.t_embedder(time, dtype=noisy.dtype)
        return torch.where(is_clean[:, :, None].to(noisy.device), clean[:, None], noisy)


@dataclass(frozen=True, eq=False)
class _Features:
    """Extension of the layers that appends the features of reference images.

    Args:
        features: of each image.
        sizes: height and width of each image in latent pixels.
        ends: for each item of the batch, the end times of the caption's segments.
    """

    features: tuple[Float[Tensor, "rows columns e"], ...]
    sizes: tuple[tuple[int, ...], ...]
    ends: tuple[list[int], ...]

    def __call__(self, dit: ZImageOmniDiT, stream: Stream) -> Stream:
        positions = torch.stack([self._positions(each) for each in self.ends])
        return dit.append_features(stream, self.features, positions)

    def _positions(self, ends: Sequence[int]) -> Int[Tensor, "s axes"]:
        """Return positions `s axes`: those of features spread over the latent pixels of their image, one time after it;
        padding is at the origin.
        """
        parts = []
        for each, size, end in zip(self.features, self.sizes, ends, strict=False):
            grid = (each.shape[0], each.shape[1])
            ids = image_positions(end + 1, grid, padded_length(grid[0] * grid[1])).float()
            for axis, (extent, side) in enumerate(zip(grid, size, strict=True), start=1):
                ids[:, axis] = ids[:, axis] / max(extent - 1, 1) * (side - 1)
            parts.append(ids.long())
        return torch.cat((*parts, torch.zeros(TOKEN_MULTIPLE, 3, dtype=torch.long)))


def _end_times(segments: Sequence[int]) -> list[int]:
    """Return the time at which each segment of a caption ends; an image and its features take two times after it."""
    ends, time = [], 1
    for length in segments:
        ends.append(time + length)
        time += length + 2
    return ends


def _caption_positions(segments: Sequence[int], caption_len: int) -> Int[Tensor, "c axes"]:
    """Return positions `c axes` of the caption's tokens.

    The published code lists more positions than a segment has tokens, for its padding twice: the first time after the
    text, then at the origin. It reads the list from the start, so that later segments are not at their own times. The
    weights were made for it.
    """
    times, start = [], 1
    for length in segments:
        padded = padded_length(length)
        times += [*range(start, start + padded), *[0] * (padded - length)]
        start += length + 2
    times = (times + [0] * caption_len)[:caption_len]
    positions = torch.zeros(caption_len, 3, dtype=torch.long)
    positions[:, 0] = torch.tensor(times)
    return positions
