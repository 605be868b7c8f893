"""The pipeline: generates an image without any condition."""

from diffsynth import Pipeline, Role
from diffsynth.runtime.request import LoopArguments
from diffsynth_unet.units import BETAS, initial_latents, round_size, schedule, to_images


class UNetPipeline(Pipeline):
    """Generate an image, directly in pixels; only the seed determines it."""

    roles = {"unet": Role(architectures=("diffusers_unet",))}
    loop_roles = ("unet",)
    units = (round_size, schedule, initial_latents)
    output_units = (to_images,)
    output_kind = "image"
    per_image = ()
    facts = {"channels": "unet.channels"}
    loop = LoopArguments(num_inference_steps=50)
    prediction = "v"

    def predict(self, latents, sigma):
        """Return what the network predicts."""
        return self.unet(latents, BETAS.timestep(sigma))
