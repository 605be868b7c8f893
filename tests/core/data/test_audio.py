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
