import dataclasses

import pytest
import torch

from diffsynth.core.data.audio import Audio


def test_fields_are_kept_and_cannot_be_changed():
    samples = torch.zeros(2, 5)
    sound = Audio(samples, 8000)
    assert sound.samples is samples
    assert sound.sample_rate == 8000
    assert sound != Audio(samples, 8000)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sound.sample_rate = 1


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        ([0.0, 1.0], 8000, "samples is .*of type list; expected a floating-point tensor"),
        (torch.zeros(2, 8, dtype=torch.int16), 8000, "samples is a tensor of torch.int16"),
        (torch.zeros(8), 8000, r"samples is \(8,\); expected two axes"),
        (torch.zeros(1, 8), "8000", "sample_rate='8000': expected an integer of at least 1"),
        (torch.zeros(1, 8), 0, "sample_rate=0"),
    ],
)
def test_what_is_no_sound_is_refused(samples, rate, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Audio(samples, rate)
