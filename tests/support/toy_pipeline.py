"""A pipeline with one parameter, for tests of the runtime around it."""

from __future__ import annotations

import torch
from torch import nn

from diffsynth.runtime.image_units import image_size
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.request import LoopArguments
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import unit
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.schedule import z_image_sigmas


class ToyNet(nn.Module):
    """Predicts the velocity of a straight path to one colour."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, latents, sigma, colour):
        target = colour.view(-1, 1, 1, 1)
        return self.gain * (latents - target) / sigma.view(-1, 1, 1, 1)


@unit("sigmas")
def schedule(*, num_inference_steps: int, denoising_strength: float = 1.0):
    return z_image_sigmas(num_inference_steps, strength=denoising_strength)


@unit("colour", branches={"uncond": {"prompt": "negative_prompt"}})
def encode_colour(*, prompt: str | list[str] = ""):
    return torch.tensor([len(text) / 10 for text in prompt])


@unit("latents", random=True)
def initial_latents(*, height, width, seeds, rand_device: str = "cpu", device, dtype):
    return initial_noise((1, height // 8, width // 8), seeds, rand_device=rand_device, dtype=dtype, device=device)


@unit("output")
def decode(*, latents):
    return list(latents.mean(dim=(1, 2, 3)).tolist())


class ToyPipeline(Pipeline):
    """Generates grey images whose level is a tenth of the prompt's length."""

    roles = {"dit": Role(architectures=("toy_net",)), "adapter": Role(architectures=("toy_net",), optional=True)}
    units = (image_size(16, default=32), schedule, encode_colour, initial_latents)
    output_units = (decode,)
    loop = LoopArguments(num_inference_steps=4)

    def velocity(self, latents, sigma, *, colour):
        return self.dit(latents, sigma, colour)


def toy_pipeline(cls=ToyPipeline) -> ToyPipeline:
    return cls({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32)
