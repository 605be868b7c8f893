"""Memory that a meta trace counts against real allocations, and the values that it knows inside a model."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffsynth.core.planning.allocations import kernel_workspace
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.errors import Unplannable


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def on_meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def trace(run, device_type="cuda", components=None, blocks=None):
    with MetaTracer(device_type, components or {}, blocks) as tracer, tracer.stage("stage") as stage:
        run()
    return stage


def real_peak(run):
    """Return the peak that torch's profiler recorded of its allocator on the CPU: a second way to count."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        kept = run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del kept
    return max(live)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.conv = nn.Conv2d(64, 64, 3, padding=1)

    def forward(self, x):
        kept = F.gelu(x)
        for block in self.blocks:
            x = x + block(F.layer_norm(x, (64,))).chunk(2, dim=0)[0].repeat(2, 1, 1)
        image = self.conv((x + kept).transpose(1, 2).reshape(2, 64, 16, 16))
        return image.flatten(2)[:, :, :10]


def test_tensors_on_the_cpu_have_their_values_each_time():
    """The second result of a factory once was a tensor of the same shape without values."""
    seen = []

    def run():
        for _ in range(3):
            positions = torch.arange(5)
            on_meta(5) + positions.to("meta")
            seen.append((positions.tolist(), torch.zeros(2, 2).tolist(), torch.full((3,), 7).tolist()))

    trace(run)
    assert seen == [([0, 1, 2, 3, 4], [[0, 0], [0, 0]], [7, 7, 7])] * 3


def test_live_bytes_are_those_of_a_real_run():
    net, x = Net(), torch.randn(2, 256, 64)
    with torch.device("meta"):
        on_meta_net = Net()
    net.conv = on_meta_net.conv = nn.Identity()  # its workspace is another test's
    stage = trace(lambda: on_meta_net(x.to("meta")), components={"net": on_meta_net})
    real = real_peak(lambda: net(x.clone()))
    assert stage.device_bytes == pytest.approx(real, rel=0.01)


def test_tensors_on_the_host_are_counted_there():
    """Keys and values of a reference video were counted on the device although a call had moved them to the host."""

    def run():
        first = (on_meta(1024) + 1).cpu()
        second = (on_meta(1024) + 1).cpu()
        return first.to("meta", copy=True), second

    stage = trace(run)
    assert (stage.device_bytes, stage.host_bytes) == (2 * 4096, 2 * 4096)


def test_blocks_are_noted_with_their_operations():
    with torch.device("meta"):
        net = Net()
    blocks = {"net": {f"blocks.{index}": block for index, block in enumerate(net.blocks)}}
    stage = trace(lambda: net(on_meta(2, 256, 64)), components={"net": net}, blocks=blocks)
    assert [(call.role, call.block) for call in stage.block_calls] == [("net", f"blocks.{index}") for index in range(3)]
    assert {call.flops for call in stage.block_calls} == {2 * 512 * 64 * 64}
    assert stage.flops == 3 * 2 * 512 * 64 * 64 + 2 * 2 * 64 * 64 * 9 * 256
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in net.blocks)


def test_hooks_and_modes_are_gone_after_an_error():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(RuntimeError, match="of the model"):
        trace(_raise, components={"net": net}, blocks={"net": {"conv": net.conv}})
    assert not net.conv._forward_hooks
    assert torch.arange(3).tolist() == [0, 1, 2]
    with pytest.raises(Exception, match="meta"):
        torch.arange(3, device="meta").tolist()


def _raise():
    raise RuntimeError("of the model")


def test_stages_have_peaks_of_their_own():
    with MetaTracer("cuda", {}) as tracer:
        with tracer.stage("first"):
            kept = on_meta(1024)
            on_meta(1024 * 1024)
        with tracer.stage("second"):
            kept + 1
    assert [stage.device_bytes for stage in tracer.stages] == [4096 * 1025, 2 * 4096]


