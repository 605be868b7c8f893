"""Our key rules give the values of diffusers' converters (0.42)."""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component, pickled, recognize
from diffsynth.core.loader.convert import invert, plan
from diffsynth_flux.flux2.autoencoder import Flux2Autoencoder
from diffsynth_flux.flux2.config import TINY_AUTOENCODER, TINY_DIT
from diffsynth_flux.flux2.convert import ORIGINAL_DIT

PART = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def load_tensors(tensors: dict[str, torch.Tensor]) -> tuple[recognize.Recognized, dict[str, torch.Tensor]]:
    header = pickled.of_state_dict(tensors)
    (found,) = recognize.recognize(header, *_discovery.catalog().layouts())
    return found, component.load_component(found, header, device="cpu", dtype=torch.float32).state_dict()


def original_dit() -> dict[str, torch.Tensor]:
    """Return random tensors under the names of the original code, whose shapes fit a tiny network."""
    e, head, ffn = TINY_DIT.dim, TINY_DIT.head_dim, TINY_DIT.ffn_dim
    shapes = {
        "img_in.weight": (e, TINY_DIT.in_channels),
        "txt_in.weight": (e, TINY_DIT.prompt_dim),
        **{f"{name}_in.in_layer.weight": (e, TINY_DIT.frequency_dim) for name in ("time", "guidance")},
        **{f"{name}_in.out_layer.weight": (e, e) for name in ("time", "guidance")},
        **{f"double_stream_modulation_{name}.lin.weight": (6 * e, e) for name in ("img", "txt")},
        "single_stream_modulation.lin.weight": (3 * e, e),
        "final_layer.linear.weight": (TINY_DIT.in_channels, e),
        "final_layer.adaLN_modulation.1.weight": (2 * e, e),
    }
    for n in range(TINY_DIT.n_layers):
        for side in ("img", "txt"):
            block = f"double_blocks.{n}.{side}"
            shapes |= {f"{block}_attn.qkv.weight": (3 * e, e), f"{block}_attn.proj.weight": (e, e)}
            shapes |= {f"{block}_attn.norm.{name}_norm.scale": (head,) for name in ("query", "key")}
            shapes |= {f"{block}_mlp.0.weight": (2 * ffn, e), f"{block}_mlp.2.weight": (e, ffn)}
    for n in range(TINY_DIT.n_single_layers):
        block = f"single_blocks.{n}"
        shapes |= {f"{block}.linear1.weight": (3 * e + 2 * ffn, e), f"{block}.linear2.weight": (e, e + ffn)}
        shapes |= {f"{block}.norm.{name}_norm.scale": (head,) for name in ("query", "key")}
    return parity.draw_weights(shapes)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_transformer(prefix: str) -> None:
    tensors = original_dit()
    found, ours = load_tensors({f"{prefix}{key}": tensor for key, tensor in tensors.items()})
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors))
    assert (found.checkpoint.name, found.config, found.prefix) == ("flux2_dit/original", TINY_DIT, prefix)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_rules_of_the_transformer_can_be_undone() -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in original_dit().items()}
    ours = plan(ORIGINAL_DIT, shapes).shapes
    assert plan(invert(ORIGINAL_DIT, shapes), ours).shapes == shapes


def test_original_autoencoder() -> None:
    tensors = original_autoencoder()
    found, ours = load_tensors(dict(tensors))
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    lifted = {key.replace("encoder.quant_conv", "quant_conv"): tensor for key, tensor in tensors.items()}
    lifted = {key.replace("decoder.post_quant_conv", "post_quant_conv"): tensor for key, tensor in lifted.items()}
    theirs = convert_ldm_vae_checkpoint(lifted, config)
    assert (found.checkpoint.name, found.config) == ("flux2_autoencoder/original", TINY_AUTOENCODER)
    statistics = {key for key in ours if key.startswith("bn.")}
    assert len(statistics) == 3
    assert ours.keys() - statistics == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].reshape(ours[key].shape)) for key in theirs)
    assert all(torch.equal(ours[key], tensors[key]) for key in statistics)
    assert ours["bn.num_batches_tracked"].dtype == torch.long


def original_autoencoder() -> dict[str, torch.Tensor]:
    """Return random tensors of a tiny autoencoder under the names of the original code."""
    shapes = {name: tuple(tensor.shape) for name, tensor in Flux2Autoencoder(TINY_AUTOENCODER).state_dict().items()}
    tensors = {original_name(key): tensor for key, tensor in parity.draw_weights(shapes).items()}
    tensors |= {
        key: tensor[..., None, None] for key, tensor in tensors.items() if ".attn_1." in key and tensor.ndim == 2
    }
    return tensors | {"bn.num_batches_tracked": torch.tensor(5)}


def original_name(key: str) -> str:
    for side in ("encoder", "decoder"):
        key = key.replace(f"{side}.mid_block.attentions.0.group_norm", f"{side}.mid.attn_1.norm")
        for theirs, ours in PART.items():
            key = key.replace(f"{side}.mid_block.attentions.0.{ours}.", f"{side}.mid.attn_1.{theirs}.")
        for index in (0, 1):
            key = key.replace(f"{side}.mid_block.resnets.{index}", f"{side}.mid.block_{index + 1}")
        key = key.replace(f"{side}.conv_norm_out", f"{side}.norm_out")
    for level in range(4):
        key = key.replace(f"encoder.down_blocks.{level}.", f"encoder.down.{level}.")
        key = key.replace(f"decoder.up_blocks.{level}.", f"decoder.up.{3 - level}.")
    for theirs, ours in (
        ("block", "resnets"),
        ("downsample.conv", "downsamplers.0.conv"),
        ("upsample.conv", "upsamplers.0.conv"),
        ("nin_shortcut", "conv_shortcut"),
    ):
        key = key.replace(f".{ours}.", f".{theirs}.")
    inner = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
    first = key.partition(".")[0]
    return inner[first] + key[len(first) :] if first in inner else key
