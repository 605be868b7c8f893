"""From a prompt to a picture."""

from diffsynth import Pipeline, Role
from diffsynth.runtime.request import LoopArguments
from diffsynth_toy.units import draw_noise, round_size, schedule, show, spell


class ToyPipeline(Pipeline):
    """Draws a disc in the colour that the prompt names."""

    roles = {"dit": Role(architectures=("toy_dit",))}
    units = (round_size, schedule, spell, draw_noise)
    output_units = (show,)
    loop = LoopArguments(num_inference_steps=12)

    def velocity(self, latents, sigma, *, letters):
        """`noise - picture`. The network tells the picture, and the rest of `latents` is `sigma` times that."""
        return (latents - self.dit(latents, sigma, letters)) / sigma[:, None, None, None]
