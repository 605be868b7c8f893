"""Qwen2.5-VL as a text encoder that also reads images (arXiv:2502.13923), by transformers' vision encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from diffsynth.models.config import Qwen25VLTextEncoderConfig
from diffsynth.models.language_model import Decoder, MultiAxisRotary, hidden_states, init_weights
from diffsynth.models.transformers_attention import attn_implementation

Grid = tuple[int, int]
"""Rows and columns of the patches of an image, multiples of `Qwen25VLTextEncoderConfig.merge_size`."""

VISION_THETA = 10000.0
"""Base of the rotary frequencies of the vision encoder."""


class Qwen25VLTextEncoder(nn.Module):
    """Qwen2.5-VL without its head. Parameter names are those of the published files."""

    def __init__(self, config: Qwen25VLTextEncoderConfig) -> None:
        super().__init__()
        self.config = config
        rotary = MultiAxisRotary(config.head_dim, config.rope_theta, config.rope_sections)
        self.model = Decoder(config, qkv_bias=True, rotary=rotary)
        self.visual = Qwen2_5_VisionTransformerPretrainedModel(_vision_options(config))
        # transformers' module has a buffer of frequencies; `encode_images` computes them.
        self.visual.rotary_pos_emb = nn.Identity()

    def forward(
        self,
        input_ids: Int[Tensor, "b s"],
        attention_mask: Int[Tensor, "b s"] | Bool[Tensor, "b s"] | None = None,
        *,
        patches: Float[Tensor, "p v"] | None = None,
        grids: Sequence[Grid] = (),
        image_mask: Bool[Tensor, "b s"] | None = None,
        layers: Sequence[int] = (-1,),
    ) -> Float[Tensor, "b s e"]:
        """Return a tensor `b s e`, `e = len(layers) * hidden_size`: the hidden states at the indices `layers`, in this
        order, concatenated along the last axis, in the dtype of the weights.

        Args:
            input_ids: token ids, padded on the right.
            attention_mask: 1 for text and images and 0 for padding; None means that nothing is padded.
            patches: pixel values of the patches of all images, as transformers' image processor of Qwen2-VL makes them;
                None for texts without images.
            grids: rows and columns of the patches of each image, in the order of the texts.
            image_mask: True for the tokens that images take the place of, on the CPU; one for each square of merged
                patches.
            layers: see `diffsynth.models.language_model.hidden_states`. Qwen-Image uses the default, the last one,
                which is normalised.

        Raises:
            ValueError: an index that the model does not have, or images that do not fit their tokens or patches.
        """
        embeds = positions = None
        if patches is not None:
            if image_mask is None:
                raise ValueError("patches are given without image_mask; pass the tokens that the images replace")
            positions = text_and_image_positions(image_mask, grids, merge_size=self.config.merge_size)
            embeds = self.model.embed_tokens(input_ids)
            features = self.encode_images(patches.to(embeds.dtype), grids)
            rows, columns = (index.to(input_ids.device) for index in image_mask.nonzero(as_tuple=True))
            embeds = embeds.index_put((rows, columns), features)
            positions = positions.to(input_ids.device)
        return hidden_states(
            self.model, input_ids, attention_mask, layers=layers, embeds=embeds, position_ids=positions
        )

    def encode_images(self, patches: Float[Tensor, "p v"], grids: Sequence[Grid]) -> Float[Tensor, "m e"]:
        """Return a tensor `m e` with one embedding for each square of `merge_size` x `merge_size` patches, image by
        image and row by row, in the dtype of `patches`.

        Args:
            patches: pixel values of the patches of all images, each image in squares, row by row.
            grids: rows and columns of the patches of each image.

        Raises:
            ValueError: the number of patches is not that of the grids.
        """
        counts = [rows * columns for rows, columns in grids]
        if sum(counts) != len(patches):
            raise ValueError(f"{len(patches)} patches; expected {sum(counts)}, the sum of grids={tuple(grids)}")
        images = zip(patches.split(counts), grids, strict=True)
        return torch.cat([self._encode_image(image, grid) for image, grid in images])

    def _encode_image(self, patches: Float[Tensor, "p v"], grid: Grid) -> Float[Tensor, "m e"]:
        config, device = self.config, patches.device
        order, lengths = window_order(grid, merge_size=config.merge_size, window=self._window())
        squares = config.merge_size**2
        index = (order[:, None] * squares + torch.arange(squares)).flatten()
        # The module casts its input to the dtype of its weight, so the architecture keeps that from a dtype of storage.
        hidden = self.visual.patch_embed(patches)[index.to(device)]
        angles = self._angles(grid)[index].to(device)
        rotary = (angles.cos(), angles.sin())
        windows = torch.cat((torch.zeros(1), lengths.cumsum(0) * squares)).int()
        whole = torch.tensor([0, len(patches)], dtype=torch.int32)
        for number, block in enumerate(self.visual.blocks):
            bounds = whole if number in config.full_attention_layers else windows
            hidden = block(hidden, cu_seqlens=bounds, position_embeddings=rotary)
        return self.visual.merger(hidden)[order.argsort().to(device)]

    def _angles(self, grid: Grid) -> Float[Tensor, "p d"]:
        """Return an fp32 CPU tensor `p d` of the rotary angles of the patches of an image, in the order of squares."""
        quarter = self.config.vision_hidden_size // self.config.vision_heads // 4
        frequencies = VISION_THETA ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
        rows, columns = patch_positions(grid, merge_size=self.config.merge_size).unbind(1)
        half = torch.cat((rows[:, None] * frequencies, columns[:, None] * frequencies), dim=1)
        return torch.cat((half, half), dim=1)

    def _window(self) -> int:
        return self.config.window_size // self.config.patch_size // self.config.merge_size

    def init_weights(self) -> None:
        """Set weights for training from scratch; see `diffsynth.models.language_model.init_weights`."""
        init_weights(self)


def patch_positions(grid: Grid, *, merge_size: int) -> Int[Tensor, "p 2"]:
    """Return an int CPU tensor `p 2` of the row and column of each patch of an image, square by square."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    sides = (grid[0] // merge_size, merge_size, grid[1] // merge_size, merge_size)
    return torch.stack([each.reshape(sides).transpose(1, 2).flatten() for each in (rows, columns)], dim=1)


