"""Tiny FLUX.1 networks of ours and of diffusers 0.42.1 with the same weights, carried over through published names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth.models.config import FluxAutoencoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.sampling.schedule import flux1_sigmas
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_flux import FluxImagePipeline
from diffsynth_flux.flux1.config import FluxBlocksConfig, FluxControlNetConfig, FluxDiTConfig
from diffsynth_flux.flux1.dit import grid_positions, patchify, unpatchify
from parity import draw_weights, shapes_of


def load_tensors(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> tuple[Any, nn.Module]:
    """Return what the tensors are recognised as, and the network loaded from them."""
    architectures, checkpoints = _discovery.catalog().layouts()
    header = pickled.of_state_dict(dict(tensors))
    (found,) = recognize.recognize(header, architectures, checkpoints)
    return found, component.load_component(found, header, device="cpu", dtype=dtype)


def block_sizes(config: FluxBlocksConfig) -> dict[str, Any]:
    """Return the config of diffusers' networks."""
    return {
        "in_channels": config.in_channels,
        "num_layers": config.n_double_blocks,
        "num_single_layers": config.n_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.n_heads,
        "joint_attention_dim": config.context_dim,
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": config.axes_dims,
    }


def oracle_dit(config: FluxDiTConfig, seed: int = 0) -> FluxTransformer2DModel:
    """Return diffusers' transformer with random weights."""
    oracle = FluxTransformer2DModel(out_channels=config.out_channels, **block_sizes(config)).eval()
    oracle.load_state_dict(draw_weights(shapes_of(oracle), seed))
    return oracle


