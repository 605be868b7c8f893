"""The networks that are offloaded: FLUX (12B), Wan (14B) and Z-Image (6B), with random weights and inputs.

They are ours or those of diffusers, at the published size or at two smaller ones. FLUX is that of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.core.vram.partition import SMALL

SCALES = ("tiny", "small", "full")
"""Sizes of the weights: kilobytes; a few hundred megabytes in fp32; as published."""

Random = Callable[..., Tensor]
"""Returns a random tensor of a shape."""


@dataclass(frozen=True)
class Network:
    """One network at one size.

    Args:
        name: name for the table: the network, the size of its output, its library.
        make: returns the module, on the current default device and in the current default dtype.
        inputs: returns the keyword arguments of a forward pass, made of random tensors.
        smallest: bytes from which on a module is a block.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[Random], dict[str, Any]]
    smallest: int = SMALL

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return the module, frozen and in eval mode, with the same random weights each time; without any on meta."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                module = self.make()
        finally:
            torch.set_default_dtype(before)
        # Not .to(dtype): angles and the like stay in fp32.
        module.eval().requires_grad_(False)
        if device.type != "meta":
            generator = torch.Generator(device).manual_seed(0)
            for parameter in module.parameters():
                parameter.normal_(std=0.02, generator=generator)
        return module

    def random_inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of a forward pass, the same each time."""
        generator = torch.Generator("cpu").manual_seed(1)

        def random(*shape: int) -> Tensor:
            if device.type == "meta":
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.randn(shape, generator=generator).to(device, dtype)

        return self.inputs(random)


def flux(scale: str, library: str) -> Network:
    """Return FLUX.1, at 1024 x 1024 when full."""
    from diffusers import FluxTransformer2DModel

    sizes: dict[str, Any] = {
        "tiny": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
        | {"axes_dims_rope": (4, 6, 6), "joint_attention_dim": 16, "pooled_projection_dim": 8},
        "small": {"num_layers": 2, "num_single_layers": 6, "num_attention_heads": 6}
        | {"joint_attention_dim": 512, "pooled_projection_dim": 64},
        "full": {},
    }[scale]
    side, words = {"tiny": (4, 5), "small": (8, 16), "full": (64, 512)}[scale]
    text, pooled = sizes.get("joint_attention_dim", 4096), sizes.get("pooled_projection_dim", 768)

    def inputs(random: Random) -> dict[str, Any]:
        latents = random(1, side * side, 64)
        ids = torch.zeros(side, side, 3)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        return {
            "hidden_states": latents,
            "encoder_hidden_states": random(1, words, text),
            "pooled_projections": random(1, pooled),
            "timestep": torch.full((1,), 0.7, device=latents.device, dtype=latents.dtype),
            "guidance": torch.full((1,), 3.5, device=latents.device, dtype=torch.float32),
            "img_ids": ids.view(-1, 3).to(latents),
            "txt_ids": torch.zeros(words, 3).to(latents),
            "return_dict": False,
        }

    return Network(
        f"FLUX.1, {16 * side} x {16 * side} (diffusers)",
        lambda: FluxTransformer2DModel(guidance_embeds=True, **sizes),
        inputs,
        smallest=0 if scale == "tiny" else SMALL,
    )


def wan(scale: str, library: str) -> Network:
    """Return Wan 2.1 14B, at 81 frames of 832 x 480 when full."""
    sizes = {"tiny": (2, 12, 48, 3), "small": (6, 128, 2048, 8), "full": (40, 128, 13824, 40)}
    heads, head_dim, ffn_dim, layers = sizes[scale]
    text = {"tiny": 16, "small": 256, "full": 4096}[scale]
    frames, height, width, words = {"tiny": (2, 4, 4, 5), "small": (2, 8, 8, 16), "full": (21, 60, 104, 512)}[scale]

    def ours() -> nn.Module:
        from diffsynth_wan.config import WanDiTConfig
        from diffsynth_wan.dit import WanDiT

        dim = heads * head_dim
        return WanDiT(WanDiTConfig(dim=dim, ffn_dim=ffn_dim, num_heads=heads, num_layers=layers, text_dim=text))

    def theirs() -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn_dim, num_layers=layers, text_dim=text
        )

    def inputs(random: Random) -> dict[str, Any]:
        latents, prompt = random(1, 16, frames, height, width), random(1, words, text)
        if library == "diffusers":
            time = torch.full((1,), 700, device=latents.device)
            return {"hidden_states": latents, "timestep": time, "encoder_hidden_states": prompt, "return_dict": False}
        return {"latents": latents, "time": torch.full((1,), 0.7, device=latents.device), "prompt_embeds": prompt}

    name = f"Wan 2.1, {4 * frames - 3} frames of {8 * width} x {8 * height} ({library})"
    return Network(name, ours if library == "diffsynth" else theirs, inputs, 0 if scale == "tiny" else SMALL)


def z_image(scale: str, library: str) -> Network:
    """Return Z-Image, at 1024 x 1024 when full."""
    sizes: dict[str, Any] = {
        "tiny": {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 3, "n_refiner_layers": 1, "cap_feat_dim": 16}
        | {"axes_dims": (4, 6, 6)},
        "small": {"dim": 768, "n_heads": 6, "n_kv_heads": 6, "n_layers": 6, "n_refiner_layers": 1, "cap_feat_dim": 256},
        "full": {},
    }[scale]
    side, words = {"tiny": (4, 5), "small": (8, 16), "full": (128, 128)}[scale]
    text = sizes.get("cap_feat_dim", 2560)

    def ours() -> nn.Module:
        from diffsynth_zimage.config import ZImageDiTConfig
        from diffsynth_zimage.dit import ZImageDiT

        return ZImageDiT(ZImageDiTConfig(**sizes))

    def theirs() -> nn.Module:
        from diffusers import ZImageTransformer2DModel

        return ZImageTransformer2DModel(**sizes)

    def inputs(random: Random) -> dict[str, Any]:
        latents, prompt = random(1, 16, side, side), random(1, words, text)
        time = torch.full((1,), 0.3, device=latents.device)
        if library == "diffusers":
            return {"x": [latents[0, :, None]], "t": time, "cap_feats": [prompt[0]], "return_dict": False}
        return {"latents": latents, "time": time, "prompt_embeds": prompt}

    name = f"Z-Image, {8 * side} x {8 * side} ({library})"
    return Network(name, ours if library == "diffsynth" else theirs, inputs, 0 if scale == "tiny" else SMALL)


NETWORKS: dict[str, Callable[[str, str], Network]] = {"flux": flux, "wan": wan, "z-image": z_image}
