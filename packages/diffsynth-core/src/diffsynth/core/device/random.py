"""Random number generators of a device, and the state of its default generator for resumed runs."""

from __future__ import annotations

import torch

from diffsynth.core.device.backends import backend_and_module


def generator(device: torch.device | str, seed: int | None = None) -> torch.Generator:
    """Return a `torch.Generator` on a device (MPS: on the CPU), seeded with `seed`, or at random if `seed` is None."""
    kind = torch.device(device).type
    made = torch.Generator("cpu" if kind == "mps" else device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


def random_state(device: torch.device | str) -> torch.Tensor:
    """Return the state of a device's default random generator, as a uint8 tensor in host memory."""
    backend, module = backend_and_module(device)
    if module is None:
        return torch.get_rng_state()
    return (module.get_rng_state(torch.device(device)) if backend.indexed else module.get_rng_state()).cpu()


def set_random_state(state: torch.Tensor, device: torch.device | str) -> None:
    """Set a device's default random generator to `state`, a tensor from `random_state` for the same kind of device."""
    backend, module = backend_and_module(device)
    if module is None:
        torch.set_rng_state(state.cpu())
    elif backend.indexed:
        module.set_rng_state(state.cpu(), torch.device(device))
    else:
        module.set_rng_state(state.cpu())
