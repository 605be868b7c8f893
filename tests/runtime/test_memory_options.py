"""Every policy on a tiny model: images are equal to those without a policy."""

from __future__ import annotations

import logging

import pytest
import torch

import diffsynth
from diffsynth.core.loader import component
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.vram.managed import managed
from diffsynth.runtime import architectures
from diffsynth.runtime.memory_options import MemoryOptions
from diffsynth.runtime.progress import no_progress
from diffsynth.testing import tiny_hub
from diffsynth_zimage.pipeline import ZImagePipeline
from limited import let_blocks_travel

CALL = {"num_inference_steps": 2, "height": 64, "width": 96, "output_type": "tensor", "progress_bar_cmd": no_progress}
KEYS = ("offload", "onload", "preparing", "computation")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_hub(root, "z-image-turbo")
    return root


@pytest.fixture(autouse=True)
def every_block_travels(monkeypatch):
    let_blocks_travel(monkeypatch)


def loaded(hub, device="cpu", **memory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
        patch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
        return diffsynth.load("z-image-turbo", device=device, torch_dtype=torch.float32, **memory)


def images(pipe):
    batch = pipe(["a red apple", "two pears on a table"], seed=[3, 4], cfg_scale=2.5, negative_prompt="blue", **CALL)
    return torch.cat([batch, pipe("one", seed=5, **CALL)])


@pytest.fixture(scope="module")
def expected(hub):
    return images(loaded(hub))


@pytest.mark.parametrize("policy", ["none", "cpu-offload", "dynamic", "disk", {"dit": "disk", "vae": "cpu-offload"}])
def test_a_policy_changes_no_bit(hub, expected, policy):
    pipe = loaded(hub, policy=policy)
    for _ in range(2):
        assert torch.equal(images(pipe), expected)
    if policy == "disk":
        assert all(parameter.is_meta for parameter in pipe.text_encoder.parameters())
        assert pipe.transfers["dit"].bytes_moved > 0


@pytest.mark.parametrize("resident", [(), ("layers.0",)])
@pytest.mark.parametrize("slots", [1, 2])
def test_streaming_changes_no_bit(hub, expected, resident, slots):
    pipe = loaded(hub, policy="disk")
    managed(pipe.dit).configure(resident=resident, slots=slots)
    managed(pipe.text_encoder).configure(resident=(), slots=slots)
    managed(pipe.vae).configure(resident=(), slots=slots)
    images(pipe)
    pipe.transfers["dit"].clear()
    assert torch.equal(images(pipe), expected)
    assert pipe.transfers["dit"].hits > 0
    assert (pipe.transfers["dit"].misses == 0) == (slots > 1), "the order of blocks is known from the first call"


def test_fp8_rounds_each_weight_once_but_those_of_high_precision(hub, expected):
    by_hand = loaded(hub)
    for role in ("dit", "text_encoder", "vae"):
        exact = architectures.architecture_of(by_hand.components[role]).high_precision
        patterns = tuple(pattern.replace("*", "") for pattern in exact)
        for name, parameter in by_hand.components[role].named_parameters():
            if not any(part in name for part in patterns):
                parameter.data = parameter.data.to(torch.float8_e4m3fn).to(torch.float32)
    got = images(loaded(hub, policy="fp8"))
    assert torch.equal(got, images(by_hand))
    assert not torch.equal(got, expected)


def test_the_eight_keys_of_a_config_are_its_policy(hub, expected):
    keys = {f"{state}_device": "cpu" for state in KEYS} | {f"{state}_dtype": torch.float32 for state in KEYS}
    keys |= {"offload_device": "disk", "offload_dtype": "disk", "onload_device": "disk", "onload_dtype": "disk"}
    record = diffsynth.registry.get("z-image-turbo")
    pipe = ZImagePipeline.from_pretrained(
        torch_dtype=torch.float32,
        device="cpu",
        model_configs=[
            ModelConfig.from_source(source, local_model_path=hub, skip_download=True, **keys)
            for source in record.components.values()
        ],
        tokenizer_config=ModelConfig.from_source(
            record.processors["tokenizer"], local_model_path=hub, skip_download=True
        ),
        vram_limit=0,
    ).named(record.name, record.defaults)
    assert managed(pipe.dit).policy.onload.on_disk
    assert torch.equal(images(pipe), expected)


def test_pipelines_that_share_a_component_share_its_memory(hub, expected):
    first = loaded(hub, policy="cpu-offload")
    second = ZImagePipeline(dict(first.components), device="cpu", torch_dtype=torch.float32, policy="cpu-offload")
    second.named("z-image-turbo", {"num_inference_steps": 8})
    assert managed(second.text_encoder) is managed(first.text_encoder)
    assert torch.equal(images(second), expected)
    assert torch.equal(images(first), expected)


def test_cancelling_leaves_nothing_on_the_device(hub):
    import threading

    from diffsynth.errors import Cancelled

    pipe = loaded(hub, policy="disk")
    cancel = threading.Event()
    with pytest.raises(Cancelled):
        pipe("one", seed=5, cancel=cancel, on_step=lambda step: cancel.set(), **CALL)
    assert all(part.device_bytes == 0 for part in map(managed, (pipe.dit, pipe.text_encoder, pipe.vae)))


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"policy": "cpu-ofload"}, "did you mean 'cpu-offload'"),
        ({"policy": {"dot": "disk"}}, "did you mean 'dit'"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"vram_limit": -1}, "vram_limit=-1: expected GiB of at least 0"),
        ({"vram_limit": float("nan")}, "vram_limit=nan: expected GiB of at least 0"),
        ({"vram_limit": "8"}, "vram_limit='8': expected GiB of at least 0"),
    ],
)
def test_what_cannot_be_is_refused_before_loading(hub, memory, message, monkeypatch):

    monkeypatch.setattr(component, "materialize", None)
    with pytest.raises(ValueError, match=message):
        loaded(hub, **memory)


