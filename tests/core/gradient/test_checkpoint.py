"""Checkpointing changes which activations are stored, and no result."""

import pytest
import torch
from torch import nn

from diffsynth.core.gradient import checkpoint, gradient_checkpoint_forward


class Net(nn.Module):
    """A module that counts its calls; its argument `debug` is also one of torch's checkpoint function."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, x, *, debug, factor=1.0):
        self.calls += 1
        return torch.tanh(self.linear(x) * debug).sin() * factor


def gradients(net, x, shift, *flags):
    net.zero_grad()
    net.calls = 0
    out = gradient_checkpoint_forward(net, *flags, x, debug=shift, factor=2.0)
    out.sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in net.parameters())]


@pytest.mark.parametrize(("flags", "calls"), [((False, False), 1), ((True, False), 2), ((True, True), 2)])
def test_same_numbers(flags, calls):
    net, x, shift = Net(), torch.randn(3, 5), torch.randn(5)
    expected = gradients(net, x, shift, False, False)
    found = gradients(net, x, shift, *flags)
    assert net.calls == calls
    for tensor, truth in zip(found, expected, strict=True):
        assert torch.equal(tensor, truth)


def test_offload_implies_checkpointing():
    net = Net()
    gradients(net, torch.randn(3, 5), torch.randn(5), False, True)
    assert net.calls == 2


def test_offload_moves_the_inputs_alone(monkeypatch):
    """Keyword arguments are inputs too: torch's checkpoint would have left them on the device."""
    packed = []

    def save_on_cpu():
        return torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(tuple(t.shape)) or t, lambda t: t)

    monkeypatch.setattr(checkpoint, "save_on_cpu", save_on_cpu)
    net, x, shift = Net(), torch.randn(3, 5, requires_grad=True), torch.randn(5)
    expected = gradients(net, x, shift, True, False)
    assert packed == []
    for tensor, truth in zip(gradients(net, x, shift, True, True), expected, strict=True):
        assert torch.equal(tensor, truth)
    # torch 2.11 saves an empty tensor of its own beside them.
    moved = [shape for shape in packed if 0 not in shape]
    assert moved == [(3, 5), (5,)]
    packed.clear()
    with save_on_cpu():
        net(x, debug=shift, factor=2.0)
    assert len(moved) < len(packed)


def test_nothing_is_kept_or_repeated_without_gradients():
    net = Net()
    with torch.no_grad():
        gradient_checkpoint_forward(net, True, True, torch.randn(3, 5), debug=torch.ones(5))
    assert net.calls == 1
