"""Regional compilation, counted by a backend that compiles nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import parity
from diffsynth.core.vram.managed import wrap
from diffsynth.core.vram.policy import Policy
from diffsynth.errors import MissingComponent, Refused
from diffsynth.runtime.acceleration.compiling import blocks_to_compile, compile_forward
from tiny_z_image import SMALL, tiny_z_image
from toy_pipeline import ToyPipeline
from toy_unet import LISTS, ToyUnet, declare, toy_unet

CALL = {"prompt": "a cat", "num_inference_steps": 3, **SMALL}


class CountingBackend:
    """Runs graphs as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


def test_blocks_compile_once_for_all_steps_and_sizes(backend) -> None:
    """Three kinds of block with and without modulation, one graph each: not one per block, step, or resolution."""
    pipe = tiny_z_image()
    truth = [pipe(**CALL), pipe(**{**CALL, "height": 64, "width": 32})]
    pipe.compile_pipeline(backend=backend, fullgraph=True)
    compiled = [pipe(**CALL)]
    first = backend.graphs
    assert 2 <= first <= 4
    compiled += [pipe(**{**CALL, "height": 64, "width": 32}), pipe(**{**CALL, "prompt": "a dog, and " * 9})]
    assert backend.graphs == first
    for ours, theirs in zip(compiled, truth, strict=False):
        assert parity.relative_error(ours, theirs) < 1e-5
    assert set(pipe.dit.state_dict()) == set(tiny_z_image().dit.state_dict())


def test_streamed_blocks_compile_underneath_what_moves_them(backend) -> None:
    """Compiling the layer that streams weights would trace the streaming itself, which it forbids."""
    network, x = nn.Sequential(Block(), Block()).requires_grad_(False).eval(), torch.randn(3, 8)
    truth = network(x)
    managed = wrap(network, Policy.preset("cpu-offload", "cpu"), whole=(Block,), smallest=0)
    assert len(managed.blocks) == 2
    for block in network:
        compile_forward(block, backend=backend, fullgraph=True)
    for _ in range(2):
        with managed:
            assert torch.equal(network(x), truth)
    assert backend.graphs == 1


def test_compiling_again_replaces(backend) -> None:
    block, x, other = Block(), torch.randn(3, 8), CountingBackend()
    truth = block(x)
    compile_forward(block, backend=other)
    compile_forward(block, backend=backend)
    assert torch.equal(block(x), truth)
    assert (other.graphs, backend.graphs) == (0, 1)


def test_blocks_of_unlike_classes_compile_one_by_one(backend, monkeypatch) -> None:
    """Two blocks on the way down and four alike in the middle give three graphs; those on the way up are not listed."""
    pipe = ToyPipeline({"dit": toy_unet()}, device="cpu", torch_dtype=torch.float32)
    declare(monkeypatch, ToyUnet, "toy_unet", repeated_blocks=LISTS, compiled_blocks=("down", "middle"))
    call = {"prompt": "grey", "num_inference_steps": 2, "seed": 0, "output_type": "latents"}
    truth = pipe(**call)
    pipe.compile_pipeline(backend=backend, fullgraph=True)
    assert parity.relative_error(pipe(**call), truth) < 1e-6
    assert backend.graphs == 3


def test_a_network_without_blocks_to_compile_is_refused_by_name(monkeypatch) -> None:
    pipe = ToyPipeline({"dit": toy_unet()}, device="cpu", torch_dtype=torch.float32)
    assert blocks_to_compile(pipe.dit) == [pipe.dit]  # a module of no declared architecture is compiled whole
    declare(monkeypatch, ToyUnet, "toy_unet", repeated_blocks=LISTS, compiled_blocks=())
    with pytest.raises(Refused, match="compiling is refused: toy_unet declares no blocks that may be compiled"):
        pipe.compile_pipeline()


def test_roles() -> None:
    pipe = tiny_z_image(n_layers=1)
    with pytest.raises(TypeError, match="'ditt', no role of this pipeline; did you mean 'dit'"):
        pipe.compile_pipeline(compile_models=["ditt"])
    with pytest.raises(MissingComponent, match="'vae', which is not loaded"):
        pipe.compile_pipeline(compile_models=["vae"])
    with pytest.raises(TypeError, match="only modules can be compiled"):
        pipe.compile_pipeline(compile_models=["tokenizer"])
    with pytest.raises(TypeError, match="dynamics"):
        pipe.compile_pipeline(dynamics=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)
