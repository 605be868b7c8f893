from __future__ import annotations

import pytest
import torch

from diffsynth.sampling.schedule import flux1_sigmas, z_image_sigmas
from diffsynth.sampling.solver import euler


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_a_straight_path_is_followed_exactly(num_steps):
    x0, noise = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = euler(lambda x, sigma: noise - x0, noise, z_image_sigmas(num_steps))
    torch.testing.assert_close(result, x0, atol=1e-6, rtol=0)


def test_the_error_on_a_curved_path_is_first_order():
    def error(num_steps):
        sigmas = z_image_sigmas(num_steps, shift=1.0)
        return (euler(lambda x, sigma: x, torch.ones(1, dtype=torch.float64), sigmas) - torch.e**-1).abs().item()

    assert error(100) < 0.002
    assert error(200) == pytest.approx(error(100) / 2, rel=0.02)


def test_the_network_sees_every_level_but_the_last():
    seen, sigmas = [], flux1_sigmas(4)
    euler(lambda x, sigma: seen.append(sigma) or torch.zeros_like(x), torch.zeros(1, 1), sigmas)
    assert torch.stack(seen).tolist() == sigmas[:-1].tolist()
    assert all(sigma.dtype == torch.float32 and sigma.ndim == 0 for sigma in seen)


@pytest.mark.parametrize("velocity_dtype", [torch.bfloat16, torch.float32])
def test_the_state_keeps_its_dtype_between_steps(velocity_dtype):
    dtypes = []

    def velocity(x, sigma):
        dtypes.append(x.dtype)
        return torch.ones_like(x, dtype=velocity_dtype)

    latents = torch.randn(1, 4, 3, 3, dtype=torch.bfloat16)
    assert euler(velocity, latents, z_image_sigmas(3)).dtype == torch.bfloat16
    assert dtypes == [torch.bfloat16] * 3


def test_on_step_gets_index_and_new_latents_and_the_input_stays():
    steps, latents = [], torch.ones(1, 2)
    result = euler(
        lambda x, sigma: torch.ones_like(x), latents, z_image_sigmas(3), on_step=lambda i, x: steps.append((i, x))
    )
    assert [index for index, _ in steps] == [0, 1, 2]
    assert steps[-1][1] is result
    torch.testing.assert_close(steps[0][1], latents + z_image_sigmas(3)[1] - 1)
    assert latents.tolist() == [[1.0, 1.0]]


def test_progress_wraps_a_list_it_can_count():
    lengths = []
    euler(
        lambda x, sigma: x,
        torch.zeros(1, 1),
        z_image_sigmas(5),
        progress=lambda steps: lengths.append(len(steps)) or steps,
    )
    assert lengths == [5]


def test_no_step_is_refused():
    with pytest.raises(ValueError, match="sigmas has 1 entries; expected num_steps"):
        euler(lambda x, sigma: x, torch.zeros(1, 1), torch.zeros(1))
