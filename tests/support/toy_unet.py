"""A small UNet: blocks of unlike classes, shapes and arguments, and tensors that skip to later blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth._discovery import Declared
from diffsynth.spec import ArchitectureSpec


class Down(nn.Module):
    """Halves the resolution; returns the features, and those before it for the way up."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.time = nn.Linear(1, dim)
        self.conv = nn.Conv2d(dim_in, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(self.conv(x) + self.time(time)[:, :, None, None]), x


class NormedDown(nn.Module):
    """Has other layers than `Down`, keyword arguments and a dict as its result."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, dim_in)
        self.conv = nn.Conv2d(dim_in, dim, 3, stride=2, padding=1, bias=False)

    def forward(self, *, x: Tensor) -> dict[str, Tensor]:
        return {"x": F.silu(self.conv(self.norm(x))), "skip": x}


class Middle(nn.Module):
    """Keeps the shape: a step cache may skip it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.conv(x))


class Up(nn.Module):
    """Joins the features with those from the way down."""

    def __init__(self, dim_in: int, dim_skip: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim_in + dim_skip, dim, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.silu(self.conv(torch.cat((F.interpolate(x, size=skip.shape[-2:]), skip), dim=1)))


class ToyUnet(nn.Module):
    """Takes the arguments of `toy_pipeline.ToyNet`."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet = nn.Conv2d(1, 4, 3, padding=1)
        self.down = nn.ModuleList([Down(4, 6), NormedDown(6, 10)])
        self.middle = nn.ModuleList(Middle(10) for _ in range(4))
        self.up = nn.ModuleList([Up(10, 6, 8), Up(8, 4, 4)])
        self.outlet = nn.Conv2d(4, 1, 1)

    def forward(self, latents: Tensor, sigma: Tensor, colour: Tensor) -> Tensor:
        first, second = self.down
        x, outer = first(self.inlet(latents), (sigma + colour)[:, None])
        features = second(x=x)
        x, inner = features["x"], features["skip"]
        for block in self.middle:
            x = block(x)
        for block, skip in zip(self.up, (inner, outer), strict=True):
            x = block(x, skip)
        return self.outlet(x)


LISTS = ("down", "middle", "up")


def toy_unet() -> ToyUnet:
    """Return a frozen network whose weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return ToyUnet().eval().requires_grad_(False)


def declare(monkeypatch: pytest.MonkeyPatch, module: type[nn.Module], name: str, **fields: object) -> ArchitectureSpec:
    """Declare an architecture of a class for one test, beside those of installed plugins, and return its spec."""
    spec = ArchitectureSpec(
        **{
            "name": name,
            "module": f"{module.__module__}:{module.__qualname__}",
            **dict.fromkeys(("config", "infer_config", "tiny", "tiny_inputs"), "none:none"),
            "required": (),
            **fields,
        }
    )
    catalog = _discovery.catalog()
    architectures = (*catalog.architectures, Declared(spec, "test", "test", "0"))
    monkeypatch.setattr(_discovery, "catalog", lambda: replace(catalog, architectures=architectures))
    return spec
