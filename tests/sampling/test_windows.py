"""Windows of latent frames: their places, and the weights with which they are blended."""

import pytest
import torch

from diffsynth.sampling.windows import SlidingWindow


@pytest.mark.parametrize(("frames", "size", "stride"), [(21, 8, 4), (9, 4, 3), (10, 4, 4), (7, 3, 2), (5, 2, 1)])
def test_windows_are_those_of_the_reference(frames, size, stride):
    """The loop of DiffSynth-Studio: a window at every `stride` until one reaches the end; ramps over the overlap."""
    expected = []
    for start in range(0, frames, stride):
        if start - stride >= 0 and start - stride + size >= frames:
            continue
        stop = min(start + size, frames)
        mask, border = torch.ones(stop - start), size - stride
        ramp = (torch.arange(border) + 0.5) / max(border, 1)
        if border and start > 0:
            mask[:border] = ramp
        if border and stop < frames:
            mask[-border:] = ramp.flip(0)
        expected.append((start, stop, mask))
    windows = SlidingWindow(size, stride).windows(frames)
    assert [(each.start, each.stop) for each in windows] == [each[:2] for each in expected]
    for window, (_, _, mask) in zip(windows, expected, strict=True):
        assert torch.allclose(window.weights(), mask)


def test_an_overlap_of_more_than_half_fades_on_both_sides():
    _, middle, *_ = SlidingWindow(4, 1).windows(9)
    assert torch.allclose(middle.weights(), torch.tensor([1, 3, 3, 1]) / 6)
