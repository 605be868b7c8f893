"""ControlNets of Z-Image: Fun-Controlnet-Union and -Tile by Alibaba PAI, versions 1.0, 2.0, 2.1 and 2.1-lite.

As in VACE (arXiv:2503.07598), a shorter stack of blocks over control latents gives hints, which are added to the tokens
after evenly spaced layers of the transformer. The variants differ in what they do before the transformer's noise
refiner; see `ZImageControlNetConfig.refiner_hints`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from diffsynth.core.gradient import gradient_checkpoint_forward
from diffsynth.errors import did_you_mean
from diffsynth.models.residuals import ScaledHint
from diffsynth_zimage.config import ZImageControlNetConfig
from diffsynth_zimage.dit import ZImageBlock
from diffsynth_zimage.extension import Network, Rotary, StackName, Stream, TimeEmbed

HINTED_STACKS: tuple[StackName, ...] = ("noise_refiner", "layers")
"""Stacks of the transformer that get hints, in the order in which a ControlNet computes them."""


@dataclass(frozen=True, eq=False)
class ControlNetResiduals:
    """Extension that adds the hints of a ControlNet to the transformer's tokens. Those of several ControlNets add up.

    Args:
        controlnet: ControlNet of this transformer.
        context: control latents, with mask and latents of an image to inpaint if the ControlNet takes them; see
            `ZImageControlNetConfig`. Scaled as the transformer's latents, of their height and width and of their batch
            or a batch of 1.
        scale: factor of the hints; 0 runs no ControlNet.
    """

    controlnet: ZImageControlNet
    context: Float[Tensor, "#b c h w"]
    scale: float = 1.0

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        """Return the stream with the hints for the noise refiner as residuals, and with an extension that adds those
        for the layers; see `Extension`.

        Raises:
            ValueError: the ControlNet does not fit the transformer, or the context does not fit the ControlNet or the
                latents.
        """
        if self.scale == 0:
            return stream
        theirs, ours = dit.config.dim, self.controlnet.config.dim
        if theirs != ours:
            raise ValueError(
                f"the ControlNet has tokens of width {ours}, the transformer of {theirs}; load a ControlNet of this "
                "transformer"
            )
        hinted_layers(len(dit.layers), self.controlnet.config.n_layers)
        control, hints = self.controlnet(stream, self.context, ("noise_refiner",))
        for block, hint in enumerate(hints["noise_refiner"]):
            stream = stream.with_residual("noise_refiner", block, ScaledHint(hint, self.scale))
        return stream.with_layers_extension(_LayerHints(self.controlnet, control, self.scale))


@dataclass(frozen=True, eq=False)
class _LayerHints:
    controlnet: ZImageControlNet
    control: Float[Tensor, "b i e"]
    scale: float

    def __call__(self, dit: Network, stream: Stream) -> Stream:
        _, hints = self.controlnet(stream, self.control, ("layers",))
        blocks = hinted_layers(len(dit.layers), len(hints["layers"]))
        for block, hint in zip(blocks, hints["layers"], strict=True):
            stream = stream.with_residual("layers", block, ScaledHint(hint, self.scale))
        return stream


def hinted_layers(layers: int, hints: int) -> range:
    """Return a range of the indices of the transformer's layers that get a hint (a tensor added to the tokens): every
    `layers // hints`-th, from 0; raise ValueError unless `hints` divides `layers`.

    Raises:
        ValueError: `hints` does not divide `layers`.
    """
    if layers % hints:
        raise ValueError(
            f"{hints} control layers do not divide the {layers} layers of the transformer; load a ControlNet of this "
            "transformer"
        )
    return range(0, layers, layers // hints)


class ZImageControlNet(nn.Module):
    """ControlNet of Z-Image. Parameter names are those of the published Union files.

    It has no copy of the transformer's embedders and refiners: it takes the embedded tokens of a `Stream`, those of the
    image before the noise refiner, then all tokens before the layers.

    `gradient_checkpointing` is a plain attribute, as in `ZImageDiT`.
    """

    def __init__(self, config: ZImageControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        patch_dim = config.in_channels * config.patch_size**2
        self.control_all_x_embedder = nn.ModuleDict({f"{config.patch_size}-1": nn.Linear(patch_dim, config.dim)})
        self.control_layers = nn.ModuleList(
            ZImageControlBlock(config, first=index == 0) for index in range(config.n_layers)
        )
        self.control_noise_refiner = nn.ModuleList()
        for index in range(config.n_refiner_layers):
            if config.refiner_hints == "control_noise_refiner":
                self.control_noise_refiner.append(ZImageControlBlock(config, first=index == 0))
            elif config.refiner_hints == "none":
                self.control_noise_refiner.append(ZImageBlock(config))

    def forward(
        self,
        stream: Stream,
        control: Float[Tensor, "#b c h w"] | Float[Tensor, "b i e"],
        stacks: Sequence[StackName] = HINTED_STACKS,
    ) -> tuple[Float[Tensor, "b i e"], dict[StackName, tuple[Float[Tensor, "b s e"], ...]]]:
        """Return (control tokens of the image, dict stack -> hints): a hint is a tensor `b s e` that is to be added to
        the tokens after a block of that stack.

        The transformer runs its refiners between the two stacks, so a sampling step takes two calls: one for
        "noise_refiner" with the stream before the noise refiner, then one for "layers" with the stream before the
        layers. A call for both is one of a transformer without refiners.

        Args:
            stream: inputs of the transformer's blocks.
            control: control latents as in `ControlNetResiduals.context` if `stacks` has "noise_refiner", else the
                control tokens that the call for "noise_refiner" returned.
            stacks: stacks to return hints for, in the order of `HINTED_STACKS`. The first blocks of "noise_refiner"
                get the hints, or none; those of "layers" are for the layers in `hinted_layers`.

        Raises:
            ValueError: an unknown stack, or control latents whose channels or size do not fit.
        """
        hints: dict[StackName, tuple[Tensor, ...]] = {}
        for stack in stacks:
            if stack == "noise_refiner":
                control, hints[stack] = self._before_refiner(stream, self._embed(stream, control))
            elif stack == "layers":
                tokens = torch.cat((control, stream.caption), dim=1)
                joint = (stream.joint_tokens(), stream.rotary, stream.joint_mask, stream.time_embed)
                tokens, hints[stack] = self._hints(self.control_layers, tokens, *joint)
                control = tokens[:, : control.shape[1]]
            else:
                raise ValueError(
                    f"stack {stack!r}: expected one of {', '.join(HINTED_STACKS)}{did_you_mean(stack, HINTED_STACKS)}"
                )
        return control, hints

    def _before_refiner(
        self, stream: Stream, control: Float[Tensor, "b i e"]
    ) -> tuple[Float[Tensor, "b i e"], tuple[Float[Tensor, "b i e"], ...]]:
        config = self.config
        rotary, mask, time_embed = stream.image_rotary, stream.image_mask, stream.image_time_embed
        if config.refiner_hints == "none":
            for block in self.control_noise_refiner:
                control = gradient_checkpoint_forward(
                    block, self.gradient_checkpointing, False, control, rotary, mask, time_embed
                )
            return control, ()
        own = config.refiner_hints == "control_noise_refiner"
        blocks = self.control_noise_refiner if own else self.control_layers
        control, hints = self._hints(blocks, control, stream.image, rotary, mask, time_embed)
        return control, hints[: config.n_refiner_layers]

    def _hints(
        self,
        blocks: Iterable[nn.Module],
        control: Float[Tensor, "b s e"],
        tokens: Float[Tensor, "b s e"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 1 s"] | None,
        time_embed: TimeEmbed,
    ) -> tuple[Float[Tensor, "b s e"], tuple[Float[Tensor, "b s e"], ...]]:
        """Return (control tokens after all `blocks`, the hint of each block), tensors `b s e`."""
        hints = []
        for block in blocks:
            control, hint = gradient_checkpoint_forward(
                block, self.gradient_checkpointing, False, control, tokens, rotary, mask, time_embed
            )
            hints.append(hint)
        return control, tuple(hints)

    def _embed(self, stream: Stream, context: Float[Tensor, "#b c h w"]) -> Float[Tensor, "b i e"]:
        """Return a tensor `b i e`: the control tokens, padded like those of the image."""
        self._check(stream, context)
        image, patch = stream.image, self.config.patch_size
        pixels = rearrange(context.to(image.dtype), "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        control = self.control_all_x_embedder[f"{patch}-1"](pixels).to(image.dtype).expand(len(image), -1, -1)
        # The padding is the transformer's learned token, and so are tokens that another extension appended.
        return torch.cat((control, image[:, control.shape[1] :]), dim=1)

    def _check(self, stream: Stream, context: Tensor) -> None:
        config = self.config
        if context.ndim != 4 or context.shape[1] != config.in_channels:
            parts = f"{config.latent_channels} of control latents"
            if config.inpaints:
                parts += f", 1 of the mask and {config.latent_channels} of the image to inpaint"
            raise ValueError(
                f"the control context has the shape {tuple(context.shape)}; this ControlNet takes b c h w with "
                f"{config.in_channels} channels: {parts}"
            )
        expected = tuple(extent * config.patch_size for extent in stream.grid)
        if tuple(context.shape[2:]) != expected:
            raise ValueError(
                f"the control context has {context.shape[2]}x{context.shape[3]} latent pixels, the image "
                f"{expected[0]}x{expected[1]}; encode a control image of the size of the result"
            )
        if context.shape[0] not in (1, stream.image.shape[0]):
            raise ValueError(
                f"the control context has a batch of {context.shape[0]}, the latents of {stream.image.shape[0]}; "
                "expected the same, or 1"
            )


class ZImageControlBlock(ZImageBlock):
    """A block over control tokens and the projection of its output to a hint; the first block of a stack adds the
    transformer's tokens.
    """

    def __init__(self, config: ZImageControlNetConfig, *, first: bool) -> None:
        super().__init__(config)
        self.before_proj = nn.Linear(config.dim, config.dim) if first else None
        self.after_proj = nn.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self,
        control: Float[Tensor, "b s e"],
        tokens: Float[Tensor, "b s e"],
        rotary: Rotary,
        mask: Bool[Tensor, "b 1 1 s"] | None,
        time_embed: TimeEmbed,
    ) -> tuple[Float[Tensor, "b s e"], Float[Tensor, "b s e"]]:
        """Return (control tokens after this block, hint to add to the transformer's tokens), two tensors `b s e`."""
        if self.before_proj is not None:
            control = tokens + self.before_proj(control)
        control = super().forward(control, rotary, mask, time_embed)
        return control, self.after_proj(control)
