"""Small Wan networks loaded from published key names, and diffusers' networks with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor, nn

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth_wan.config import WanDiTConfig
from diffsynth_wan.dit import WanDiT

SMALL = {"dim": 256, "ffn_dim": 320, "num_heads": 2, "num_layers": 2, "text_dim": 48, "freq_dim": 64}
"""Config fields with two heads of 128, the head dimension of all files."""


def load_published(tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Return architecture -> module, loaded from these tensors as from a file that is recognised by structure."""
    header = pickled.of_state_dict(dict(tensors))
    found = recognize.recognize(header, *_discovery.catalog().layouts(), tiers=("structure",))
    assert [one.extra for one in found] == [()] * len(found)
    return {
        one.architecture.name: component.load_component(one, header, device="cpu", dtype=torch.float32) for one in found
    }


def draw(*modules: nn.Module) -> dict[str, Tensor]:
    """Return random weights of these modules under our names, none of them neutral, and constants unchanged.

    Norm weights of queries are tripled: with flat attention over 512 tokens, a bias of the keys hardly has an effect.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        shapes |= parity.shapes_of(module)
    drawn = parity.draw_weights(shapes)
    drawn |= {name: 3 * tensor for name, tensor in drawn.items() if name.endswith(("norm_q.weight", "q_norm.weight"))}
    constants = {name: buffer for module in modules for name, buffer in module.named_buffers()}
    return drawn | constants


def meta(kind: type[nn.Module], config: Any) -> nn.Module:
    """Return a module on the meta device, for its shapes."""
    with torch.device("meta"):
        return kind(config)


def oracle_of(config: WanDiTConfig, **more: Any) -> WanTransformer3DModel:
    """Return diffusers' network for a config, with its initial weights."""
    return WanTransformer3DModel(**oracle_arguments(config), **more).eval()


def oracle_arguments(config: WanDiTConfig) -> dict[str, Any]:
    """Return the arguments of diffusers' Wan classes for a config."""
    return {
        "patch_size": config.patch_size,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.image_dim or None,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
    }


def to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under diffusers' names, by its converter and by hand where that has no rule."""
    converted = convert_wan_transformer_to_diffusers(dict(tensors))
    if "img_emb.emb_pos" in converted:
        converted["condition_embedder.image_embedder.pos_embed"] = converted.pop("img_emb.emb_pos")
    return {name: tensor for name, tensor in converted.items() if not name.endswith(".kernel")}


def build_pair(config: WanDiTConfig) -> tuple[WanDiT, WanTransformer3DModel]:
    """Return our network, loaded from published names, and diffusers' network with the same weights."""
    published = draw(meta(WanDiT, config))
    ours = load_published(published)["wan_dit"]
    oracle = oracle_of(config, pos_embed_seq_len=config.image_tokens or None)
    oracle.load_state_dict(to_diffusers(published))
    return ours, oracle
