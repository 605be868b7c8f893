"""Step caches on a tiny Z-Image, and on networks whose blocks return more than one stream."""

from __future__ import annotations

import threading

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from diffsynth.core.vram.managed import managed, wrap
from diffsynth.core.vram.policy import Policy
from diffsynth.errors import Refused
from diffsynth.runtime.acceleration import (
    FirstBlockCache,
    TaylorSeer,
    TeaCache,
    measure_step_cache,
    parse_step_cache,
)
from diffsynth.runtime.acceleration.session import StepCacheSession
from diffsynth.runtime.architectures import Stack, cached_stacks
from diffsynth.spec import ModelSpec, TeaCacheSpec
from tiny_z_image import SMALL, tiny_z_image
from toy_pipeline import ToyPipeline, toy_pipeline
from toy_unet import LISTS, ToyUnet, declare, toy_unet

CALL = {"prompt": "a cat", "num_inference_steps": 6, "cfg_scale": 2.0, **SMALL}


@pytest.fixture(scope="module")
def pipe():
    return tiny_z_image()


@pytest.fixture(scope="module")
def truth(pipe):
    return pipe(**CALL)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCache(threshold=0),
        TaylorSeer(interval=1),
        TeaCache(threshold=0, fitted=TeaCacheSpec(coefficients=(-1.0, 0.0), signal="argument:time_embed")),
    ],
)
def test_settings_that_reuse_nothing_change_no_bit(pipe, truth, cache) -> None:
    assert torch.equal(pipe(**CALL, step_cache=cache), truth)


def test_first_block_cache_skips_steps_that_change_little(pipe, truth) -> None:
    report = measure_step_cache(pipe, FirstBlockCache(threshold=100.0, max_reused=2), **without_output(CALL))
    assert report.reused == {"cond": (1, 2, 4, 5), "uncond": (1, 2, 4, 5)}
    assert 0 < report.relative_l1 < 1
    assert "cond: 4 of 6 steps reused (1, 2, 4, 5)" in str(report)


def test_layers_run_only_where_they_are_not_skipped(pipe) -> None:
    """The first of six layers always runs, the others twice in six steps; short stacks run at every step."""
    runs = dict.fromkeys(("first", "last", "refiner"), 0)

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    inner = {
        "first": pipe.dit.layers[0].attention,
        "last": pipe.dit.layers[-1].attention,
        "refiner": pipe.dit.noise_refiner[0].attention,
    }
    handles = [module.register_forward_hook(count(name)) for name, module in inner.items()]
    pipe(**{**CALL, "cfg_scale": 1.0}, step_cache=FirstBlockCache(threshold=100.0, max_reused=2))
    for handle in handles:
        handle.remove()
    assert runs == {"first": 6, "last": 2, "refiner": 6}
    assert not any("forward" in vars(module) for module in pipe.dit.modules())


def test_taylor_seer_is_exact_where_the_change_is_a_polynomial() -> None:
    """A stack that adds `step ** order` in every step is extrapolated exactly once its derivatives are known."""
    for order in (0, 1, 2):
        network = Staircase(order)
        session = StepCacheSession(TaylorSeer(interval=4, order=order, warmup_steps=order + 1), [network.stacks()])
        with session:
            for step in range(order + 4):
                with session.forward_pass("cond", is_last=False):
                    got = network(torch.zeros(3), step)
                if order < 2:  # from order 2 on, backward differences are no derivatives any more
                    assert got.tolist() == pytest.approx([2.0 * step**order] * 3)
        assert session.take_reused() == ("cond",) * 3


def test_residuals_between_blocks_are_added_once() -> None:
    """A ControlNet's residuals are part of the change that is repeated, and were added a second time in steps that
    skip blocks. The residual after the last block is no part of it.
    """
    for cache in (TaylorSeer(interval=2, order=0, warmup_steps=1), FirstBlockCache(threshold=100.0)):
        network = Staircase(0, residual=5.0)
        session = StepCacheSession(cache, [network.stacks()])
        with session:
            for step in range(4):
                with session.forward_pass("cond", is_last=False):
                    assert network(torch.zeros(3), step).tolist() == [12.0] * 3
        assert len(session.take_reused()) >= 2


