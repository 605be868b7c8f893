"""The Wan video transformer (Team Wan 2025, arXiv:2503.20314): one network for all its variants.

Text-to-video, image-to-video, first-last-frame, Fun and two-expert models differ in sizes and optional modules, all of
which are in the config. A variant that changes the forward pass is an extension (`diffsynth_wan.extension`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.nn import LayerNorm, RMSNorm, gated_residual, rotary_angles, sinusoidal_embedding
from diffsynth.runtime.feature import StepContext
from diffsynth_wan.config import CAMERA_PIXELS, WanDiTConfig, WanVaceConfig
from diffsynth_wan.extension import Attend, Extension, Positions, Rotary, Stream

TIME_SCALE = 1000.0
"""Factor from sigma to the timestep that the network was trained with; `forward` takes sigma."""


class WanDiT(nn.Module):
    """Transformer of Wan 2.1 and 2.2. Parameter names are those of Wan2.1's `diffusion_pytorch_model*.safetensors`.

    `gradient_checkpointing` is a plain attribute: if True, blocks recompute their activations in the backward pass.
    """

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            WanBlock(config, image_branch=config.image_dim > 0) for _ in range(config.num_layers)
        )
        self.head = Head(config)
        if config.image_dim:
            self.img_emb = ImageEmbedding(config)
        if config.reference_channels:
            self.ref_conv = nn.Conv2d(config.reference_channels, dim, kernel_size=patch[1:], stride=patch[1:])
        if config.camera_channels:
            self.control_adapter = CameraAdapter(config)

    def forward(
        self,
        latents: Float[Tensor, "b c t h w"],
        time: Float[Tensor, "b"] | Float[Tensor, "b g"],
        prompt_embeds: Float[Tensor, "b l text_dim"],
        image_embeds: Float[Tensor, "b i image_dim"] | None = None,
        condition_latents: Float[Tensor, "b c_condition t h w"] | None = None,
        *,
        extensions: Sequence[Extension] = (),
        step: StepContext | None = None,
    ) -> Float[Tensor, "b c t h w"]:
        """Return the velocity `noise - x0`, a tensor with the axes `b c t h w` and the dtype of `latents`.

        Args:
            latents: noised, scaled latents; frames, height and width are multiples of `config.patch_size`.
            time: sigma in [0, 1], fp32: one for the whole video, or one for each of `g` groups of equally many
                consecutive tokens (`g` frames, or `g` tokens).
            prompt_embeds: hidden states of the text encoder, padded with zeros as in training.
            image_embeds: hidden states of the image encoder; given if and only if the network has an image branch.
            condition_latents: channels that are appended to those of `latents`: a mask and an encoded image, a control
                video.
            extensions: applied in this order after the embedding; see `diffsynth_wan.extension`.
            step: the step of the loop, for extensions.

        Raises:
            ValueError: sizes, channels or image do not fit this network.
        """
        stream = replace(self.embed(latents, time, prompt_embeds, image_embeds, condition_latents), step=step)
        for extension in extensions:
            stream = extension(self, stream)
        tokens = stream.tokens
        for index, block in enumerate(self.blocks):
            if index in stream.skip_blocks:
                continue
            tokens = self.run_block(block, index, tokens, stream)
            for residual in stream.residuals.get(index, ()):
                tokens = tokens + residual(tokens)
        patches = stream.join(self.head(tokens, stream.time))
        frames, height, width = stream.grid
        return rearrange(
            patches[:, stream.prefix_frames * height * width :].to(latents.dtype),
            "b (t h w) (p q r c) -> b c (t p) (h q) (w r)",
            t=frames - stream.prefix_frames,
            h=height,
            w=width,
            p=self.config.patch_size[0],
            q=self.config.patch_size[1],
            r=self.config.patch_size[2],
        )

    def embed(
        self,
        latents: Float[Tensor, "b c t h w"],
        time: Float[Tensor, "b"] | Float[Tensor, "b g"],
        prompt_embeds: Float[Tensor, "b l text_dim"],
        image_embeds: Float[Tensor, "b i image_dim"] | None,
        condition_latents: Float[Tensor, "b c_condition t h w"] | None,
    ) -> Stream:
        """Return a `Stream` (the inputs of the transformer blocks) before extensions change it; arguments and errors
        are those of `WanDiT.forward`.
        """
        grid = self._grid(latents)
        if condition_latents is not None:
            latents = torch.cat((latents, condition_latents), dim=1)
        self._check(latents, image_embeds)
        times = time[:, None] if time.ndim == 1 else time
        embedded = sinusoidal_embedding(TIME_SCALE * times.float().flatten(), self.config.freq_dim).to(latents.dtype)
        time_embed = self.time_embedding(embedded).unflatten(0, times.shape)
        positions = (tuple(range(grid[0])), tuple(range(grid[1])), tuple(range(grid[2])))
        return Stream(
            tokens=self.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous().to(latents.dtype),
            positions=positions,
            rotary=rotary_embedding(positions, self.config, latents.device),
            context=self.text_embedding(prompt_embeds),
            image_context=None if image_embeds is None else self.img_emb(image_embeds),
            time=time_embed,
            modulation=self.time_projection(time_embed).float().unflatten(-1, (6, -1)),
        )

    def set_positions(self, stream: Stream, positions: Positions) -> Stream:
        """Return a copy of `stream`, a `Stream`, with the same tokens at RoPE positions `positions`."""
        rotary = rotary_embedding(positions, self.config, stream.tokens.device)
        return replace(stream, positions=positions, rotary=rotary)

    def run_block(self, block: nn.Module, index: int, tokens: Float[Tensor, "b s e"], stream: Stream) -> Tensor:
        """Return a tensor: the tokens `b s e` after `block`, with the self-attention that `stream` sets for block
        `index`.
        """
        return gradient_checkpoint_forward(
            block,
            self.gradient_checkpointing,
            False,
            tokens,
            stream.context,
            stream.image_context,
            stream.modulation,
            stream.rotary,
            stream.attend(index),
        )

    def _grid(self, latents: Tensor) -> tuple[int, int, int]:
        sizes, patch = tuple(latents.shape[2:]), self.config.patch_size
        if any(size % extent for size, extent in zip(sizes, patch, strict=True)):
            raise ValueError(f"latents are {'x'.join(map(str, sizes))}; expected multiples of the patch {patch}")
        frames, height, width = (size // extent for size, extent in zip(sizes, patch, strict=True))
        return frames, height, width

    def _check(self, latents: Tensor, image_embeds: Tensor | None) -> None:
        config = self.config
        if latents.shape[1] != config.in_channels:
            raise ValueError(
                f"latents and condition_latents have {latents.shape[1]} channels together; this network takes "
                f"{config.in_channels}, of which {config.out_channels} are latents"
            )
        if (image_embeds is None) == (config.image_dim > 0):
            needs = "needs image_embeds" if config.image_dim else "has no image branch; leave out image_embeds"
            raise ValueError(f"this network {needs}")
        if image_embeds is not None and config.image_tokens not in (0, image_embeds.shape[1]):
            raise ValueError(
                f"image_embeds have {image_embeds.shape[1]} tokens; this network has positions for "
                f"{config.image_tokens}, for the first and the last image"
            )


class WanBlock(nn.Module):
    """Self-attention, cross-attention to prompt and image, feed-forward; the first and the last are time-modulated."""

    def __init__(self, config: WanDiTConfig | WanVaceConfig, *, image_branch: bool) -> None:
        super().__init__()
        dim, eps = config.dim, config.eps
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config, image_branch=image_branch)
        self.norm1 = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.norm2 = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.norm3 = LayerNorm(dim, eps=eps)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Float[Tensor, "b s e"],
        context: Float[Tensor, "b l e"],
        image_context: Float[Tensor, "b i e"] | None,
        modulation: Float[Tensor, "b g 6 e"],
        rotary: Rotary,
        attend: Attend,
    ) -> Float[Tensor, "b s e"]:
        """Return the tokens `b s e` after this block."""
        groups = modulation.shape[1]
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = _group_modulations(self.modulation, modulation)
        h = self.norm1(_in_groups(x, groups), scale=scale, shift=shift).view(x.shape)
        h = self.self_attn(h, rotary, attend)
        x = gated_residual(_in_groups(x, groups), _in_groups(h, groups), gate).view(x.shape)
        x = x + self.cross_attn(self.norm3(x), context, image_context)
        h = self.ffn(self.norm2(_in_groups(x, groups), scale=scale_ffn, shift=shift_ffn))
        return gated_residual(_in_groups(x, groups), h, gate_ffn).view(x.shape)


class SelfAttention(nn.Module):
    """Projections, norms and RoPE of self-attention; the attention itself is the argument `attend`."""

    def __init__(self, config: WanDiTConfig | WanVaceConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps=config.eps)
        self.norm_k = RMSNorm(dim, eps=config.eps)

    def forward(self, x: Float[Tensor, "b s e"], rotary: Rotary, attend: Attend) -> Float[Tensor, "b s e"]:
        """Return the projected self-attention output `b s e`, one vector for each token."""
        q = self.norm_q(self.heads(self.q(x)), rotary=rotary)
        k = self.norm_k(self.heads(self.k(x)), rotary=rotary)
        return self.o(attend(q, k, self.heads(self.v(x))).flatten(2))

    def heads(self, x: Float[Tensor, "b s e"]) -> Float[Tensor, "b s n d"]:
        """Return `x` as `b s n d`, its channels divided into `n` heads."""
        return x.unflatten(2, (self.num_heads, -1))


class CrossAttention(SelfAttention):
    """Attention to the prompt plus, in a network with an image branch, attention to the image with its own keys."""

    def __init__(self, config: WanDiTConfig | WanVaceConfig, *, image_branch: bool) -> None:
        super().__init__(config)
        if image_branch:
            self.k_img = nn.Linear(config.dim, config.dim)
            self.v_img = nn.Linear(config.dim, config.dim)
            self.norm_k_img = RMSNorm(config.dim, eps=config.eps)

    def forward(
        self, x: Float[Tensor, "b s e"], context: Float[Tensor, "b l e"], image_context: Float[Tensor, "b i e"] | None
    ) -> Float[Tensor, "b s e"]:
        """Return the projected cross-attention output `b s e`, one vector for each video token."""
        q = self.heads(self.norm_q(self.q(x)))
        out = attention(q, self.heads(self.norm_k(self.k(context))), self.heads(self.v(context)))
        if image_context is not None:
            k = self.heads(self.norm_k_img(self.k_img(image_context)))
            out = out + attention(q, k, self.heads(self.v_img(image_context)))
        return self.o(out.flatten(2))


class ImageEmbedding(nn.Module):
    """MLP from hidden states of the image encoder to context tokens; with learned positions if there are two images."""

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        image_dim = config.image_dim
        self.proj = nn.Sequential(
            LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, config.dim),
            LayerNorm(config.dim),
        )
        self.emb_pos = nn.Parameter(torch.zeros(1, config.image_tokens, image_dim)) if config.image_tokens else None

    def forward(self, image_embeds: Float[Tensor, "b i image_dim"]) -> Float[Tensor, "b i e"]:
        """Return the context tokens `b i e`, one for each hidden state of the image encoder."""
        if self.emb_pos is not None:
            image_embeds = image_embeds + self.emb_pos.to(image_embeds.dtype)
        return self.proj(image_embeds)


class CameraAdapter(nn.Module):
    """Embedding of camera rays in Control-Camera networks; see `diffsynth_wan.features.camera.CameraMotion`."""

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        patch = config.patch_size[1:]
        channels = config.camera_channels * CAMERA_PIXELS**2
        self.conv = nn.Conv2d(channels, config.dim, kernel_size=patch, stride=patch)
        self.residual_blocks = nn.Sequential(*(CameraBlock(config.dim) for _ in range(config.camera_layers)))

    def forward(self, rays: Float[Tensor, "b c t height width"]) -> Float[Tensor, "b s e"]:
        """Return the embedded camera rays `b s e`, a vector for each video token; each frame is embedded by itself."""
        frames = rays.shape[2]
        pixels = F.pixel_unshuffle(rearrange(rays, "b c t h w -> (b t) c h w"), CAMERA_PIXELS)
        tokens = self.residual_blocks(self.conv(pixels))
        return rearrange(tokens, "(b t) e h w -> b (t h w) e", t=frames)


class CameraBlock(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)

    def forward(self, x: Float[Tensor, "bt e h w"]) -> Float[Tensor, "bt e h w"]:
        """Return the feature maps `bt e h w` after this block, of the size of the input."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Head(nn.Module):
    """Modulated norm and projection from tokens to latent patches."""

    def __init__(self, config: WanDiTConfig) -> None:
        super().__init__()
        frames, height, width = config.patch_size
        self.norm = LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_channels * frames * height * width)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Float[Tensor, "b s e"], time: Float[Tensor, "b g e"]) -> Float[Tensor, "b s p"]:
        """Return the output values `b s p` of each token's patch, flattened with channels last."""
        groups = time.shape[1]
        shift, scale = _group_modulations(self.modulation, time.float()[:, :, None])
        return self.head(self.norm(_in_groups(x, groups), scale=scale, shift=shift).view(x.shape))


