"""Plans of Z-Image from its published layout without weights, and plans of pipelines compared with measurements."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner

from diffsynth import registry
from diffsynth.cli.group import program
from diffsynth.core.loader.component import build
from diffsynth.core.planning import Speeds
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.errors import NotEnoughMemory, Unplannable
from diffsynth.models.checkpoints import FLUX_AUTOENCODER, QWEN3_TEXT_ENCODER
from diffsynth.models.config import TINY_FLUX_AUTOENCODER, TINY_QWEN3_TEXT_ENCODER
from diffsynth.runtime import meta_components, planning
from diffsynth.runtime.meta_components import FixedLengthTokenizer
from diffsynth_zimage import ZImagePipeline
from diffsynth_zimage.checkpoints import ARCHITECTURES
from diffsynth_zimage.config import TINY_DIT
from limited import keep_limit

GIB = 2**30
SIZE = {"height": 64, "width": 48}


@pytest.fixture(autouse=True)
def _known_speeds(monkeypatch):
    """Speeds are not measured."""
    monkeypatch.setattr(planning, "_speeds", lambda device, dtype: Speeds(25e9, 100e12, 3e9))


@pytest.fixture(scope="module")
def tiny():
    """Return a pipeline with random weights on the CPU."""
    text = dataclasses.replace(TINY_QWEN3_TEXT_ENCODER, hidden_size=TINY_DIT.cap_feat_dim)
    parts = {
        "dit": build(ARCHITECTURES[0], TINY_DIT),
        "text_encoder": build(QWEN3_TEXT_ENCODER, text),
        "vae": build(FLUX_AUTOENCODER, TINY_FLUX_AUTOENCODER),
    }
    for part in parts.values():
        part.to_empty(device="cpu").eval().requires_grad_(False)
        for parameter in part.parameters():
            parameter.normal_(std=0.02)
    return ZImagePipeline(parts | {"tokenizer": FixedLengthTokenizer(40)}, device="cpu", torch_dtype=torch.float32)


def test_a_pipeline_is_planned_by_its_own_code_and_left_as_it_was(tiny):
    before = {role: {name: one.data_ptr() for name, one in tiny.components[role].named_parameters()}
              for role in ("dit", "vae")}  # fmt: skip
    plan = tiny.plan(**SIZE, device="cuda", num_inference_steps=5, cfg_scale=3.0)
    assert [(stage.name, stage.steps) for stage in plan.stages] == [
        ("encode_prompt", 1),
        ("denoise", 5),
        ("decode_image", 1),
    ]
    weights = sum(one.numel() * 4 for role in before for one in tiny.components[role].parameters())
    assert plan.peak_vram > weights
    after = {role: {name: one.data_ptr() for name, one in tiny.components[role].named_parameters()} for role in before}
    assert after == before


def test_guidance_runs_the_network_twice(tiny):
    once, twice = (tiny.plan(**SIZE, device="cuda", cfg_scale=scale) for scale in (1.0, 3.0))
    assert twice.seconds_per_step == pytest.approx(2 * once.seconds_per_step)


def test_more_pixels_take_more(tiny):
    small, large = (tiny.plan(height=side, width=side, device="cuda").stages[-1] for side in (128, 256))
    assert 3 * small.activations < large.activations < 5 * small.activations


def test_what_a_call_would_refuse_is_refused(tiny):
    with pytest.raises(TypeError, match="num_frames"):
        tiny.plan(num_frames=81)
    with pytest.raises(ValueError, match="height=-1"):
        tiny.plan(height=-1)
    with pytest.raises(ValueError, match="whatever vram_limit=4 says; policy='dynamic' keeps a limit"):
        tiny.plan(device="cuda", policy="none", vram_limit=4)
    with pytest.raises(ValueError, match="policy 'fp9' is unknown; did you mean 'fp8'"):
        tiny.plan(policy="fp9")
    with pytest.raises(ValueError, match="limit ram_limit"):
        tiny.plan(vram_limit=4)


def test_a_limit_below_the_activations_is_refused_with_the_smallest(tiny):
    plan = tiny.plan(**SIZE, device="cuda")
    with pytest.raises(NotEnoughMemory, match="smallest limit that can be kept"):
        tiny.plan(**SIZE, device="cuda", vram_limit=plan.smallest_vram / GIB / 2)


IN_TILES = {"height": 128, "width": 96, "tile_size": 8, "tile_stride": 6, "num_inference_steps": 1, "seed": 3}
"""Request for 16 x 12 latent pixels."""


@pytest.fixture(scope="module")
def needs(tiny):
    """Return the smallest limit in bytes of a call without tiles, and with tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_speeds", lambda device, dtype: Speeds(25e9, 100e12, 3e9))
        plans = [tiny.plan(**IN_TILES, tiled=tiled, device="cuda", vram_limit=8) for tiled in (False, True)]
    assert [plan.switches for plan in plans] == [{}, {}]
    return [plan.smallest_vram for plan in plans]


@pytest.fixture
def decoded(tiny):
    """Return a list that records the sizes of the decoder's inputs."""
    seen = []

    def note(module, given):
        if not given[0].is_meta:
            seen.append(tuple(given[0].shape[-2:]))

    handle = tiny.vae.decoder.register_forward_pre_hook(note)
    yield seen
    handle.remove()