def test_what_is_forgotten_is_not_reused() -> None:
    network = Staircase(0)
    session = StepCacheSession(FirstBlockCache(threshold=100.0), [network.stacks()])
    with session:
        for step in range(4):
            if step == 2:
                session.forget()
            with session.forward_pass("cond", is_last=False):
                network(torch.zeros(3), step)
            assert session.take_reused() == (("cond",) if step in (1, 3) else ())


def test_tea_cache_adds_up_its_polynomial(pipe) -> None:
    """Coefficients that give 0.4 a step, and a threshold of 1: two steps are skipped, the third runs."""
    for signal in ("argument:time_embed", "module:attention_norm1"):
        fitted = TeaCacheSpec(coefficients=(0.0, 0.4), signal=signal)
        report = measure_step_cache(
            pipe, TeaCache(threshold=1.0, fitted=fitted), **without_output({**CALL, "cfg_scale": 1.0})
        )
        assert report.reused == {"cond": (1, 2, 4)}


def test_tea_cache_needs_a_model_that_has_coefficients(pipe) -> None:
    with pytest.raises(Refused, match="this pipeline has no model's name"):
        pipe.check(**CALL, step_cache=TeaCache(threshold=0.1))
    with pytest.raises(Refused, match="nobody has published coefficients for 'z-image-turbo'"):
        pipe.check(**CALL, step_cache="tea:threshold=0.1,model=z-image-turbo")
    fitted = TeaCacheSpec(coefficients=(1.0, 0.0), signal="argument:t")
    model = ModelSpec(name="x", family="x", task="x", pipeline="x:X", components={}, tea_cache=fitted)
    assert TeaCache(threshold=0.1).refuses(model) is None


def test_branches_have_caches_of_their_own(pipe) -> None:
    """One cache for both would compare a branch with the other: at 100 it would skip the second of each pair."""
    guided = measure_step_cache(pipe, FirstBlockCache(threshold=100.0), **without_output(CALL))
    assert guided.reused["cond"] == guided.reused["uncond"] == (1, 2, 3, 4, 5)
    alone = measure_step_cache(pipe, FirstBlockCache(threshold=100.0), **without_output({**CALL, "cfg_scale": 1.0}))
    assert alone.reused == {"cond": (1, 2, 3, 4, 5)}