def test_a_role_that_is_to_stay_is_not_wrapped_by_the_limit(hub, monkeypatch):
    """The policy of a role was read while loading and forgotten afterwards. Then the limit wrapped what was to stay."""
    from diffsynth.runtime import pipeline

    options = []
    monkeypatch.setattr(pipeline, "MemoryOptions", lambda *args: options.append(MemoryOptions(*args)) or options[-1])
    loaded(hub, policy={"vae": "none"})
    assert options == [MemoryOptions(torch.device("cpu"), torch.float32, None, {"vae": "none"})]


def test_a_limit_below_one_block_is_refused_before_loading(hub, monkeypatch):
    from diffsynth.core import device as devices
    from diffsynth.errors import NotEnoughMemory

    monkeypatch.setattr(devices, "check_device", torch.device)
    monkeypatch.setattr(component, "materialize", None)
    with pytest.raises(NotEnoughMemory, match=r"vram_limit=0\.001 GiB: dit takes 0\.\d+ GiB for its largest block"):
        loaded(hub, device="cuda:0", vram_limit=0.001)


def test_a_limit_that_nothing_is_under_is_said_to_have_no_effect(hub, caplog):
    with caplog.at_level(logging.WARNING):
        loaded(hub, vram_limit=1.0)
    assert "vram_limit=1.0 has no effect" in caplog.text


def test_a_pickle_is_not_read_block_by_block(hub, tmp_path):
    record = diffsynth.registry.get("z-image-turbo")
    pipe = loaded(hub)
    torch.save(pipe.vae.state_dict(), tmp_path / "vae.pth")
    with pytest.raises(ValueError, match=r"safetensors.*diffsynth convert .*vae\.pth -o model\.safetensors"):
        ZImagePipeline.from_pretrained(
            torch_dtype=torch.float32,
            device="cpu",
            policy="disk",
            model_configs=[
                *(
                    ModelConfig.from_source(record.components[role], local_model_path=hub, skip_download=True)
                    for role in ("dit", "text_encoder")
                ),
                ModelConfig(path=tmp_path / "vae.pth"),
            ],
            tokenizer_config=ModelConfig.from_source(
                record.processors["tokenizer"], local_model_path=hub, skip_download=True
            ),
        )