@pytest.fixture
def limited(tiny):
    """Return a function: limit in GiB -> the pipeline with that limit, which is removed after the test."""

    def keeping(gib):
        keep_limit(tiny, gib)
        return tiny

    yield keeping
    tiny.plan_cache = None


def test_tiles_are_turned_on_where_the_whole_does_not_fit_and_only_there(tiny, needs, decoded, limited):
    whole, in_tiles = needs
    assert in_tiles < 0.9 * whole
    call = IN_TILES | {"output_type": "tensor"}
    expected = {limit: tiny("a red apple", **call, tiled=limit < whole) for limit in (sum(needs) / 2, whole)}
    for limit, ran in ((sum(needs) / 2, {(8, 8)}), (whole, {(16, 12)})):
        plan = tiny.plan(**IN_TILES, device="cuda", vram_limit=limit / GIB)
        assert [stage.name for stage in plan.stages if stage.switched] == (["decode_image"] if limit < whole else [])
        assert plan.peak_vram <= limit
        assert plan.smallest_vram == in_tiles
        decoded.clear()
        assert torch.equal(limited(limit / GIB)("a red apple", **call), expected[limit])
        assert set(decoded) == ran


def test_a_pipeline_without_an_autoencoder_keeps_its_limit(tiny):
    """Its plan was tried with tiles, too, and `tiled=True` was refused because the role of that argument is empty."""
    parts = {role: part for role, part in tiny.components.items() if role != "vae"}
    pipe = ZImagePipeline({**parts, "vae": None}, device="cpu", torch_dtype=torch.float32)
    plan = pipe.plan(**SIZE, output_type="latents", device="cuda", vram_limit=8)
    assert [stage.name for stage in plan.stages] == ["encode_prompt", "denoise"]


def test_what_a_call_says_of_tiles_is_never_changed(tiny, needs, decoded, limited):
    for tiled, least in zip((False, True, None), (*needs, needs[1]), strict=True):
        pipe = limited(0.98 * least / GIB)
        with pytest.raises(NotEnoughMemory, match=rf"smallest limit .* is {-(-least * 100 // GIB) / 100:.2f} GiB"):
            pipe("a red apple", **IN_TILES, tiled=tiled)
    assert not decoded
    for wrong in ({"tile_size": 0}, {"tile_size": (8, 8), "tile_stride": 9}, {"tiled": "yes"}):
        with pytest.raises(ValueError, match="tile"):
            tiny("a red apple", **IN_TILES | wrong)


def test_the_peak_of_a_stage_is_what_torch_allocates(tiny):
    """The meta trace equals the counts of torch's profiler for one forward pass of the same code."""
    latents, mask = torch.randn(1, 16, 8, 6), torch.ones(1, 40, dtype=torch.bool)
    embeds, time = torch.randn(1, 40, TINY_DIT.cap_feat_dim), torch.tensor([0.5])
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profiler:
        tiny.dit(latents, time, embeds, mask)
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    meta_dit = meta_components.without_weights(tiny.dit, torch.float32)
    inputs = [one.to("meta") for one in (latents, time, embeds)]
    with torch.no_grad(), MetaTracer("cpu", {"dit": meta_dit}) as tracer, tracer.stage("dit") as stage:
        meta_dit(*inputs, mask.to("meta"))
    given = sum(one.numel() * one.element_size() for one in (latents, time, embeds, mask))
    assert stage.device_bytes + stage.host_bytes - given == pytest.approx(peak, rel=0.1)


def run(*arguments):
    return CliRunner().invoke(program, ["plan", *map(str, arguments)])


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Plan on a machine without the model's files."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))


def test_a_model_that_nobody_downloaded_is_planned_from_its_published_layout(nowhere):
    result = run("z-image-turbo", "--vram", 8, "--height", 512, "--width", 512, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert plan["fits"]
    assert plan["peak_vram"] <= 8 * GIB
    assert plan["speeds"]["measured"] is False or torch.cuda.is_available()
    denoise = next(stage for stage in plan["stages"] if stage["name"] == "denoise")
    (dit,) = denoise["components"]
    assert len(dit["resident"]) + len(dit["streamed"]) > 30
    assert denoise["steps"] == 8
    # 6.15 billion parameters in bf16 and 4.02 of the text encoder.
    assert 18.5 * GIB < plan["peak_ram"] < 22 * GIB


def test_the_command_says_what_does_not_fit_and_what_it_does_not_know(nowhere):
    assert run("z-image-tubro").exit_code == 2
    frames = run("z-image-turbo", "--frames", 81)
    assert (frames.exit_code, "num_frames" in frames.stderr) == (2, True)


def test_the_model_in_the_wheel_is_planned_from_its_files(nowhere):
    result = run("z-image-nano", "--device", "cpu", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    first = [line.split()[0] for line in result.stdout.splitlines()[:4]]
    assert first == ["STAGE", "encode_prompt", "denoise", "decode_image"]
    small = run("z-image-nano", "--ram", 0.01, "--device", "cpu")
    assert small.exit_code == 1
    assert "does not fit" in small.stderr


def test_a_model_without_files_and_layout_cannot_be_planned(nowhere):
    record = dataclasses.replace(registry.get("z-image-turbo"), components={"dit": "nobody/nothing:x.safetensors"})
    with pytest.raises(Unplannable, match="nobody/nothing"):
        meta_components.declared_components(record, torch.bfloat16)
