"""Units of FLUX.2: noise levels, guidance, and the first latents."""

from __future__ import annotations

import pytest
import torch

from diffsynth_flux.flux2.units import check_guidance, initial_latents, network_guidance, schedule

CPU = torch.device("cpu")


def test_noise_levels_of_the_reference() -> None:
    """`spec/features.md` A7: four steps at 1024 x 1024."""
    sigmas = schedule(num_inference_steps=4, height=1024, width=1024)
    assert sigmas.tolist() == pytest.approx([1, 0.96738, 0.90814, 0.7672, 0], abs=1e-5)
    assert schedule(num_inference_steps=4, height=64, width=64)[1] < sigmas[1]


def test_guidance_is_a_number_for_each_result() -> None:
    guidance = network_guidance(embedded_guidance=2.5, embeds_guidance=True, batch_size=3, device=CPU)
    assert guidance.tolist() == [2.5] * 3
    assert guidance.dtype == torch.float32


def test_guidance_for_a_network_that_takes_none_is_refused() -> None:
    assert network_guidance(embeds_guidance=False, batch_size=1, device=CPU) is None
    check_guidance({"embedded_guidance": 4.0, "embeds_guidance": False})
    check_guidance({"embedded_guidance": 2.5, "embeds_guidance": True})
    with pytest.raises(ValueError, match=r"embedded_guidance=2.5 is given, but this network takes no guidance scale"):
        check_guidance({"embedded_guidance": 2.5, "embeds_guidance": False})


def test_an_input_image_is_noised_to_the_first_level() -> None:
    noise, image = torch.randn(1, 8, 2, 3), torch.randn(1, 8, 2, 3)
    call = {"height": 32, "width": 48, "latent_channels": 8, "seeds": [None], "device": CPU, "dtype": torch.float32}
    sigmas = torch.tensor([0.25, 0.0])
    latents = initial_latents(initial_noise=noise, input_latents=image, sigmas=sigmas, **call)
    assert torch.allclose(latents, 0.75 * image + 0.25 * noise)
    assert torch.equal(initial_latents(initial_noise=noise, sigmas=sigmas, **call), noise)
