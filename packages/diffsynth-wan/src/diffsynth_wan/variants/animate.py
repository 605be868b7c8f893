"""Wan-Animate (arXiv:2509.14055): a character moves as a pose video says and looks as a face video says.

The pose is added to the tokens; the face is read, frame by frame, behind every fifth block. Neither depends on the
time, so `WanAnimateAdapter.forward` runs once for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffsynth.core.attention import attention
from diffsynth.nn import LayerNorm, RMSNorm
from diffsynth_wan.config import WanAnimateConfig
from diffsynth_wan.extension import Sees, Stream
from diffsynth_wan.variants.motion_encoder import MotionEncoder

if TYPE_CHECKING:
    from diffsynth_wan.dit import WanDiT
    from diffsynth_wan.windows import Window

FACES_AT_ONCE = 8
"""Frames in a batch of the motion encoder, which works on 512 x 512 pixels."""


@dataclass(frozen=True, eq=False)
class AnimateMotion:
    """Pose and face of a character.

    Args:
        adapter: whose blocks read the face.
        pose_tokens, face_tokens: what `WanAnimateAdapter.forward` gave. Frame 0 of the stream is the character's
            image; the pose begins at frame 1. One pose and face may serve a batch of videos.
    """

    adapter: WanAnimateAdapter
    pose_tokens: Float[Tensor, "b s e"]
    face_tokens: Float[Tensor, "b t n e"]
    sees: ClassVar[Sees] = "part"

    def __call__(self, dit: WanDiT, stream: Stream) -> Stream:
        """See `Extension`.

        Raises:
            ValueError: pose or face have another number of frames than the video, or the adapter is of another network.
        """
        frames, height, width = stream.grid
        per_frame, fusers = height * width, self.adapter.face_adapter.fuser_blocks
        if self.pose_tokens.shape[1] != (frames - 1) * per_frame or self.face_tokens.shape[1] != frames:
            raise ValueError(
                f"pose_tokens are {self.pose_tokens.shape[1]}, face_tokens of {self.face_tokens.shape[1]} frames; for "
                f"{frames} frames of {per_frame} tokens, the first one without a pose, expected "
                f"{(frames - 1) * per_frame} and {frames}"
            )
        if len(dit.blocks) % len(fusers):
            raise ValueError(f"{len(fusers)} blocks read the face; they do not spread evenly over {len(dit.blocks)}")
        face_tokens = self.face_tokens.expand(len(stream.tokens), -1, -1, -1)
        posed = stream.tokens + stream.split(F.pad(self.pose_tokens, (0, 0, per_frame, 0)))
        stream = replace(stream, tokens=posed)
        for number, fuser in enumerate(fusers):
            block = number * (len(dit.blocks) // len(fusers))
            stream = stream.with_residual(block, _Face(fuser, face_tokens, stream.first, per_frame))
        return stream

    def in_window(self, window: Window) -> AnimateMotion:
        """Pose and face of its frames; the character's image is in front of every window."""
        assert window.lead, "the character's image is frame 0, in front of the video"
        pose = self.pose_tokens.unflatten(1, (self.face_tokens.shape[1] - 1, -1))
        pose = replace(window, lead=window.lead - 1).cut(pose, dim=1).flatten(1, 2)
        return replace(self, pose_tokens=pose, face_tokens=window.cut(self.face_tokens, dim=1))


@dataclass(frozen=True, eq=False)
class _Face:
    fuser: FaceBlock
    face_tokens: Tensor
    first: int
    per_frame: int

    def __call__(self, tokens: Tensor) -> Tensor:
        # A frame may lie in the parts of two processes: each fills it up with tokens that nobody reads.
        frame, before = divmod(self.first, self.per_frame)
        behind = -(before + tokens.shape[1]) % self.per_frame
        filled = F.pad(tokens, (0, 0, before, behind)) if before or behind else tokens
        frames = filled.shape[1] // self.per_frame
        return self.fuser(filled, self.face_tokens[:, frame : frame + frames])[:, before : before + tokens.shape[1]]


class WanAnimateAdapter(nn.Module):
    """What Animate files hold beside the parameters of the network."""

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
        """Tokens of the pose, and of the face with an empty frame in front.

        Args:
            pose_latents: of the pose video, scaled.
            face_pixels: in [-1, 1], 4 frames for each latent frame but the first, which has 1.
        """
        pose = self.pose_patch_embedding(pose_latents).flatten(2).transpose(1, 2)
        faces = rearrange(face_pixels, "b c t h w -> (b t) c h w")
        motion = torch.cat([self.motion_encoder(some) for some in faces.split(FACES_AT_ONCE)])
        face = self.face_encoder(motion.unflatten(0, (len(face_pixels), -1)))
        return pose, F.pad(face, (0, 0, 0, 0, 1, 0))


class FaceEncoder(nn.Module):
    """From the motion of every frame to a few tokens of every latent frame."""

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
        """One token per head, and the learned one."""
        batch = motion.shape[0]
        x = rearrange(self.conv1_local(motion), "b t (n c) -> (b n) t c", n=self.heads)
        x = F.silu(self.norm(x))
        x = F.silu(self.norm(self.conv2(x)))
        x = F.silu(self.norm(self.conv3(x)))
        tokens = rearrange(self.out_proj(x), "(b n) t e -> b t n e", b=batch)
        padding = self.padding_tokens.to(tokens.dtype).expand(batch, tokens.shape[1], 1, -1)
        return torch.cat((tokens, padding), dim=2)


class CausalConv(nn.Module):
    """A convolution along time over this frame and two before it; the first frame stands for those that are missing."""

    def __init__(self, in_dim: int, out_dim: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_dim, out_dim, kernel_size=3, stride=stride)

    def forward(self, x: Float[Tensor, "b t_in d_in"]) -> Float[Tensor, "b t d"]:
        """Every frame, or every second."""
        padded = F.pad(x.transpose(1, 2), (2, 0), mode="replicate")
        return self.conv(padded).transpose(1, 2)


class FaceAdapter(nn.Module):
    """The blocks that read the face. They are run one by one, behind blocks of the network."""

    def __init__(self, config: WanAnimateConfig) -> None:
        super().__init__()
        self.fuser_blocks = nn.ModuleList(FaceBlock(config) for _ in range(config.num_layers))


class FaceBlock(nn.Module):
    """The tokens of each frame attend to the face in that frame."""

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
        """What each token read of the face."""
        frames = face_tokens.shape[1]
        q = rearrange(self.linear1_q(self.pre_norm(x)), "b (t s) (n d) -> (b t) s n d", t=frames, n=self.num_heads)
        kv = self.linear1_kv(self.pre_norm(face_tokens))
        k, v = rearrange(kv, "b t f (two n d) -> two (b t) f n d", two=2, n=self.num_heads)
        read = attention(self.q_norm(q), self.k_norm(k), v)
        return self.linear2(rearrange(read, "(b t) s n d -> b (t s) (n d)", t=frames))
