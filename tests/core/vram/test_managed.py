"""Wrapping changes no bit of a result, leaves nothing behind, and refuses what it could not keep."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.core.vram.networks import Tower, tower
from tests.core.vram.sources import emptied, on_disk
from torch import Tensor, nn

from diffsynth.core.vram.managed import ManagedModule, managed, wrap
from diffsynth.core.vram.policy import DISK, BlockState, Placement, Policy
from toy_unet import LISTS, toy_unet

TOKENS = torch.arange(12).view(2, 6)
HOST = Policy.preset("cpu-offload", "cpu")
STREAMED = Policy.preset("disk", "cpu")
SMALL_STORAGE = Policy.preset("fp8", "cpu", torch.float32)


def on(policy: Policy, folder: Path, *, module: nn.Module | None = None, **cuts: object) -> tuple[Any, ManagedModule]:
    module = tower() if module is None else module
    source = None
    if policy.offload.on_disk or policy.onload.on_disk:
        source = on_disk(module, folder)
        emptied(module)
    return module, wrap(module, policy, source=source, smallest=0, **cuts)


def lowered(module: Tower, keep: tuple[str, ...] = ()) -> Tower:
    """Round the weights of a module as storage in fp8 does."""
    for name, parameter in module.named_parameters():
        if not any(part in name for part in keep):
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    return module


@pytest.mark.parametrize(
    "policy",
    [
        Policy.preset("none", "cpu"),
        HOST,
        STREAMED,
        Policy(Placement(DISK), Placement("cpu"), Placement("cpu"), Placement("cpu")),
        Policy(Placement("cpu"), Placement("cpu"), Placement("cpu"), Placement("cpu", torch.float64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrapping_changes_no_bit(policy: Policy, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = tower(dtype).to(policy.computation.dtype or dtype)(TOKENS)
    module, wrapped = on(policy, tmp_path, module=tower(dtype))
    for _ in range(3):
        with wrapped:
            assert torch.equal(module(TOKENS), expected)
    assert torch.equal(module(TOKENS), expected), "without `with` it enters by itself"


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("resident", [(), ("layers.1", "layers.4"), None])
def test_what_stays_and_how_far_ahead_changes_no_bit(
    slots: int, resident: tuple[str, ...] | None, tmp_path: Path
) -> None:
    expected = tower()(TOKENS)
    module, wrapped = on(STREAMED, tmp_path)
    wrapped.configure(resident=resident, slots=slots)
    with wrapped:
        for _ in range(3):
            assert torch.equal(module(TOKENS), expected)


@pytest.mark.parametrize("slots", [1, 2, 9])
@pytest.mark.parametrize("resident", [(), ("down.1", "up.0"), None])
@pytest.mark.parametrize("policy", [HOST, STREAMED], ids=str)
def test_a_list_may_hold_unlike_blocks(
    policy: Policy, resident: tuple[str, ...] | None, slots: int, tmp_path: Path
) -> None:
    """Blocks of a UNet differ in class, shape and arguments, and pass tensors on to blocks that run much later."""
    inputs = [(torch.randn(2, 1, *size), torch.tensor([0.2, 0.9]), torch.ones(2)) for size in ((8, 8), (5, 7))]
    expected = [toy_unet()(*values) for values in inputs]
    module, wrapped = on(policy, tmp_path, module=toy_unet(), repeated=LISTS)
    assert {"down.0", "down.1", "middle.3", "up.0", "up.1"} <= set(wrapped.blocks)
    wrapped.configure(resident=resident, slots=slots)
    with wrapped:
        for _ in range(2):
            assert all(torch.equal(module(*values), result) for values, result in zip(inputs, expected, strict=True))


def test_storage_in_fp8_is_rounding_each_weight_once(tmp_path: Path) -> None:
    expected = lowered(tower())(TOKENS)
    module, wrapped = on(SMALL_STORAGE, tmp_path)
    for resident in ((), None):
        wrapped.configure(resident=resident, slots=2)
        with wrapped:
            assert torch.equal(module(TOKENS), expected)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float8_e4m3fn}


def test_high_precision_layers_are_not_lowered() -> None:
    expected = lowered(tower(), keep=("norm", "final.0"))(TOKENS)
    module = tower()
    wrap(module, SMALL_STORAGE, smallest=0, high_precision=("*norm*", "final.0.*"))
    assert torch.equal(module(TOKENS), expected)


def test_blocks_in_another_order_are_right_and_prefetched(tmp_path: Path) -> None:
    module, plain = tower(), tower()
    _, wrapped = on(STREAMED, tmp_path, module=module)
    for each in (module, plain):
        each.layers = nn.ModuleList(reversed(list(each.layers)))
    wrapped.configure(resident=(), slots=2)
    with wrapped:
        for _ in range(2):
            assert torch.equal(module(TOKENS), plain(TOKENS))
        wrapped.report.clear()
        module(TOKENS)
        assert wrapped.report.misses == 0
    assert wrapped.report.bytes_moved > 0


def test_every_block_is_copied_before_it_is_called(tmp_path: Path) -> None:
    module, wrapped = on(STREAMED, tmp_path)
    wrapped.configure(resident=(), slots=2)
    with wrapped:
        for _ in range(4):
            module(TOKENS)
    assert wrapped.report.misses == 0
    assert wrapped.report.hits == 4 * len(wrapped.blocks)
    assert "hidden" in str(wrapped.report)


def test_buffers_that_forward_writes_are_kept(tmp_path: Path) -> None:
    module, wrapped = on(STREAMED, tmp_path)
    with wrapped:
        module(TOKENS)
        module(TOKENS)
    assert [int(layer.calls) for layer in module.layers] == [2] * 6


def test_tied_weights_stay_one() -> None:
    module = tower()
    wrapped = wrap(module, HOST, smallest=0)
    with wrapped:
        assert module.head.weight is module.embed.weight
    assert wrapped.unwrap() is module
    assert module.head.weight is module.embed.weight


def test_a_weight_that_a_block_gives_out_is_its_own(tmp_path: Path) -> None:
    """A block returned its own weight, and the next block's weights were found in it. Outputs that lie in a slot are
    copied."""

    class Giver(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self) -> dict[str, Tensor]:
            return {"weight": self.weight[1:]}

    class Givers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Giver() for _ in range(4))

        def forward(self) -> list[Tensor]:
            return [layer()["weight"] for layer in self.layers]

    module = Givers().requires_grad_(False)
    expected = [tensor.clone() for tensor in module()]
    source = on_disk(module, tmp_path)
    wrapped = wrap(emptied(module), STREAMED, source=source, smallest=0)
    wrapped.configure(resident=(), slots=2)
    with wrapped:
        got = module()
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    others = set(threading.enumerate())  # of modules that other tests did not leave
    module, wrapped = on(STREAMED, tmp_path)
    expected = tower()(TOKENS)
    wrapped.configure(resident=(), slots=3)

    def stop(*_: object) -> None:
        raise error

    hook = module.layers[2].up.register_forward_pre_hook(stop)
    with pytest.raises(error), wrapped:
        module(TOKENS)
    hook.remove()
    assert wrapped.state is BlockState.OFFLOAD
    assert wrapped.device_bytes == 0
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("diffsynth-vram")]
    with wrapped:
        assert torch.equal(module(TOKENS), expected)


def test_a_file_that_changes_is_noticed_and_the_block_is_not_kept(tmp_path: Path) -> None:
    module, wrapped = on(STREAMED, tmp_path)
    wrapped.configure(resident=(), slots=1)
    with wrapped:
        module(TOKENS)
        file = tmp_path / "model.safetensors"
        kept = file.read_bytes()
        file.write_bytes(kept[:-64])
        with pytest.raises(Exception, match="changed"):
            module(TOKENS)


def test_unwrap_gives_an_ordinary_module_back() -> None:
    module = tower()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    wrapped = wrap(module, HOST, smallest=0)
    assert managed(module) is wrapped
    module(TOKENS)
    wrapped.unwrap()
    assert managed(module) is None
    assert "forward" not in vars(module)
    assert "forward" not in vars(module.layers[0])
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    assert torch.equal(module(TOKENS), tower()(TOKENS))


def test_what_comes_for_the_stage_is_timed_by_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The host's clock saw pinned copies being asked for, not made: the report told of 10 TB/s."""

    class Moment:
        made = 0

        def __init__(self) -> None:
            Moment.made += 1
            self.number = Moment.made

        def seconds_since(self, earlier: "Moment") -> float:
            return 100.0 * (self.number - earlier.number)

    _, wrapped = on(STREAMED, tmp_path)
    monkeypatch.setattr("diffsynth.core.device.timestamp", lambda device: Moment())
    with wrapped:
        report = wrapped.report.settle()
        count = len(wrapped.blocks) + 1
        assert 100 * count <= report.seconds_copying < 100 * count + 5
        assert 100 * count <= report.seconds_waited < 100 * count + 5


