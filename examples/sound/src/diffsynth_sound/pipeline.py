"""The pipeline: generates a sound of a pitch."""

from diffsynth import Pipeline, Role
from diffsynth.runtime.request import LoopArguments
from diffsynth_sound.units import encode_frequency, initial_latents, schedule, sound_length, to_sound


class SoundPipeline(Pipeline):
    """Generate a sound of a pitch and a length."""

    roles = {"net": Role(architectures=("sound_net",))}
    loop_roles = ("net",)
    units = (sound_length, schedule, encode_frequency, initial_latents)
    output_units = (to_sound,)
    output_kind = "audio"
    per_image = ("frequency",)
    facts = {"channels": "net.channels"}
    loop = LoopArguments(num_inference_steps=20)

    def velocity(self, latents, sigma, *, frequencies):
        """Return the velocity `noise - sound`, which the network predicts."""
        return self.net(latents, sigma, frequencies)
