"""Key rules of Z-Image layouts whose names differ from our parameter names, those of `transformer/*.safetensors`."""

from __future__ import annotations

from typing import Any

from diffsynth.core.loader.convert import Check, Drop, Rename, Rule, Split
from diffsynth.errors import Unrecognized


def _unchanged(*names: str) -> tuple[Rule, ...]:
    return tuple(Rename(name, name) for name in names)


def _stack(name: str) -> tuple[Rule, ...]:
    block = f"{name}.{{n}}"
    return (
        Split(
            f"{block}.attention.qkv.weight", tuple(f"{block}.attention.to_{part}.weight" for part in ("q", "k", "v")), 0
        ),
        Rename(f"{block}.attention.out.weight", f"{block}.attention.to_out.0.weight"),
        Rename(f"{block}.attention.q_norm.weight", f"{block}.attention.norm_q.weight"),
        Rename(f"{block}.attention.k_norm.weight", f"{block}.attention.norm_k.weight"),
        *_unchanged(*(f"{block}.feed_forward.{part}.weight" for part in ("w1", "w2", "w3"))),
        *_unchanged(*(f"{block}.{kind}_norm{index}.weight" for kind in ("attention", "ffn") for index in (1, 2))),
        *_unchanged(f"{block}.adaLN_modulation.0.{{*}}"),
    )


FUSED: tuple[Rule, ...] = (
    Rename("x_embedder.{*}", "all_x_embedder.2-1.{*}"),
    Rename("final_layer.linear.{*}", "all_final_layer.2-1.linear.{*}"),
    Rename("final_layer.adaLN_modulation.1.{*}", "all_final_layer.2-1.adaLN_modulation.1.{*}"),
    *_unchanged("x_pad_token", "cap_pad_token"),
    *_unchanged("t_embedder.mlp.0.{*}", "t_embedder.mlp.2.{*}", "cap_embedder.0.weight", "cap_embedder.1.{*}"),
    *(rule for stack in ("noise_refiner", "context_refiner", "layers") for rule in _stack(stack)),
    # Some single files have a norm that the network does not use.
    Drop("norm_final.weight"),
)
"""Names of the original code, with fused query, key and value, as in single files for other programs."""

FUSED_OMNI: tuple[Rule, ...] = (
    *FUSED,
    *_unchanged("siglip_pad_token", "siglip_embedder.0.weight", "siglip_embedder.1.{*}"),
    *_stack("siglip_refiner"),
)
"""The same names of Omni-Base."""

SIGLIP2: tuple[Rule, ...] = (Drop("vision_model.head.{*}", "Z-Image-Omni-Base takes the states of all patches"),)
"""SigLIP 2's image encoder under its published names; the pooling head is dropped."""

_TRAINED = "control_noise_refiner.0.after_proj.weight"


def _require_trained(weight: Any) -> None:
    """Raise Unrecognized if `weight`, the projection to a hint of the first block of a ControlNet's refiner, is zero.

    Raises:
        Unrecognized: it is zero.
    """
    if not weight.any():
        raise Unrecognized(
            f"{_TRAINED} is zero: the file is a Union 2.0, which has the shapes of 2.1 but does not use its "
            "control_noise_refiner. Leave out all control_noise_refiner.* tensors, for example with "
            "ModelConfig(state_dict=...); the others are recognised as 2.0"
        )


CONTROLNET: tuple[Rule, ...] = (Check(_TRAINED, _require_trained),)
"""ControlNet under our own names.

The published file of Union 2.0 has the names and shapes of 2.1; only its values show that its refiner was not trained.
"""
