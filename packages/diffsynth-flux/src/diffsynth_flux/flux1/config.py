"""Configs of the FLUX.1 networks, and functions that infer them from the shapes in a file. Light: no torch."""

from __future__ import annotations

from dataclasses import dataclass

from diffsynth.core.loader.shapes import Shapes, count_items

VAE_FACTOR = 8

PATCH_SIZE = 2
"""Side of a token in latent pixels."""

HEAD_DIM_UNIT = 16
"""A head is divided by RoPE in 2, 7 and 7 of so many parts: for the reference index, the row and the column."""


@dataclass(frozen=True, kw_only=True)
class FluxBlocksConfig:
    """Sizes of the embedders and blocks of FLUX.1, in the transformer and in its ControlNets.

    Args:
        dim: width of the tokens.
        n_heads: number of attention heads; `dim / n_heads` is the head dimension.
        n_double_blocks: number of blocks with separate weights for image and text.
        n_single_blocks: number of blocks over image and text together, after the double blocks.
        in_channels: channels of an image token, 4 times those of the latents and of the condition latents: 64 for text
            to image, 128 for Depth and Canny, 384 for Fill.
        context_dim: width of the hidden states of T5.
        pooled_dim: width of the pooled hidden state of CLIP.
        guidance_embed: whether the network takes the guidance as an input, as in FLUX.1-dev.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: the number of heads does not divide the width, or the head dimension is no multiple of 32.
    """

    dim: int = 3072
    n_heads: int = 24
    n_double_blocks: int = 19
    n_single_blocks: int = 38
    in_channels: int = 64
    context_dim: int = 4096
    pooled_dim: int = 768
    guidance_embed: bool = True
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.head_dim % (2 * HEAD_DIM_UNIT):
            raise ValueError(
                f"n_heads={self.n_heads} must divide dim={self.dim} into heads of a multiple of {2 * HEAD_DIM_UNIT}"
            )

    @property
    def head_dim(self) -> int:
        """Number of channels of each attention head."""
        return self.dim // self.n_heads

    @property
    def n_blocks(self) -> int:
        """Number of blocks of both kinds."""
        return self.n_double_blocks + self.n_single_blocks

    @property
    def ffn_dim(self) -> int:
        """Inner width of the feed-forward, in channels."""
        return 4 * self.dim

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """Channels of a head that RoPE rotates by reference index, row and column: (16, 56, 56) for heads of 128."""
        unit = self.head_dim // HEAD_DIM_UNIT
        return 2 * unit, 7 * unit, 7 * unit


@dataclass(frozen=True, kw_only=True)
class FluxDiTConfig(FluxBlocksConfig):
    """Config of the FLUX.1 transformer; the defaults are FLUX.1-dev.

    Args:
        dim, n_heads, n_double_blocks, n_single_blocks, in_channels, context_dim, pooled_dim, guidance_embed,
            rope_theta: see `FluxBlocksConfig`.
        out_channels: channels of an image token of the velocity, 4 times those of the latents.

    Raises:
        ValueError: as for `FluxBlocksConfig`, or channels that are no multiple of the 4 latent pixels of a token.
    """

    out_channels: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % PATCH_SIZE**2:
                raise ValueError(f"{name}={getattr(self, name)}: expected a multiple of {PATCH_SIZE**2}")

    @property
    def latent_channels(self) -> int:
        """Number of channels of the latents."""
        return self.out_channels // PATCH_SIZE**2

    @property
    def condition_channels(self) -> int:
        """Number of channels of the latents' conditions, such as a control image or an image to fill; 0 for none."""
        return self.in_channels // PATCH_SIZE**2 - self.latent_channels


@dataclass(frozen=True, kw_only=True)
class FluxControlNetConfig(FluxBlocksConfig):
    """Config of a ControlNet of FLUX.1; the defaults are FLUX.1-dev-Controlnet-Union-alpha.

    Args:
        dim, n_heads, n_double_blocks, n_single_blocks, in_channels, context_dim, pooled_dim, guidance_embed,
            rope_theta: see `FluxBlocksConfig`.
        control_channels: channels of a token of the control latents: 64, or 68 with a mask of an image to inpaint.
        num_modes: number of kinds of control images; 0 for a ControlNet of one kind.
    """

    n_double_blocks: int = 5
    n_single_blocks: int = 10
    control_channels: int = 64
    num_modes: int = 10

    @property
    def latent_channels(self) -> int:
        """Number of channels of the control latents, without that of a mask."""
        return self.in_channels // PATCH_SIZE**2

    @property
    def inpaints(self) -> bool:
        """Whether the control latents are those of an image to inpaint, with a mask as one more channel."""
        return self.control_channels == self.in_channels + PATCH_SIZE**2


TINY_DIT = FluxDiTConfig(dim=64, n_heads=2, n_double_blocks=2, n_single_blocks=2, context_dim=24, pooled_dim=16)


