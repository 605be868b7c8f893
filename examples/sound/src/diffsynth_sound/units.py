"""Units of the pipeline: length, noise levels, pitch, noise, and the sound of the result."""

from collections.abc import Sequence

import torch

from diffsynth import Phase, unit
from diffsynth.core.data.audio import Audio
from diffsynth.sampling.noise import initial_noise
from diffsynth.sampling.schedule import z_image_sigmas
from diffsynth_sound.config import PATCH, SAMPLE_RATE


@unit("num_samples", phase=Phase.SHAPE)
def sound_length(*, seconds: float = 1.0):
    """Return the number of samples of the sound.

    Args:
        seconds: length of the sound, above 0 and at most 30.

    Raises:
        ValueError: a length out of range, or of less than one sample.
    """
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 / SAMPLE_RATE <= seconds <= 30:
        raise ValueError(f"seconds={seconds!r}: expected a number from {1 / SAMPLE_RATE} to 30")
    return round(seconds * SAMPLE_RATE)


@unit("sigmas", phase=Phase.SHAPE)
def schedule(*, num_inference_steps: int):
    """Return noise levels, evenly spaced from 1 to 0."""
    return z_image_sigmas(num_inference_steps, shift=1.0)


@unit("frequencies")
def encode_frequency(*, frequency: float | Sequence[float] = 440.0, device: torch.device):
    """Return the pitch of each sound, an fp32 tensor `b`.

    Args:
        frequency: pitch in Hz, above 0; a list gives a sound for each entry.

    Raises:
        ValueError: a frequency that is not above 0.
    """
    for each in frequency:
        if isinstance(each, bool) or not isinstance(each, int | float) or not each > 0:
            raise ValueError(f"frequency={each!r}: expected a number above 0, in Hz")
    return torch.tensor(frequency, dtype=torch.float32, device=device)


@unit("latents", random=True, phase=Phase.LATENTS)
def initial_latents(
    *, num_samples: int, channels: int, seeds: list[int | None], device: torch.device, dtype: torch.dtype
):
    """Return noise, `b c n`; n is the number of samples, rounded up to whole tokens."""
    return initial_noise((channels, -(-num_samples // PATCH) * PATCH), seeds, dtype=dtype, device=device)


@unit("output")
def to_sound(*, latents: torch.Tensor, num_samples: int, output_type: str):
    """Return a list of `Audio`, or the samples in [-1, 1], `b c n`, if `output_type` is "tensor"."""
    samples = latents[..., :num_samples].float().clamp(-1, 1)
    return samples if output_type == "tensor" else [Audio(each, SAMPLE_RATE) for each in samples.cpu()]
