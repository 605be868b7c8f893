import pytest
import torch

from diffsynth.errors import TrainingError
from diffsynth.spec import TrainingSpec
from diffsynth_train.objectives.flow_match import FlowMatch, FlowMatchOptions, bell_weights
from toy_pipeline import ToyPipeline, toy_pipeline

SPEC = TrainingSpec(
    pipeline="toy_pipeline:ToyPipeline", trainable=("dit",), schedule="diffsynth.sampling.schedule:z_image_sigmas"
)


class Recording(ToyPipeline):
    """Return zeros and record the arguments."""

    def velocity(self, latents, sigma, *, colour):
        self.asked = (latents, sigma, colour)
        return torch.zeros_like(latents)


def asked(options=None, size=4096):
    pipe = toy_pipeline(Recording)
    objective = FlowMatch(options or FlowMatchOptions(), pipe, SPEC)
    values = {"input_latents": torch.zeros(size, 1, 1, 1), "colour": torch.zeros(size), "height": 8}
    loss, numbers = objective.loss(values, torch.Generator().manual_seed(0))
    return pipe, loss, numbers


def test_levels_are_those_of_the_table():
    """DiffSynth-Studio rounds the sampled time to bf16, which gives a grid of 4 above 512 of 1000."""
    pipe, _, _ = asked()
    table = torch.linspace(1, 0, 1001)[:-1]
    table = 3 * table / (1 + 2 * table)
    sigma = pipe.asked[1]
    assert sigma.dtype == torch.float32
    assert (torch.cdist(sigma[:, None], table[:, None]).min(dim=1).values < 1e-6).all()
    assert sigma.unique().numel() > 900
    assert sigma.median().item() == pytest.approx(0.75, abs=0.02)


def test_target_is_noise_minus_data():
    """With x0 = 0 and a prediction of 0, the loss is the variance of the noise."""
    pipe, loss, numbers = asked()
    latents, sigma, _ = pipe.asked
    noise = latents.flatten() / sigma
    assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-4)
    assert set(numbers) == {"noisy_half", "clean_half"}


def test_range_of_indices():
    pipe, _, _ = asked(FlowMatchOptions(max_index=0.5))
    assert pipe.asked[1].min() > 0.74
    with pytest.raises(TrainingError, match="min_index = 0.7, max_index = 0.3"):
        asked(FlowMatchOptions(min_index=0.7, max_index=0.3))


def test_shift_moves_levels_towards_noise():
    pipe, _, _ = asked(FlowMatchOptions(shift=6))
    sigma = pipe.asked[1]
    assert sigma.median().item() == pytest.approx(18 / 19, abs=0.01)
    assert sigma.max() <= 1
    with pytest.raises(TrainingError, match="shift = 0: expected a positive number"):
        asked(FlowMatchOptions(shift=0))


def test_bell_weights():
    """Mean 1, minimum 0, and the published peak for Z-Image."""
    table = torch.linspace(1, 0, 1001)[:-1]
    weights = bell_weights(3 * table / (1 + 2 * table))
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert weights.min().item() == 0
    assert weights.max().item() == pytest.approx(1.798, abs=2e-3)


def test_without_a_schedule():
    with pytest.raises(TrainingError, match="declares no schedule"):
        FlowMatch(FlowMatchOptions(), toy_pipeline(), TrainingSpec(pipeline="a:B", trainable=()))