def infer_dit_config(shapes: Shapes) -> FluxDiTConfig:
    """Return the `FluxDiTConfig` of a transformer file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file has sizes that no FLUX.1 network has, or those of Flex.2.
    """
    config = _dit_config(shapes)
    if config.condition_channels == 2 * config.latent_channels + 1:
        raise ValueError(f"{config.condition_channels} channels beside those of the latents: that is Flex.2")
    return config


def _dit_config(shapes: Shapes) -> FluxDiTConfig:
    return FluxDiTConfig(**infer_blocks(shapes), out_channels=shapes["final_layer.linear.weight"][0])


def infer_flex2_config(shapes: Shapes) -> FluxDiTConfig:
    """Return the `FluxDiTConfig` of a transformer file of Flex.2, inferred from the shapes of its tensors.

    Raises:
        ValueError: the condition channels are not those of an image to inpaint, its mask and a control image.
    """
    config = _dit_config(shapes)
    if config.condition_channels != 2 * config.latent_channels + 1:
        raise ValueError(
            f"{config.condition_channels} channels beside those of the latents: expected "
            f"{2 * config.latent_channels + 1}"
        )
    return config


TINY_CONTROLNET = FluxControlNetConfig(
    dim=64, n_heads=2, n_double_blocks=1, n_single_blocks=1, context_dim=24, pooled_dim=16, num_modes=3
)


def infer_controlnet_config(shapes: Shapes) -> FluxControlNetConfig:
    """Return the `FluxControlNetConfig` of a ControlNet file, inferred from the shapes of its tensors.

    Raises:
        ValueError: the file has sizes that no FLUX.1 network has, or control latents of unknown channels.
    """
    modes = shapes.get("controlnet_mode_embedder.weight")
    config = FluxControlNetConfig(
        **infer_blocks(shapes),
        control_channels=shapes["controlnet_x_embedder.weight"][1],
        num_modes=0 if modes is None else modes[0],
    )
    if not config.inpaints and config.control_channels != config.in_channels:
        raise ValueError(
            f"control tokens of {config.control_channels} channels: expected those of the latents, "
            f"{config.in_channels}, or with a mask {config.in_channels + PATCH_SIZE**2}"
        )
    return config


