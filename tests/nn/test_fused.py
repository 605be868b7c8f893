"""Calls that a kernel serves or refuses; without a GPU, the check of the device is replaced."""

from __future__ import annotations

import logging

import pytest
import torch

from diffsynth import nn
from diffsynth.nn import fused, naive
from diffsynth.nn.layer_norm import layer_norm
from diffsynth.nn.rms_norm import rms_norm


@pytest.fixture
def _everywhere(monkeypatch):
    """Kernels run on every device, on the CPU in Triton's interpreter."""
    monkeypatch.setattr(fused, "no_kernels_on", lambda device_type: None)


def test_the_cpu_runs_plain_torch_and_logs_why(caplog) -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    assert nn.why_not("norm", x, weight) == "tensors are on cpu; the kernels run on cuda"
    fused._logged.clear()
    with caplog.at_level(logging.DEBUG, logger=fused.logger.name):
        assert torch.equal(rms_norm(x, weight, eps=1e-6), naive.rms_norm(x, weight, eps=1e-6))
        rms_norm(x, weight, eps=1e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "norm runs as plain torch: tensors are on cpu; the kernels run on cuda"
    ]


def test_a_switch_turns_them_off(monkeypatch) -> None:
    monkeypatch.setenv("DIFFSYNTH_FUSED_KERNELS", "off")
    assert fused.no_kernels_on("cuda") == "DIFFSYNTH_FUSED_KERNELS is off"


def test_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="'norms' is unknown; did you mean 'norm'?"):
        nn.why_not("norms", torch.ones(1))


@pytest.mark.usefixtures("_everywhere")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: nn.why_not("norm", x, x.double()), "dtype torch.float64 is none of"),
        (lambda x: nn.why_not("norm", x, torch.empty(8, device="meta")), "tensors are on cpu and on meta"),
        (lambda x: nn.why_not("norm", x.requires_grad_()), "a gradient is needed"),
        (lambda x: nn.why_not("norm", x[:0]), "is empty"),
        (lambda x: fused.broadcasts(x, x[:, :3]), r"\(2, 3, 8\) does not broadcast to \(2, 5, 8\)"),
        (lambda x: fused.broadcasts(x, x[0]), "the kernel takes 'b s e'"),
        (lambda x: fused.too_wide(fused.MAX_WIDTH + 1), "at most 16384"),
    ],
)
def test_reasons(call, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(call(torch.randn(2, 5, 8)))


@pytest.mark.usefixtures("_everywhere")
def test_every_layer_reaches_its_kernel(monkeypatch) -> None:
    """The result is the kernel's, within its tolerance, if it serves, else exactly the reference's."""
    x, residual = torch.randn(2, 2, 5, 8)
    weight, bias, scale, shift, gate = torch.randn(8), torch.randn(8), *torch.randn(3, 2, 1, 8)
    q, (cos, sin) = torch.randn(2, 5, 2, 4), torch.randn(2, 1, 5, 2)
    modulated = {"scale": scale, "shift": shift}
    calls = [
        lambda: rms_norm(x, weight, eps=1e-6, **modulated, residual=residual, gate=gate),
        lambda: rms_norm(q, weight[:4], eps=1e-6),
        lambda: layer_norm(x, weight, bias, eps=1e-6, **modulated),
        lambda: nn.modulate(x, scale, shift),
        lambda: nn.gated_residual(residual, x, gate),
        lambda: nn.rms_norm_rotary(q, weight, cos, sin, eps=1e-6),
        lambda: nn.apply_rotary(q, cos, sin),
        lambda: nn.swiglu(x, residual),
        lambda: nn.geglu(x, residual),
        lambda: nn.sinusoidal_embedding(torch.tensor([1.0, 2.0]), 8),
    ]
    by_kernel = [call() for call in calls]
    served = []
    monkeypatch.setattr(fused, "serves", lambda kernel, reason: served.append(reason))
    by_reference = [call() for call in calls]
    assert served == [None] * len(calls)
    for ours, expected in zip(by_kernel, by_reference, strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_everywhere")
def test_a_refused_call_has_a_result_and_a_gradient() -> None:
    x = torch.randn(2, 5, 8, requires_grad=True)
    nn.modulate(x, torch.ones(8), torch.ones(5, 8)).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    fp32, bf16 = torch.randn(1, 5, 8), torch.randn(1, 5, 8).bfloat16()
    assert nn.gated_residual(fp32, bf16, bf16).dtype == torch.float32


def test_gate_and_up_of_different_shapes() -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    with pytest.raises(ValueError, match="shift is given without scale"):
        rms_norm(x, weight, eps=1e-6, shift=x)
    with pytest.raises(ValueError, match="shift is given without scale"):
        layer_norm(x, eps=1e-6, shift=x)
    with pytest.raises(ValueError, match="residual and gate are given one without the other"):
        rms_norm(x, weight, eps=1e-6, gate=x)
    with pytest.raises(ValueError, match="weight has 3 elements; expected 4 for each head or 8 for all"):
        nn.rms_norm_rotary(torch.randn(2, 5, 2, 4), weight[:3], x[:, :, :2], x[:, :, :2], eps=1e-6)