def run_oracle(oracle: FluxTransformer2DModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the velocity of diffusers' transformer for the arguments of ours."""
    latents, condition, prompt = inputs["latents"], inputs["condition_latents"], inputs["prompt_embeds"]
    rows, columns = latents.shape[2] // 2, latents.shape[3] // 2
    channels = latents if condition is None else torch.cat((latents, condition), dim=1)
    patches = oracle(
        patchify(channels),
        prompt,
        inputs["pooled_prompt_embeds"],
        inputs["sigma"],
        grid_positions(rows, columns),
        torch.zeros(prompt.shape[1], 3),
        inputs["guidance"],
        return_dict=False,
    )[0]
    return unpatchify(patches, rows)


def oracle_controlnet(config: FluxControlNetConfig, seed: int = 4) -> FluxControlNetModel:
    """Return diffusers' ControlNet with random weights."""
    oracle = FluxControlNetModel(num_mode=config.num_modes or None, **block_sizes(config)).eval()
    # The constructor has no argument for the channels of a mask.
    oracle.controlnet_x_embedder = nn.Linear(config.control_channels, config.dim)
    oracle.load_state_dict(draw_weights(shapes_of(oracle), seed))
    return oracle


DIT = FluxDiTConfig(dim=64, n_heads=2, n_double_blocks=1, n_single_blocks=2, context_dim=32, pooled_dim=64)
AUTOENCODER = {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "latent_channels": 16}
SIZE = {"height": 208, "width": 176}


def oracle_vae() -> AutoencoderKL:
    """Return diffusers' autoencoder with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        **AUTOENCODER,
    )
    vae.load_state_dict(draw_weights(shapes_of(vae), seed=1))
    return vae.eval()


def oracle_clip(vocab_size: int) -> CLIPTextModel:
    """Return transformers' CLIP with random weights; the token that ends a text is the last of the vocabulary."""
    sizes = {"hidden_size": DIT.pooled_dim, "intermediate_size": 48, "num_attention_heads": 1, "num_hidden_layers": 2}
    config = CLIPTextConfig(vocab_size=vocab_size, eos_token_id=2, attn_implementation="eager", **sizes)
    return _drawn(CLIPTextModel(config), seed=2)


def oracle_t5(vocab_size: int) -> T5EncoderModel:
    """Return transformers' T5 encoder with random weights."""
    sizes = {"d_model": DIT.context_dim, "d_kv": 16, "d_ff": 40, "num_heads": 2, "num_layers": 2}
    config = T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", attn_implementation="eager", **sizes)
    return _drawn(T5EncoderModel(config), seed=3)


def siglip_tensors(siglip: SiglipVisionModel) -> dict[str, Tensor]:
    """Return the tensors of a published file: those of transformers' image encoder, and of a text encoder."""
    tensors = {f"vision_model.{name}": tensor for name, tensor in siglip.named_parameters()}
    return tensors | {"text_model.head.bias": torch.ones(3), "logit_scale": torch.ones(1)}


def _drawn(module: nn.Module, seed: int) -> nn.Module:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    weights = draw_weights(shapes, seed=seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    return module.eval()


def tiny_pipelines(config: FluxDiTConfig = DIT, **components: Any) -> tuple[FluxImagePipeline, dict[str, Any]]:
    """Return our pipeline, and the components of diffusers' pipelines; weights are loaded from published names.

    Args:
        config: of the transformer.
        components: further components of ours.
    """
    tokenizer = byte_tokenizer()
    transformer, vae = oracle_dit(config), oracle_vae()
    clip, t5 = oracle_clip(len(tokenizer)), oracle_t5(len(tokenizer))
    ours_vae = FluxAutoencoder(FluxAutoencoderConfig(norm_groups=4, **AUTOENCODER))
    ours_vae.load_state_dict(vae.state_dict())
    clip_tensors = {f"text_model.{name}": tensor for name, tensor in clip.named_parameters()}
    t5_tensors = {name: tensor for name, tensor in t5.named_parameters() if "embed_tokens" not in name}
    ours = FluxImagePipeline.from_components(
        dit=load_tensors(transformer.state_dict())[1],
        text_encoder_1=load_tensors(clip_tensors)[1],
        text_encoder_2=load_tensors(t5_tensors)[1],
        vae=ours_vae,
        tokenizer_1=tokenizer,
        tokenizer_2=tokenizer,
        device="cpu",
        torch_dtype=torch.float32,
        **components,
    )
    tokenizer.model_max_length = 77
    parts = {
        # The levels of a call are given as they are: the scheduler shifts nothing.
        "scheduler": FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        "vae": vae,
        "text_encoder": clip,
        "tokenizer": tokenizer,
        "text_encoder_2": t5,
        "tokenizer_2": tokenizer,
        "transformer": transformer,
    }
    return ours, parts


def sigmas(num_steps: int, **settings: float) -> list[float]:
    """Return the noise levels of our schedule without the last 0, for diffusers' argument of this name."""
    return flux1_sigmas(num_steps, **settings)[:-1].tolist()


def noise(seed: int, *, packed: bool = True) -> Tensor:
    """Return the initial noise of a seed, as tokens or as latents."""
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = torch.randn(1, 16, SIZE["height"] // 8, SIZE["width"] // 8, generator=generator)
    return patchify(latents) if packed else latents


def unpacked(tokens: Tensor) -> Tensor:
    """Return the latents of diffusers' result for the output type "latent"."""
    return unpatchify(tokens, SIZE["height"] // 16)


def random_image(seed: int, mode: str = "RGB", size: Mapping[str, int] = SIZE) -> Image.Image:
    """Return an image of random pixels."""
    shape = (size["height"], size["width"]) + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8), mode)


class NaiveAttention:
    """Processor of diffusers' attention with InstantX's attention to an image, written out: the block's queries, after
    their norm and before RoPE, attend to the image; in blocks over text and image those of the text do, too.
    """

    def __init__(self, keys: Tensor, values: Tensor, scale: float) -> None:
        self.keys, self.values, self.scale = keys, values, scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def heads(x):
            return x.unflatten(-1, (-1, attn.head_dim))

        q, k, v = (heads(project(hidden_states)) for project in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        seen = self.scale * softmax_attention(q, self.keys.expand(len(q), -1, -1, -1), self.values)
        length = 0
        if encoder_hidden_states is not None:
            length = encoder_hidden_states.shape[1]
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_q, text_k, text_v = (heads(project(encoder_hidden_states)) for project in projections)
            q = torch.cat((attn.norm_added_q(text_q), q), dim=1)
            k = torch.cat((attn.norm_added_k(text_k), k), dim=1)
            v = torch.cat((text_v, v), dim=1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        out = softmax_attention(q, k, v)
        image = (out[:, length:] + seen).flatten(2)
        if encoder_hidden_states is None:
            return image
        return attn.to_out[0](image), attn.to_add_out(out[:, :length].flatten(2))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return attention over axes `b s n d`, written out."""
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v.expand(len(q), -1, -1, -1))


def naive_image_prompt(weights: Mapping[str, Tensor], pooled: Tensor, head_dim: int = 128) -> list[tuple[Tensor, ...]]:
    """Return keys and values of images for each block, from the weights of an IP-Adapter, formula by formula."""
    x = pooled @ weights["image_proj.proj.0.weight"].T + weights["image_proj.proj.0.bias"]
    x = x / 2 * (1 + torch.erf(x / 2**0.5))
    x = x @ weights["image_proj.proj.2.weight"].T + weights["image_proj.proj.2.bias"]
    x = x.reshape(len(pooled), -1, len(weights["image_proj.norm.weight"]))
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * weights["image_proj.norm.weight"] + weights["image_proj.norm.bias"]
    x = x.flatten(0, 1)[None]
    blocks = []
    for index in range(sum(name.endswith("to_k_ip.weight") for name in weights)):
        keys = (x @ weights[f"ip_adapter.{index}.to_k_ip.weight"].T).unflatten(-1, (-1, head_dim))
        values = (x @ weights[f"ip_adapter.{index}.to_v_ip.weight"].T).unflatten(-1, (-1, head_dim))
        blocks.append((keys / (keys.square().mean(-1, keepdim=True) + 1e-5).sqrt(), values))
    return blocks


@contextlib.contextmanager
def set_image_prompt(
    oracle: FluxTransformer2DModel, blocks: Sequence[tuple[Tensor, Tensor]], scale: float
) -> Iterator[None]:
    """Give each attention of diffusers' transformer the keys and values of an image, in the order of its processors."""
    before = oracle.attn_processors
    processors = [NaiveAttention(keys, values, scale) for keys, values in blocks]
    oracle.set_attn_processor(dict(zip(before, processors, strict=True)))
    try:
        yield
    finally:
        oracle.set_attn_processor(dict(before))