VALUES = {
    "made": (lambda: torch.tensor([3, 1], device="meta").tolist(), [3, 1]),
    "moved": (lambda: torch.tensor([3, 1]).to("meta").to("cpu").numpy().tolist(), [3, 1]),
    "computed": (lambda: (torch.arange(4, device="meta") * 2).sum().item(), 12),
    "of a mask": (lambda: bool((torch.ones(2, 3, device="meta") > 0).all()), True),
    "written through a view": (lambda: _filled(torch.zeros(2, 2, device="meta")).tolist(), [[0, 7], [0, 7]]),
    "nonzero": (lambda: torch.tensor([0, 5, 0, 6], device="meta").nonzero().tolist(), [[1], [3]]),
    "indexed by a mask": (lambda: _masked(on_meta(4, 9)).shape, (2, 9)),
    "repeated": (lambda: on_meta(2, 3).repeat_interleave(torch.tensor([2, 1], device="meta"), 0).shape, (3, 3)),
    "beside the host": (lambda: (on_meta(4) + torch.ones(4)).is_meta, True),
    "copied to the host": (lambda: _into_host(), (4,)),
    "as a branch": (lambda: 1 if torch.tensor([2.5], device="meta") > 2 else 0, 1),
}


def _filled(tensor):
    tensor[:, 1] = 7
    return tensor


def _masked(tensor):
    return tensor[torch.tensor([True, False, True, False]).to("meta")]


def _into_host():
    return torch.zeros(4).copy_(on_meta(4)).shape


@pytest.mark.parametrize("name", VALUES)
def test_small_values_that_follow_from_arguments_are_known(name):
    run, expected = VALUES[name]
    answers = []
    trace(lambda: answers.append(run()))
    assert answers == [expected]


UNKNOWN = {
    "of a weight": lambda: on_meta(3).sum().item(),
    "overwritten": lambda: torch.zeros(3, device="meta").copy_(on_meta(3)).tolist(),
    "drawn": lambda: torch.rand(3, device="meta").max().item(),
    "unfilled": lambda: torch.empty(3, device="meta").max().item(),
    "seen through a view": lambda: _unknown_below(torch.zeros(2, 2, device="meta")).item(),
    "indexed by a mask of weights": lambda: on_meta(4)[on_meta(4) > 0],
}


def _unknown_below(tensor):
    tensor[1] = on_meta(2)
    return tensor.sum()


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_value_that_depends_on_weights_cannot_be_planned(name):
    with pytest.raises((Unplannable, NotImplementedError), match=r"weights or pixels|meta"):
        trace(UNKNOWN[name])


@pytest.mark.parametrize(
    "attend",
    [
        lambda q: F.scaled_dot_product_attention(q, q, q),
        lambda q: F.scaled_dot_product_attention(query=q, key=q, value=q),  # as diffusers does
    ],
)
def test_attention_allocates_no_scores_in_any_calling_form(attend):
    q = on_meta(1, 8, 4096, 64, dtype=torch.bfloat16)
    stage = trace(lambda: attend(q))
    assert stage.device_bytes == 2 * q.numel() * 2 + 4 * 8 * 4096
    assert stage.flops == 4 * 8 * 4096 * 4096 * 64


def test_workspaces_of_convolutions_on_the_cpu():
    """Measured with VmHWM: 128 channels of 512x512 take the output once more, 256 to 128 the input, one pixel none."""
    conv = torch.ops.aten.convolution.default

    def size(c_in, c_out, kernel=3, **options):
        x = torch.empty(1, c_in, 512, 512, device="meta").to(**options)
        weight = on_meta(c_out, c_in, kernel, kernel)
        return kernel_workspace(conv, (x, weight), on_meta(1, c_out, 512, 512), "cpu") / 2**20

    assert size(128, 128) == pytest.approx(128, abs=1)
    assert size(256, 128) == pytest.approx(256, abs=2)
    assert size(128, 3) == pytest.approx(128 + 8 - 3, abs=1)
    assert size(128, 128, kernel=1) == 0
    assert size(128, 128, memory_format=torch.channels_last) == 0


def test_rms_norm_is_one_kernel_on_accelerators():
    x = on_meta(64, 1024)
    on_gpu = trace(lambda: F.rms_norm(x, (1024,)))
    on_cpu = trace(lambda: F.rms_norm(x, (1024,)), device_type="cpu")
    assert on_gpu.device_bytes == x.numel() * 4 < on_cpu.device_bytes
