"""The pipeline: generates an image of a class."""

from diffsynth import Pipeline, Role
from diffsynth.runtime.request import LoopArguments
from diffsynth_pixelddpm.label import LABEL
from diffsynth_pixelddpm.units import BETAS, initial_latents, round_size, schedule, to_images


class PixelDDPMPipeline(Pipeline):
    """Generate an image of a class, directly in pixels."""

    roles = {"unet": Role(architectures=("pixel_unet",))}
    loop_roles = ("unet",)
    units = (round_size, schedule, initial_latents)
    features = (LABEL,)
    output_units = (to_images,)
    output_kind = "image"
    per_image = ()
    loop = LoopArguments(num_inference_steps=50)
    prediction = "epsilon"

    def predict(self, latents, sigma, *, labels):
        """Return the noise that the network predicts."""
        return self.unet(latents, BETAS.timestep(sigma), labels)
