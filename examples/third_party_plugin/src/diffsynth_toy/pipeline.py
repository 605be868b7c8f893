"""The pipeline: generates an image from a prompt."""

from diffsynth import Pipeline, Role
from diffsynth.runtime.request import LoopArguments
from diffsynth_toy.units import encode_prompt, initial_latents, round_size, schedule, to_images


class ToyPipeline(Pipeline):
    """Generate an image of a disc in the colour that the prompt names."""

    roles = {"dit": Role(architectures=("toy_dit",))}
    units = (round_size, schedule, encode_prompt, initial_latents)
    output_units = (to_images,)
    loop = LoopArguments(num_inference_steps=12)

    def velocity(self, latents, sigma, *, letters):
        """Return the velocity `noise - image`; the network predicts the image."""
        return (latents - self.dit(latents, sigma, letters)) / sigma[:, None, None, None]
