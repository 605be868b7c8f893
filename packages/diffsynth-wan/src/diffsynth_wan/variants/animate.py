"""Wan-Animate (arXiv:2509.14055): a character takes its pose from a pose video and its expression from a face video.

Pose tokens are added to the tokens of the video; after every fifth block, the tokens of a frame attend to the face
tokens of that frame. Neither depends on the noise level, so `WanAnimateAdapter.forward` runs once for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.nn import LayerNorm, RMSNorm
from diffsynth.sampling.windows import Window
from diffsynth_wan.config import WanAnimateConfig
from diffsynth_wan.extension import Network, Stream, TokenScope
from diffsynth_wan.variants.motion_encoder import MotionEncoder

FACE_BATCH = 8
"""Frames per batch of the motion encoder; it works on 512 x 512 pixels, so larger batches take much memory."""


@dataclass(frozen=True, eq=False)
class AnimateMotion:
    """Extension that adds the pose to the tokens and the face as residuals.

    Args:
        adapter: network whose blocks attend to the face.
        pose_tokens, face_tokens: output of `WanAnimateAdapter.forward`. Frame 0 of the stream is the character's
            image; the pose begins at frame 1. A batch of 1 serves a batch of videos.
    """

    adapter: WanAnimateAdapter
    pose_tokens: Float[Tensor, "b s e"]
    face_tokens: Float[Tensor, "b t n e"]
    token_scope: ClassVar[TokenScope] = "part"

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with pose and face; see `Extension`.

        Raises:
            ValueError: pose or face have another number of frames than the video, or the adapter's number of blocks
                does not divide the network's.
        """
        frames, height, width = stream.grid
        per_frame, fusers = height * width, self.adapter.face_adapter.fuser_blocks
        if self.pose_tokens.shape[1] != (frames - 1) * per_frame or self.face_tokens.shape[1] != frames:
            raise ValueError(
                f"{self.pose_tokens.shape[1]} pose_tokens and face_tokens of {self.face_tokens.shape[1]} frames; for "
                f"{frames} frames of {per_frame} tokens, the first one without a pose, expected "
                f"{(frames - 1) * per_frame} and {frames}"
            )
        if len(dit.blocks) % len(fusers):
            raise ValueError(f"{len(fusers)} face blocks do not divide the {len(dit.blocks)} blocks of the network")
        face_tokens = self.face_tokens.expand(len(stream.tokens), -1, -1, -1)
        posed = stream.tokens + stream.split(F.pad(self.pose_tokens, (0, 0, per_frame, 0)))
        stream = replace(stream, tokens=posed)
        for number, fuser in enumerate(fusers):
            block = number * (len(dit.blocks) // len(fusers))
            stream = stream.with_residual(block, _FaceResidual(fuser, face_tokens, stream.first_token, per_frame))
        return stream

    def in_window(self, window: Window) -> AnimateMotion:
        """Return an `AnimateMotion` with pose and face of the frames of `window`, and the character's image in every
        window.
        """
        assert window.prefix_frames, "the character's image is frame 0, before the video"
        pose = self.pose_tokens.unflatten(1, (self.face_tokens.shape[1] - 1, -1))
        pose = replace(window, prefix_frames=window.prefix_frames - 1).cut(pose, dim=1).flatten(1, 2)
        return replace(self, pose_tokens=pose, face_tokens=window.cut(self.face_tokens, dim=1))


@dataclass(frozen=True, eq=False)
class _FaceResidual:
    fuser: FaceBlock
    face_tokens: Tensor
    first_token: int
    per_frame: int

    def __call__(self, tokens: Tensor) -> Tensor:
        # A frame may be divided between two processes: each pads it to a whole frame and drops the padding after.
        frame, before = divmod(self.first_token, self.per_frame)
        after = -(before + tokens.shape[1]) % self.per_frame
        padded = F.pad(tokens, (0, 0, before, after)) if before or after else tokens
        frames = padded.shape[1] // self.per_frame
        return self.fuser(padded, self.face_tokens[:, frame : frame + frames])[:, before : before + tokens.shape[1]]


class WanAnimateAdapter(nn.Module):
    """Pose and face networks of Animate. Parameter names are those of files that also hold the transformer."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size
        self.pose_patch_embedding = nn.Conv3d(config.latent_channels, config.dim, kernel_size=patch, stride=patch)
        self.motion_encoder = MotionEncoder(config)
        self.face_encoder = FaceEncoder(config)
        self.face_adapter = FaceAdapter(config)

    def forward(
        self,
        pose_latents: Float[Tensor, "b c t h w"],
        face_pixels: Float[Tensor, "b 3 frames height width"],
    ) -> tuple[Float[Tensor, "b s e"], Float[Tensor, "b t_plus_1 n e"]]:
        """Return (pose tokens `b s e`, face tokens `b t_plus_1 n e`); the face tokens of the first frame are zero.

        Args:
            pose_latents: scaled latents of the pose video.
            face_pixels: face video in [-1, 1]: 1 frame for the first latent frame, 4 for each further one.
        """
        pose = self.pose_patch_embedding(pose_latents).flatten(2).transpose(1, 2)
        faces = rearrange(face_pixels, "b c t h w -> (b t) c h w")
        motion = torch.cat([self.motion_encoder(batch) for batch in faces.split(FACE_BATCH)])
        face = self.face_encoder(motion.unflatten(0, (len(face_pixels), -1)))
        return pose, F.pad(face, (0, 0, 0, 0, 1, 0))


class FaceEncoder(nn.Module):
    """Causal convolutions from one motion vector per frame to a few tokens per latent frame."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        hidden, self.heads = config.face_hidden_dim, config.face_heads
        self.conv1_local = CausalConv(config.motion_embed_dim, hidden * self.heads)
        self.conv2 = CausalConv(hidden, hidden, stride=2)
        self.conv3 = CausalConv(hidden, hidden, stride=2)
        self.norm = LayerNorm(hidden, eps=config.eps, elementwise_affine=False)
        self.out_proj = nn.Linear(hidden, config.dim)
        self.padding_tokens = nn.Parameter(torch.zeros(1, 1, 1, config.dim))

    def forward(self, motion: Float[Tensor, "b frames m"]) -> Float[Tensor, "b t n e"]:
        """Return face tokens `b t n e`: for each latent frame, one token per head and the learned padding token."""
        batch = motion.shape[0]
        x = rearrange(self.conv1_local(motion), "b t (n c) -> (b n) t c", n=self.heads)
        x = F.silu(self.norm(x))
        x = F.silu(self.norm(self.conv2(x)))
        x = F.silu(self.norm(self.conv3(x)))
        tokens = rearrange(self.out_proj(x), "(b n) t e -> b t n e", b=batch)
        padding = self.padding_tokens.to(tokens.dtype).expand(batch, tokens.shape[1], 1, -1)
        return torch.cat((tokens, padding), dim=2)


class CausalConv(nn.Module):
    """1D convolution over a frame and the two before it; at the start, the first frame is repeated as padding."""

    def __init__(self, in_dim: int, out_dim: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size=3, stride=stride)

    def forward(self, x: Float[Tensor, "b t_in d_in"]) -> Float[Tensor, "b t d"]:
        """Return the convolved features `b t d` of every frame, or of every second one at a stride of 2."""
        padded = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
        return self.conv(padded).transpose(1, 2)


class FaceAdapter(nn.Module):
    """Container of the face blocks, which run one by one after blocks of the network."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.fuser_blocks = nn.ModuleList(FaceBlock(config) for _ in range(config.num_layers))


class FaceBlock(nn.Module):
    """Cross-attention of the tokens of each frame to the face tokens of that frame."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.dim // config.num_heads
        self.num_heads = config.num_heads
        self.pre_norm = LayerNorm(dim, eps=config.eps, elementwise_affine=False)
        self.linear1_q = nn.Linear(dim, dim)
        self.linear1_kv = nn.Linear(dim, 2 * dim)
        self.linear2 = nn.Linear(dim, dim)
        self.q_norm = RMSNorm(head_dim, eps=config.eps)
        self.k_norm = RMSNorm(head_dim, eps=config.eps)

    def forward(self, x: Float[Tensor, "b s e"], face_tokens: Float[Tensor, "b t n e"]) -> Float[Tensor, "b s e"]:
        """Return the projected attention output `b s e`, one vector for each video token."""
        frames = face_tokens.shape[1]
        q = rearrange(self.linear1_q(self.pre_norm(x)), "b (t s) (n d) -> (b t) s n d", t=frames, n=self.num_heads)
        kv = self.linear1_kv(self.pre_norm(face_tokens))
        k, v = rearrange(kv, "b t f (two n d) -> two (b t) f n d", two=2, n=self.num_heads)
        attended = attention(self.q_norm(q), self.k_norm(k), v)
        return self.linear2(rearrange(attended, "(b t) s n d -> b (t s) (n d)", t=frames))