def rotary_embedding(positions: Positions, config: WanDiTConfig, device: torch.device) -> Rotary:
    """Return (cos, sin), tensors `1 s half_d` on `device`: cosines and sines of the RoPE angles of each token of the
    grid with these positions along time, height and width.

    Angles are computed in fp64 on the CPU, once for each position of an axis.
    """
    sections = []
    for axis, (indices, dim) in enumerate(zip(positions, config.axes_dims, strict=True)):
        angles = rotary_angles(torch.tensor(indices)[None, :, None], axes_dims=(dim,), theta=config.rope_theta)[0]
        shape = [1, 1, 1, dim // 2]
        shape[axis] = len(indices)
        sections.append(angles.view(shape).to(device))
    grid = [len(indices) for indices in positions]
    cos, sin = (
        torch.cat([function(angles).expand(*grid, -1) for angles in sections], dim=-1).flatten(0, 2)[None]
        for function in (torch.cos, torch.sin)
    )
    return cos, sin


def _group_modulations(
    own: Float[Tensor, "1 k e"], by_time: Float[Tensor, "b g #k e"]
) -> tuple[Float[Tensor, "bg 1 e"], ...]:
    """Return a tuple of `k` fp32 tensors `bg 1 e`, one per modulation: the module's own plus those by time, for each
    group of tokens.
    """
    return (own.float() + by_time).flatten(0, 1).unsqueeze(2).unbind(1)


def _in_groups(x: Float[Tensor, "b s e"], groups: int) -> Float[Tensor, "bg m e"]:
    """Return a tensor `bg m e`: each item's tokens `x`, divided into `groups` groups of `m` consecutive tokens, which
    become items of the batch.
    """
    return x.unflatten(1, (groups, -1)).flatten(0, 1)
