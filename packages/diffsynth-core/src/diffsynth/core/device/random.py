"""Random numbers on a device: generators, and the state that a resumed run goes on from."""

from __future__ import annotations

import torch

from diffsynth.core.device.backends import driven


def generator(device: torch.device | str, seed: int | None = None) -> torch.Generator:
    """A random generator of this device, seeded if a seed is given; MPS draws on the CPU."""
    kind = torch.device(device).type
    made = torch.Generator("cpu" if kind == "mps" else device)
    if seed is None:
        made.seed()
    else:
        made.manual_seed(seed)
    return made


def random_state(device: torch.device | str) -> torch.Tensor:
    """State of the device's own default generator: bytes, in host memory."""
    backend, module = driven(device)
    if module is None:
        return torch.get_rng_state()
    return (module.get_rng_state(torch.device(device)) if backend.indexed else module.get_rng_state()).cpu()


def set_random_state(state: torch.Tensor, device: torch.device | str) -> None:
    """Put back what `random_state` gave for a device of the same kind."""
    backend, module = driven(device)
    if module is None:
        torch.set_rng_state(state.cpu())
    elif backend.indexed:
        module.set_rng_state(state.cpu(), torch.device(device))
    else:
        module.set_rng_state(state.cpu())
