from __future__ import annotations

import pytest
import torch

from diffsynth.sampling.noise import add_noise, initial_noise

SHAPE = (4, 3, 5)


def draw(seeds, dtype=torch.bfloat16, shape=SHAPE):
    return initial_noise(shape, seeds, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_batch_is_its_single_calls(dtype):
    batch = draw([7, 8, 7], dtype)
    assert batch.shape == (3, *SHAPE)
    assert batch.dtype == dtype
    assert torch.equal(batch, torch.cat([draw([7], dtype), draw([8], dtype), draw([7], dtype)]))
    assert not torch.equal(batch[0], batch[1])


def test_a_seed_gives_the_noise_of_the_published_pipelines():
    expected = torch.randn(1, *SHAPE, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.bfloat16)
    assert torch.equal(draw([0]), expected)


def test_noise_in_bf16_is_not_noise_in_fp32_cast_to_bf16():
    """On the CPU the two agree if the size is a multiple of 16, and differ at any other size."""
    odd = (1, 5, 7)
    assert not torch.equal(draw([0], torch.bfloat16, odd), draw([0], torch.float32, odd).bfloat16())


def test_seeds_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    draw([0, 1])
    assert torch.equal(torch.rand(1), expected)


def test_no_seed_gives_new_noise():
    first, second = draw([None, None])
    assert not torch.equal(first, second)
    assert not torch.equal(draw([None]), draw([None]))


def test_it_is_standard_normal():
    noise = draw([1], torch.float32, (1, 64, 64))
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="seeds is empty"):
        draw([])
    with pytest.raises(ValueError, match="seed=18446744073709551616: expected an integer from"):
        draw([2**64])
    for seeds, message in ((["7"], "seed='7': expected an integer"), ([True], "seed=True"), ([0.5], "seed=0.5")):
        with pytest.raises(ValueError, match=message):
            draw(seeds)
    with pytest.raises(TypeError, match="seeds=7: expected a list of integers"):
        draw(7)


def test_add_noise_interpolates_between_data_and_noise():
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert torch.equal(add_noise(x0, noise, 0.0), x0)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)
    torch.testing.assert_close(add_noise(x0, noise, torch.tensor(0.25)), 0.75 * x0 + 0.25 * noise)


def test_add_noise_takes_a_level_per_entry():
    x0, noise, sigma = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.0, 0.3, 1.0])
    noisy = add_noise(x0, noise, sigma)
    for i in range(3):
        torch.testing.assert_close(noisy[i], add_noise(x0, noise, sigma[i])[i])


@pytest.mark.parametrize("sigma", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5])])
def test_add_noise_keeps_the_dtype_of_the_data(sigma):
    x0 = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert add_noise(x0, torch.ones_like(x0), sigma).dtype == torch.bfloat16


def test_add_noise_refuses_shapes_that_would_broadcast():
    x0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="expected one shape"):
        add_noise(x0, torch.zeros(1, 3), 0.5)
    with pytest.raises(ValueError, match="one per entry of x0"):
        add_noise(x0, torch.zeros(2, 3), torch.tensor([0.5, 0.5, 0.5]))
