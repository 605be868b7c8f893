"""A network of another library under memory policies of diffsynth: the same outputs, with its weights offloaded.

    python any_module.py                 # a small T5 encoder on the CPU
    python any_module.py --device cuda --layers 24 --width 4096

`wrap` needs no knowledge of the library: it finds the repeated blocks, and copies each to the device before it runs.
The module keeps its class, its names and its results, bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from diffsynth.core.vram import DiskMap, Policy, TransferReport, wrap

LIMIT = 2**20
"""Bytes from which on a layer is a block of its own; the default of `wrap`."""


def encoder(width: int, layers: int) -> T5EncoderModel:
    """Return a T5 encoder with random weights, the same each time."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=1000, d_model=width, d_ff=2 * width, d_kv=width // 8, num_heads=8, num_layers=layers)
    return T5EncoderModel(config).eval().requires_grad_(False)


def in_host_memory(width: int, layers: int, tokens: torch.Tensor, smallest: int) -> torch.Tensor:
    """Run the encoder with its weights in host memory, and two blocks at a time on the device."""
    model = encoder(width, layers)
    managed = wrap(model, Policy.preset("cpu-offload", tokens.device), smallest=smallest)
    managed.configure(resident=(), slots=2)
    with managed:
        return model(tokens).last_hidden_state


def on_disk(
    folder: Path, width: int, layers: int, tokens: torch.Tensor, smallest: int
) -> tuple[torch.Tensor, TransferReport]:
    """Run the encoder with its weights in a file, and two blocks at a time in memory."""
    encoder(width, layers).save_pretrained(folder)
    with torch.device("meta"):
        model = encoder(width, layers)
    files = DiskMap(folder / "model.safetensors")
    managed = wrap(model, Policy.preset("disk", tokens.device), source=files.source_of(model), smallest=smallest)
    managed.configure(resident=(), slots=2)
    with managed:
        return model(tokens).last_hidden_state, managed.report.settle()


def main(device: str = "cpu", width: int = 512, layers: int = 6, smallest: int = LIMIT) -> None:
    """Run the encoder without a policy and under two policies, and compare the outputs."""
    tokens = torch.arange(24, device=device).reshape(2, 12)
    with torch.no_grad():
        expected = encoder(width, layers).to(device)(tokens).last_hidden_state
        assert torch.equal(in_host_memory(width, layers, tokens, smallest), expected)
        with tempfile.TemporaryDirectory() as folder:
            found, report = on_disk(Path(folder), width, layers, tokens, smallest)
    assert torch.equal(found, expected)
    print(f"from disk: {report}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    main(**vars(parser.parse_args()))
