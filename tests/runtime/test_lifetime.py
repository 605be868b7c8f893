"""Pipelines that are moved, released, and warmed up."""

import threading
import weakref

import pytest
import torch
from torch import nn

import diffsynth
from diffsynth import _discovery
from diffsynth.errors import NotEnoughMemory, PipelineError
from diffsynth.runtime import lifetime
from limited import keep_limit
from tiny_z_image import tiny_z_image
from toy_pipeline import ToyNet, ToyPipeline, toy_pipeline

CALL = {"seed": 0, "height": 32, "width": 32, "num_inference_steps": 1, "cfg_scale": 1.0, "output_type": "tensor"}


def nano(dtype=torch.float32, **options):
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=dtype, **options)


def modules(pipe):
    return [part for part in pipe.parts.values() if isinstance(part, nn.Module)]


class Rotary(nn.Module):
    """A network with a table that no file holds, and statistics that files hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = self.tied = nn.Parameter(torch.rand(3))
        self.register_buffer("table", torch.rand(3), persistent=False)
        self.register_buffer("mean", torch.rand(3))
        self.register_buffer("count", torch.ones((), dtype=torch.int64))


@pytest.fixture(scope="module")
def free():
    """A pipeline under no policy, which tests do not change."""
    return nano()


def test_a_moved_pipeline_equals_one_loaded_there():
    pipe, loaded = nano(), nano(torch.bfloat16)
    assert pipe.to(dtype=torch.bfloat16) is pipe
    assert pipe.dtype == torch.bfloat16
    for role, part in loaded.parts.items():
        if isinstance(part, nn.Module):
            for name, tensor in (*part.named_parameters(), *part.named_buffers()):
                assert torch.equal(tensor, pipe.parts[role].get_parameter(name)), (role, name)
    call = CALL | {"output_type": "latents"}  # many CPUs convolve bf16 slowly
    assert torch.equal(pipe("a red apple", **call), loaded("a red apple", **call))
    assert pipe.to() is pipe
    assert pipe.to("cpu", torch.float32).dtype == torch.float32


def test_tables_keep_their_dtype_and_tied_weights_stay_tied():
    """`from_components` gave tables of angles the dtype of the weights, which loading does not."""
    module = Rotary()
    table = module.table.clone()
    lifetime.move(module, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(module.table, table)
    assert module.weight is module.tied
    assert [each.dtype for each in (module.weight, module.mean, module.count)] == [torch.bfloat16] * 2 + [torch.int64]
    pipe = ToyPipeline.from_components(dit=module, device="cpu", torch_dtype=torch.float16)
    assert (pipe.dit.weight.dtype, pipe.dit.table.dtype) == (torch.float16, torch.float32)


def test_moves_that_are_refused(monkeypatch):
    pipe = toy_pipeline()
    for arguments, error, message in (
        (("cdua",), ValueError, "device 'cdua'.*did you mean 'cuda'"),
        ((3.5,), ValueError, "device 3.5: expected a name"),
        ((None, torch.int8), TypeError, "dtype=torch.int8"),
        ((None, "bfloat16"), TypeError, "dtype='bfloat16'"),
        ((torch.bfloat16,), TypeError, "pass it as dtype=torch.bfloat16"),
    ):
        with pytest.raises(error, match=message):
            pipe.to(*arguments)
    with pytest.raises(PipelineError, match=r"to\(\) changes the weights, and a call"):
        pipe("abc", on_step=lambda step: pipe.to(dtype=torch.bfloat16))
    assert (pipe.dtype, pipe.dit.gain.dtype) == (torch.float32, torch.float32)
    limited = ToyPipeline({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32, vram_limit=1)
    with pytest.raises(PipelineError, match="ToyPipeline has vram_limit=1, which moves its weights. Load it again"):
        limited.to(dtype=torch.bfloat16)
    with pytest.raises(PipelineError, match="has dit, text_encoder, vae under a memory policy"):
        nano(policy="disk").to(dtype=torch.bfloat16)
    monkeypatch.setattr(lifetime.devices, "check_device", torch.device)
    monkeypatch.setattr(lifetime.devices, "available_memory", lambda device: 3)
    with pytest.raises(NotEnoughMemory, match=r"to\('meta'\): the components need .* Nothing was moved"):
        pipe.to("meta")
    assert pipe.device.type == pipe.dit.gain.device.type == "cpu"


@pytest.mark.parametrize("policy", [None, "disk"])
def test_unload_releases_the_components(policy):
    pipe = nano(policy=policy)
    pipe("a red apple", **CALL)
    keep_limit(pipe, 1.0)
    kept = [weakref.ref(each) for part in modules(pipe) for each in (part, next(part.parameters()))]
    assert len(kept) == 6
    pipe.unload()
    assert [each() for each in kept] == [None] * 6
    assert pipe.transfers == {}
    pipe.unload()
    again = r"this ZImagePipeline was unloaded. Load it again: diffsynth.load\('z-image-nano'\)"
    for use in (lambda: pipe("a red apple"), pipe.check, pipe.plan, lambda: pipe.dit, pipe.to, pipe.clear_lora):
        with pytest.raises(PipelineError, match=again):
            use()
    assert "prompt" in pipe.schema()["properties"]


def test_components_of_another_pipeline_stay(free):
    expected = free("a red apple", **CALL)
    with type(free).from_components(**free.components, device="cpu", torch_dtype=torch.float32) as other:
        assert torch.equal(other("a red apple", **CALL), expected)
    with pytest.raises(PipelineError, match=r"was unloaded. Load it again: ZImagePipeline.from_pretrained\(...\)"):
        other("a red apple", **CALL)
    assert torch.equal(free("a red apple", **CALL), expected)


def test_unload_waits_for_no_call():
    pipe, inside, leave = toy_pipeline(), threading.Event(), threading.Event()

    def hold(step):
        inside.set()
        leave.wait(10)

    thread = threading.Thread(target=lambda: pipe("abc", on_step=hold), name="worker")
    thread.start()
    inside.wait(10)
    with pytest.raises(PipelineError, match=r"unload\(\) .* runs in thread worker"):
        pipe.unload()
    leave.set()
    thread.join()
    pipe.unload()


def test_a_warmup_runs_two_steps_and_changes_no_bit(free, monkeypatch):
    notified, steps = [], []
    monkeypatch.setattr(_discovery, "notify", lambda hook, **facts: notified.append(hook))
    expected = free("a red apple", **CALL)
    state = torch.get_rng_state()
    notified.clear()
    assert free.warmup(height=32, width=32, on_step=steps.append) is None
    assert [(step.index, step.num_steps) for step in steps] == [(0, 2), (1, 2)]
    free.warmup(height=32, width=32, num_inference_steps=3, on_step=steps.append)
    assert len(steps) == 5
    assert notified == []
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(free("a red apple", **CALL), expected)
    assert "step_done" in notified
    with pytest.raises(TypeError, match="unknown argument 'heigth'; did you mean 'height'"):
        free.warmup(heigth=32)


def test_a_warmup_makes_the_plan_of_the_whole_call():
    pipe, size = tiny_z_image(), {"height": 32, "width": 32, "output_type": "latents"}
    plans = keep_limit(pipe, 1.0)
    pipe.warmup(**size)
    assert [stage.steps for stage in plans[0].loop] == [pipe.loop.num_inference_steps]
    pipe("a red apple", seed=7, **size)
    assert len(plans) == 1


def test_load_warms_up(monkeypatch):
    given = []
    monkeypatch.setattr(lifetime.LifetimeMethods, "warmup", lambda self, **call: given.append(call))
    nano()
    nano(warmup=True)
    nano(warmup={"height": 32})
    rest = {"on_progress": None, "cancel": None}
    assert given == [rest, {**rest, "height": 32}]
    with pytest.raises(TypeError, match="warmup=3: expected True, False, or a dict"):
        nano(warmup=3)