def test_calls_in_other_threads_do_not_see_it(pipe, truth) -> None:
    results = {}

    def call(name, **arguments):
        results[name] = pipe(**CALL, **arguments)

    threads = [
        threading.Thread(target=call, args=("cached",), kwargs={"step_cache": "first_block:threshold=100"}),
        threading.Thread(target=call, args=("plain",)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["plain"], truth)
    assert not torch.equal(results["cached"], truth)


def test_a_streamed_network_gives_the_same(pipe) -> None:
    cache = FirstBlockCache(threshold=100.0, max_reused=2)
    streamed = tiny_z_image()
    wrap(streamed.dit.requires_grad_(False).eval(), Policy.preset("cpu-offload", "cpu"), smallest=0)
    assert torch.equal(streamed(**CALL, step_cache=cache), pipe(**CALL, step_cache=cache))
    assert managed(streamed.dit) is not None
    assert "forward" in vars(streamed.dit.layers[0])  # the layer that streams weights is still installed


def test_two_streams_in_any_order() -> None:
    """Blocks take `(image, text)` and return `(text, image)` of equal shapes: the next block's arguments show which."""
    network = TwoStreams()
    plain = [network(torch.ones(2), torch.ones(2), step) for step in range(4)]
    session = StepCacheSession(FirstBlockCache(threshold=0.6), [network.stacks()])
    with session:
        for step in range(4):
            with session.forward_pass("cond", is_last=False):
                image, text = network(torch.ones(2), torch.ones(2), step)
            if step > 1:
                assert image.tolist() != text.tolist()
                assert abs(image - plain[step][0]).max() < abs(image - plain[step][1]).max()
    assert session.take_reused()


def test_blocks_that_return_other_tensors_are_refused() -> None:
    stack = Stack("blocks", (nn.Linear(3, 5), nn.Linear(5, 3)))
    session = StepCacheSession(FirstBlockCache(threshold=0.1), [(stack,)])
    with session, session.forward_pass("cond", is_last=False), pytest.raises(Refused, match=r"take \[\(2, 3\)\]"):
        stack.blocks[0](torch.ones(2, 3))


def test_short_stacks_are_left_alone(pipe) -> None:
    assert [stack.name for stack in cached_stacks(pipe.dit)] == ["layers"]
    assert cached_stacks(nn.Linear(2, 2)) == ()


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(Refused, match=r"dit \(ToyNet\) has no repeated blocks"):
        toy_pipeline().check(step_cache="taylor")


def test_a_network_that_streams_blocks_but_cannot_skip_them_is_refused_by_name(monkeypatch) -> None:
    """Every declared list of blocks was taken as one that a step cache may skip, a UNet's with skip connections too."""
    pipe = ToyPipeline({"dit": toy_unet()}, device="cpu", torch_dtype=torch.float32)
    declare(monkeypatch, ToyUnet, "toy_unet", repeated_blocks=LISTS, cached_blocks=())
    message = r"step_cache=TaylorSeer\(.*\) is refused: toy_unet declares no blocks that a step cache may skip"
    with pytest.raises(Refused, match=message):
        pipe.check(step_cache="taylor")


def test_only_the_blocks_declared_for_it_are_skipped(monkeypatch) -> None:
    """The blocks in the middle of a UNet keep the shape; those before and after them run in every step."""
    pipe = ToyPipeline({"dit": toy_unet()}, device="cpu", torch_dtype=torch.float32)
    declare(monkeypatch, ToyUnet, "toy_unet", repeated_blocks=LISTS, cached_blocks=("middle",))
    runs = dict.fromkeys(("down.0", "middle.0", "middle.1", "middle.3", "up.1"), 0)

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    call = {"prompt": "grey", "num_inference_steps": 6, "seed": 0, "output_type": "latents"}
    truth = pipe(**call)
    assert torch.equal(pipe(**call, step_cache=FirstBlockCache(threshold=0)), truth)
    handles = [pipe.dit.get_submodule(name).conv.register_forward_hook(count(name)) for name in runs]
    cached = pipe(**call, step_cache=FirstBlockCache(threshold=100.0, max_reused=2))
    for handle in handles:
        handle.remove()
    assert runs == {"down.0": 6, "middle.0": 6, "middle.1": 2, "middle.3": 2, "up.1": 6}
    assert not torch.equal(cached, truth)


def test_texts() -> None:
    assert parse_step_cache("first_block:threshold=0.1,max_reused=3") == FirstBlockCache(threshold=0.1, max_reused=3)
    assert parse_step_cache("taylor") == TaylorSeer()
    assert parse_step_cache("tea:threshold=0.2,model=wan2.1-t2v-14b") == TeaCache(threshold=0.2, model="wan2.1-t2v-14b")
    for text, message in {
        "first_blok": "did you mean 'first_block'",
        "first_block": "first_block needs threshold",
        "first_block:treshold=1": "did you mean 'threshold'",
        "first_block:threshold=-1": "at least 0",
        "taylor:order=9": "from 0 to 4",
    }.items():
        with pytest.raises(ValueError, match=message):
            parse_step_cache(text)
    with pytest.raises(TypeError, match="expected a StepCache"):
        parse_step_cache(0.1)


def test_the_command_line_takes_a_text() -> None:
    from diffsynth.cli.group import program

    line = ["generate", "z-image-turbo", "a cat", "-o", "x.png", "--set", "step_cach=taylor"]
    result = CliRunner().invoke(program, line)
    assert result.exit_code != 0
    assert "did you mean 'step_cache'" in result.output


def without_output(arguments):
    return {name: value for name, value in arguments.items() if name != "output_type"}


class Staircase(nn.Module):
    """Two blocks, each adding `step ** order`, and a residual that is added after each."""

    def __init__(self, order: int, residual: float = 0.0) -> None:
        super().__init__()
        self.residual = residual
        self.blocks = nn.ModuleList([Adding(order), Adding(order)])

    def stacks(self):
        return (Stack("blocks", tuple(self.blocks)),)

    def forward(self, x, step):
        for block in self.blocks:
            x = block(x, step) + self.residual
        return x


class Adding(nn.Module):
    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x, step):
        return x + float(step) ** self.order


class Swapping(nn.Module):
    def forward(self, image, text, step):
        return text + 10 + step, image + 1 + 0.1 * step


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Swapping() for _ in range(3))

    def stacks(self):
        return (Stack("blocks", tuple(self.blocks)),)

    def forward(self, image, text, step):
        for block in self.blocks:
            text, image = block(image, text, step)
        return image, text