def test_a_wrapped_module_is_freed() -> None:
    import weakref

    module = tower()
    wrapped = wrap(module, HOST, smallest=0)
    seen = weakref.ref(module)
    del module, wrapped
    gc.collect()
    assert seen() is None


def test_threads_take_turns(tmp_path: Path) -> None:
    module, wrapped = on(STREAMED, tmp_path)
    wrapped.configure(resident=("layers.0",), slots=2)
    inputs = [TOKENS + shift for shift in range(6)]
    expected = [tower()(tokens) for tokens in inputs]
    got: dict[int, Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            got[index] = module(inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    with wrapped:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(got[index], expected[index]) for index in range(6))


def test_storage_order_survives() -> None:
    """Channels-last convolutions take another kernel than contiguous ones, so strides are part of the bits."""
    module = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3)).requires_grad_(False)
    module = module.to(memory_format=torch.channels_last)
    x = torch.randn(1, 8, 9, 9).to(memory_format=torch.channels_last)
    expected = module(x)
    wrap(module, HOST, whole=(nn.Conv2d,), smallest=0)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(module(x), expected)


def test_what_cannot_be_kept_is_refused_before_anything_moves() -> None:
    with pytest.raises(ValueError, match="block by block.*offload_device='cpu'"):
        wrap(tower(), STREAMED)
    with pytest.raises(ValueError, match="start requires gradients"):
        wrap(tower().requires_grad_(True), HOST)
    module = tower()
    wrapped = wrap(module, HOST, smallest=0)
    with pytest.raises(ValueError, match="wrapped already"):
        wrap(module, HOST)
    with pytest.raises(ValueError, match=r"'layers\.77'"):
        wrapped.configure(resident=("layers.77",), slots=2)
    with pytest.raises(ValueError, match="slots=0"):
        wrapped.configure(resident=None, slots=0)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="gradient"):
        module.layers[0](torch.randn(1, 32, requires_grad=True))
