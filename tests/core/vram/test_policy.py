"""Policies: what presets and the eight keys mean, and which of them cannot be."""

from __future__ import annotations

import pytest
import torch

from diffsynth.core.vram.policy import DISK, PRESETS, Placement, Policy

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def keys(**states: tuple[object, object]) -> dict[str, object]:
    """`offload=("cpu", bf16)` as the two keys of a `ModelConfig`."""
    return {
        f"{state}_{what}": value
        for state, pair in states.items()
        for what, value in zip(("device", "dtype"), pair, strict=True)
    }


def policy(**states: tuple[object, object]) -> Policy | None:
    return Policy.from_keys(keys(**states), device="cpu", dtype=BF16)


def test_no_key_is_no_policy() -> None:
    assert policy() is None
    assert policy(offload=(None, None), computation=(None, None)) is None


def test_the_eight_keys() -> None:
    made = policy(offload=(DISK, DISK), onload=("cpu", FP8), preparing=("cpu", FP8), computation=("cpu", BF16))
    assert made == Policy(Placement(DISK), Placement("cpu", FP8), Placement("cpu", FP8), Placement("cpu", BF16))
    assert made.stored_dtype(torch.float32) == FP8
    assert made.computed_dtype(torch.float32) == BF16


def test_what_is_left_out_is_what_computation_is() -> None:
    assert policy(offload=("cpu", FP8)) == Policy(
        Placement("cpu", FP8), Placement("cpu", BF16), Placement("cpu", BF16), Placement("cpu", BF16)
    )


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"offload": ("cpu", None)}, "offload_device='cpu' without offload_dtype: set both"),
        ({"offload": (None, BF16)}, "offload_dtype=torch.bfloat16 without offload_device"),
        ({"onload": ("cpu", BF16)}, "without offload_device and offload_dtype: .*offload_device='cpu'"),
        ({"offload": (DISK, BF16)}, "'disk' goes with 'disk'"),
        ({"offload": ("cpu", DISK)}, "'disk' goes with 'disk'"),
        ({"offload": ("cpu", "bfloat16")}, "offload_dtype='bfloat16': expected a torch dtype"),
        ({"offload": ("cpu", BF16), "computation": (DISK, DISK)}, "expected a device that computes"),
        ({"offload": ("cpu", BF16), "onload": (DISK, DISK)}, "onload on disk is further from cpu than offload on cpu"),
        ({"offload": ("cuda:9", BF16)}, "cuda:9"),
        ({"offload": ("gpu", BF16)}, "gpu"),
    ],
)
def test_a_hole_is_named(states: dict[str, tuple[object, object]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**states)


def test_presets() -> None:
    for name in PRESETS:
        assert Policy.preset(name, "cpu").device == torch.device("cpu")
    assert Policy.preset("fp8", "cpu", BF16).stored_dtype(BF16) == FP8
    assert Policy.preset("disk", "cpu").onload.on_disk
    assert not Policy.preset("cpu-offload", "cpu").onload.on_disk
    with pytest.raises(ValueError, match="'cpu_offload' is unknown.*did you mean 'cpu-offload'"):
        Policy.preset("cpu_offload", "cpu")


def test_a_dtype_that_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsynth.core.device import names

    monkeypatch.setattr(names, "is_available", lambda kind: kind in ("mps", "cpu"))
    with pytest.raises(ValueError, match="float8_e4m3fn on MPS"):
        Policy.preset("fp8", "mps")


def test_weights_on_another_accelerator_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffsynth.core import device as devices

    monkeypatch.setattr(devices, "check_device", lambda device: torch.device(device))
    with pytest.raises(ValueError, match="weights on cuda:1 for computation on cuda:0"):
        Policy(Placement("cuda:1"), Placement("cuda:1"), Placement("cuda:0"), Placement("cuda:0"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e8m0fnu])
def test_a_dtype_that_holds_no_weights_is_refused(dtype):
    """Weights in int8 were accepted, and the image was wrong by 68 %."""
    keys = {"offload_device": "cpu", "offload_dtype": dtype}
    with pytest.raises(TypeError, match=f"offload_dtype={dtype}: expected torch.bfloat16"):
        Policy.from_keys(keys, device="cpu", dtype=torch.float32)
    with pytest.raises(TypeError, match="dtype="):
        Placement("cpu", dtype)


def test_a_dtype_that_is_too_narrow_to_compute_in_is_refused():
    fp8 = Placement("cpu", torch.float8_e4m3fn)
    with pytest.raises(TypeError, match="computation_dtype=torch.float8_e4m3fn: expected torch.bfloat16"):
        Policy(fp8, fp8, fp8, fp8)


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match="offload='cpu': expected a Placement"):
        Policy("cpu", "cpu", "cpu", "cpu")
    for name in (3, [], ["fp8"]):
        with pytest.raises(ValueError, match="policy .* is unknown; Expected none"):
            Policy.preset(name, "cpu")