def window_order(grid: Grid, *, merge_size: int, window: int) -> tuple[Int[Tensor, "m"], Int[Tensor, "w"]]:
    """Return (indices of the squares of an image, window by window; number of squares in each window), int CPU tensors.

    Args:
        grid: rows and columns of patches.
        merge_size: side of a square, in patches.
        window: side of a window, in squares; those at the right and lower edge may be smaller.
    """
    rows, columns = grid[0] // merge_size, grid[1] // merge_size
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    number = (row // window) * -(-columns // window) + column // window
    return number.flatten().argsort(stable=True), number.flatten().bincount()


def text_and_image_positions(
    image_mask: Bool[Tensor, "b s"], grids: Sequence[Grid], *, merge_size: int
) -> Int[Tensor, "3 b s"]:
    """Return an int CPU tensor `3 b s` of the positions (time, row, column) of tokens.

    Tokens of text count 1 on all axes. Those of an image have one time and their row and column in the image, and the
    text after it goes on behind its longer side.

    Args:
        image_mask: True for tokens of images, on the CPU.
        grids: rows and columns of the patches of each image, in the order of the texts.
        merge_size: side of a square of patches, which is a token.

    Raises:
        ValueError: the tokens are not those of the images.
    """
    squares = [(rows // merge_size, columns // merge_size) for rows, columns in grids]
    if int(image_mask.sum()) != sum(rows * columns for rows, columns in squares):
        raise ValueError(
            f"{int(image_mask.sum())} tokens of images; expected {sum(rows * columns for rows, columns in squares)} "
            f"for grids={tuple(grids)}"
        )
    waiting, texts = iter(squares), []
    for is_image in image_mask.tolist():
        parts, start, token = [], 0, 0
        while token < len(is_image):
            if is_image[token]:
                rows, columns = next(waiting)
                place = torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij")
                parts.append(torch.stack(place).flatten(1) + start)
                token, start = token + rows * columns, start + max(rows, columns)
            else:
                parts.append(torch.full((3, 1), start))
                token, start = token + 1, start + 1
        texts.append(torch.cat(parts, dim=1))
    return torch.stack(texts, dim=1)


def _vision_options(config: Qwen25VLTextEncoderConfig) -> Qwen2_5_VLVisionConfig:
    return Qwen2_5_VLVisionConfig(
        depth=config.vision_layers,
        hidden_size=config.vision_hidden_size,
        intermediate_size=config.vision_intermediate_size,
        num_heads=config.vision_heads,
        patch_size=config.patch_size,
        temporal_patch_size=config.temporal_patch_size,
        spatial_merge_size=config.merge_size,
        window_size=config.window_size,
        out_hidden_size=config.hidden_size,
        fullatt_block_indexes=list(config.full_attention_layers),
        attn_implementation=attn_implementation(),
    )
