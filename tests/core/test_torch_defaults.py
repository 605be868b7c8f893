import contextlib
import threading

import pytest
import torch

from diffsynth.core.torch_defaults import torch_defaults


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "state",
    [contextlib.nullcontext, lambda: default_dtype(torch.float64), lambda: torch.device("meta"), torch.inference_mode],
)
def test_tensors_are_plain(state):
    """Factories, divisions of integers and inference mode are as in a fresh process, and come back afterwards."""
    with state():
        before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled())
        with torch_defaults():
            made = torch.arange(3) / 2
            assert (made.dtype, made.device.type, made.is_inference()) == (torch.float32, "cpu", False)
            assert made.requires_grad is False
        after = (torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled())
        assert after == before


def test_the_default_dtype_comes_back_after_the_last_of_two_threads():
    inside, leave, seen = threading.Event(), threading.Event(), []

    @torch_defaults()
    def other():
        inside.set()
        leave.wait(10)
        seen.append(torch.zeros(1).dtype)

    with default_dtype(torch.float64):
        thread = threading.Thread(target=other)
        with torch_defaults():
            thread.start()
            assert inside.wait(10)
        assert torch.get_default_dtype() == torch.float32  # the other is inside
        leave.set()
        thread.join()
        assert seen == [torch.float32]
        assert torch.get_default_dtype() == torch.float64


def test_an_error_leaves_everything_as_it_was():
    with default_dtype(torch.float64):
        with pytest.raises(KeyError), torch_defaults():
            raise KeyError
        assert torch.get_default_dtype() == torch.float64