def infer_blocks(shapes: Shapes) -> dict[str, int | bool]:
    """Return a dict field -> value for the fields of `FluxBlocksConfig` that the shapes of a file's tensors determine.

    Raises:
        ValueError: the file has sizes that no FLUX.1 network has.
    """
    dim, in_channels = shapes["img_in.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    ffn_dim = shapes["double_blocks.0.img_mlp.0.weight"][0]
    if ffn_dim != 4 * dim:
        raise ValueError(f"feed-forward width {ffn_dim}: expected 4 times the width {dim}")
    if dim % head_dim:
        raise ValueError(f"head dimension {head_dim}: expected a divisor of the width {dim}")
    return {
        "dim": dim,
        "n_heads": dim // head_dim,
        "n_double_blocks": count_items(shapes, "double_blocks"),
        "n_single_blocks": count_items(shapes, "single_blocks"),
        "in_channels": in_channels,
        "context_dim": shapes["txt_in.weight"][1],
        "pooled_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
    }


@dataclass(frozen=True, kw_only=True)
class ClipTextEncoderConfig:
    """Config of the text encoder of CLIP (arXiv:2103.00020); the defaults are CLIP ViT-L/14.

    Args:
        hidden_size: width of the hidden states.
        num_layers: number of layers.
        num_heads: number of attention heads.
        intermediate_size: inner width of the feed-forward.
        vocab_size: number of token embeddings; the token that ends a text has the highest id.
        max_tokens: number of positions.
    """

    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 49408
    max_tokens: int = 77


TINY_CLIP = ClipTextEncoderConfig(
    hidden_size=128, num_layers=2, num_heads=2, intermediate_size=96, vocab_size=300, max_tokens=77
)


def infer_clip_config(shapes: Shapes) -> ClipTextEncoderConfig:
    """Return the `ClipTextEncoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: the file is of SigLIP, or the width is no multiple of the head dimension 64 of CLIP's text encoders.
    """
    if "text_model.head.weight" in shapes:
        raise ValueError("it has text_model.head: that is the text encoder of SigLIP")
    vocab_size, hidden_size = shapes["text_model.embeddings.token_embedding.weight"]
    if hidden_size % 64:
        raise ValueError(f"width {hidden_size}: expected a multiple of the head dimension 64")
    return ClipTextEncoderConfig(
        hidden_size=hidden_size,
        num_layers=count_items(shapes, "text_model.encoder.layers"),
        num_heads=hidden_size // 64,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        vocab_size=vocab_size,
        max_tokens=shapes["text_model.embeddings.position_embedding.weight"][0],
    )


@dataclass(frozen=True, kw_only=True)
class T5TextEncoderConfig:
    """Config of the encoder of T5 1.1 (arXiv:1910.10683); the defaults are T5-XXL.

    Args:
        hidden_size: width of the hidden states.
        num_layers: number of layers.
        num_heads: number of attention heads.
        head_dim: channels of a head.
        intermediate_size: inner width of the gated feed-forward.
        vocab_size: number of token embeddings.
        num_buckets: number of buckets of relative positions.
        max_distance: distance in tokens from which all positions share a bucket.
    """

    hidden_size: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    intermediate_size: int = 10240
    vocab_size: int = 32128
    num_buckets: int = 32
    max_distance: int = 128


TINY_T5 = T5TextEncoderConfig(
    hidden_size=24, num_layers=2, num_heads=2, head_dim=16, intermediate_size=40, vocab_size=300, num_buckets=8
)


def infer_t5_config(shapes: Shapes) -> T5TextEncoderConfig:
    """Return the `T5TextEncoderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: every layer has a position bias, as in UMT5.
    """
    attention = "encoder.block.{n}.layer.0.SelfAttention"
    bias = f"{attention}.relative_attention_bias.weight"
    if bias.replace("{n}", "1") in shapes:
        raise ValueError("its second layer has a position bias of its own: that is UMT5")
    vocab_size, hidden_size = shapes["shared.weight"]
    num_buckets, num_heads = shapes[bias.replace("{n}", "0")]
    return T5TextEncoderConfig(
        hidden_size=hidden_size,
        num_layers=count_items(shapes, "encoder.block"),
        num_heads=num_heads,
        head_dim=shapes[f"{attention}.q.weight".replace("{n}", "0")][0] // num_heads,
        intermediate_size=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        vocab_size=vocab_size,
        num_buckets=num_buckets,
    )


@dataclass(frozen=True, kw_only=True)
class ReduxEmbedderConfig:
    """Config of the projection of FLUX.1-Redux from hidden states of SigLIP to text tokens.

    Args:
        image_dim: width of the hidden states of the image encoder.
        context_dim: width of the hidden states of T5.
    """

    image_dim: int = 1152
    context_dim: int = 4096


TINY_REDUX_EMBEDDER = ReduxEmbedderConfig(image_dim=144, context_dim=24)


def infer_redux_embedder_config(shapes: Shapes) -> ReduxEmbedderConfig:
    """Return the `ReduxEmbedderConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: the inner width is not three times the outer one.
    """
    inner, image_dim = shapes["redux_up.weight"]
    context_dim = shapes["redux_down.weight"][0]
    if inner != 3 * context_dim:
        raise ValueError(f"inner width {inner}: expected 3 times the width {context_dim} of the text")
    return ReduxEmbedderConfig(image_dim=image_dim, context_dim=context_dim)


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """Config of the IP-Adapter of FLUX.1; the defaults are FLUX.1-dev-IP-Adapter by InstantX.

    Args:
        image_dim: width of the pooled state of the image encoder.
        num_tokens: number of tokens of an image.
        context_dim: width of these tokens.
        dim: width of the transformer's tokens.
        n_blocks: number of blocks of the transformer, which have keys and values of their own.
        head_dim: number of channels of each attention head of the transformer.

    Raises:
        ValueError: the head dimension does not divide the width.
    """

    image_dim: int = 1152
    num_tokens: int = 128
    context_dim: int = 4096
    dim: int = 3072
    n_blocks: int = 57
    head_dim: int = 128

    def __post_init__(self) -> None:
        if self.dim % self.head_dim:
            raise ValueError(f"dim={self.dim}: expected a multiple of the head dimension {self.head_dim}")


TINY_IP_ADAPTER = IPAdapterConfig(image_dim=144, num_tokens=3, context_dim=24, dim=128, n_blocks=3)


def infer_ip_adapter_config(shapes: Shapes) -> IPAdapterConfig:
    """Return the `IPAdapterConfig` of the network in a file, from `shapes` (tensor name -> shape).

    Raises:
        ValueError: sizes that do not fit each other, or a width that is no multiple of the head dimension 128.
    """
    inner, image_dim = shapes["image_proj.proj.0.weight"]
    (context_dim,) = shapes["image_proj.norm.weight"]
    projected = shapes["image_proj.proj.2.weight"][0]
    if inner != 2 * image_dim or projected % context_dim:
        raise ValueError(
            f"the projection has an inner width of {inner} and {projected} outputs: expected twice the width "
            f"{image_dim} of the image, and a multiple of the width {context_dim} of a token"
        )
    return IPAdapterConfig(
        image_dim=image_dim,
        num_tokens=projected // context_dim,
        context_dim=context_dim,
        dim=shapes["ip_adapter.0.to_k_ip.weight"][0],
        n_blocks=count_items(shapes, "ip_adapter"),
    )
