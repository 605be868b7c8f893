"""The example plugins with a ControlNet for Z-Image and an upscaler: alone, together, and beside our own ControlNet."""

import functools
import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

import diffsynth
from diffsynth.cli.group import program
from diffsynth.errors import MissingComponent
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth_zimage.config import ZImageControlNetConfig
from diffsynth_zimage.controlnet import ZImageControlNet
from example_plugins import installed, make_weights, run_conformance, run_readme
from limited import keep_limit, let_blocks_travel
from parity import draw_weights, relative_error, shapes_of

SMALL = {"prompt": "a red apple", "seed": 0, "height": 64, "width": 48, "num_inference_steps": 4}
LATENTS = {**SMALL, "output_type": "latents"}
PIXELS = {**SMALL, "output_type": "tensor", "num_inference_steps": 2}


def drawn(box):
    image = Image.new("L", (96, 128), "white")
    ImageDraw.Draw(image).rectangle(box, outline="black", width=8)
    return image


SKETCH, OTHER = drawn((16, 16, 80, 112)), drawn((32, 48, 64, 80))


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """Install both beside Z-Image and make their weights in the current folder; return role -> file."""
    folder = tmp_path_factory.mktemp("site")
    files = {
        "sketch_controlnet[0]": folder / "sketch.safetensors",
        "sketch_controlnet[1]": folder / "other.safetensors",
        "upscaler": folder / "upscaler.safetensors",
    }
    with (
        installed("sketch_controlnet", "upscaler", folder=folder, beside=["zimage"]),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.chdir(folder)
        make_weights("sketch_controlnet", files["sketch_controlnet[0]"])
        make_weights("sketch_controlnet", files["sketch_controlnet[1]"], seed=1)
        make_weights("upscaler", files["upscaler"])
        yield files


def load(files, *roles, **options):
    chosen = {role: files[role] for role in roles}
    return diffsynth.load("z-image-nano", components=chosen, device="cpu", torch_dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def pipe(files):
    return load(files, *files)


@pytest.fixture(scope="module")
def plain(files):
    return load(files)


def test_they_conform():
    """The checks that call a model run once, with the features of both."""
    added = "additions to diffsynth_zimage.pipeline:ZImagePipeline are there"
    checks = run_conformance("sketch_controlnet")
    assert {added, "sketch_controlnet output is the same with a LoRA unfused and fused"} <= set(checks)
    assert added in run_conformance("upscaler", calls=False)


def test_the_readmes_run(monkeypatch):
    """In fp32, in which CPUs are faster."""
    monkeypatch.setattr(diffsynth, "load", functools.partial(diffsynth.load, torch_dtype=torch.float32))
    assert run_readme("sketch_controlnet", steps=1)["image"].size == (128, 128)
    assert run_readme("upscaler", steps=1)["image"].size == (256, 256)


def test_unused_they_change_no_bit(pipe, plain):
    """With their networks and without; without, their arguments are refused."""
    expected = plain(**PIXELS)
    for unused in ({}, {"sketches": None}, {"sketches": []}, {"sketches": ControlNetInput(image=SKETCH, scale=0.0)}):
        assert torch.equal(pipe(**PIXELS, **unused), expected)
    for argument in ({"sketches": ControlNetInput(image=SKETCH)}, {"upscale": 2}):
        with pytest.raises(MissingComponent, match=f"argument '{next(iter(argument))}' needs"):
            plain(**PIXELS, **argument)


def test_a_call_uses_one_or_both(pipe):
    """The upscaler gets the image that the ControlNet changed."""
    sketch = {"sketches": ControlNetInput(image=SKETCH)}
    plain, sketched = pipe(**PIXELS), pipe(**PIXELS, **sketch)
    assert relative_error(sketched, plain) > 1e-3
    for call, image in (({}, plain), (sketch, sketched)):
        larger = pipe(**PIXELS, **call, upscale=2)
        assert larger.shape == (1, 3, 128, 96)
        assert torch.equal(larger, pipe.upscaler(image))
    assert pipe(**{**PIXELS, "output_type": "pil"}, **sketch, upscale=2).size == (96, 128)
    with pytest.raises(ValueError, match=r"upscale=2 enlarges the decoded image; expected output_type='pil' or"):
        pipe(**LATENTS, **sketch, upscale=2)


def test_sketches_add_up_and_each_has_its_steps(pipe):
    first, second = ControlNetInput(image=SKETCH), ControlNetInput(1, image=OTHER, scale=0.5, start=0.5)
    early = ControlNetInput(image=SKETCH, end=0.5)
    seen = {}
    for name, sketches in {"first": first, "second": second, "both": [first, second], "early": early}.items():
        latents = seen[name] = []
        pipe(**LATENTS, sketches=sketches, on_step=lambda step, to=latents: to.append(step.latents))
    assert [torch.equal(*each) for each in zip(seen["early"], seen["first"], strict=True)] == [True, True, False, False]
    assert [torch.equal(*each) for each in zip(seen["both"], seen["first"], strict=True)] == [True, True, False, False]
    assert relative_error(seen["both"][-1], seen["second"][-1]) > 1e-3


def test_the_plan_has_the_roles_that_a_call_uses(pipe):
    def roles(**arguments):
        plan = pipe.plan(**SMALL, **arguments, device="cuda")
        return [(stage.roles, stage.steps) for stage in plan.stages if stage.name != "encode_prompt"]

    decode = (("vae",), 1)
    assert roles() == [(("dit",), 4), decode]
    assert roles(upscale=2) == [(("dit",), 4), decode, (("upscaler",), 1)]
    sketches = [ControlNetInput(image=SKETCH, end=0.5), ControlNetInput(1, image=OTHER, start=0.4)]
    loop = [(("dit", "sketch_controlnet[0]"), 2), (("dit", "sketch_controlnet[1]"), 2)]
    assert roles(sketches=sketches, upscale=2) == [*loop, decode, (("upscaler",), 1)]


def test_a_limit_changes_no_bit(pipe, files, monkeypatch):
    """The CPU in place of a device with little more memory than the call needs; blocks of any size are streamed."""
    let_blocks_travel(monkeypatch)
    call = {**PIXELS, "sketches": [ControlNetInput(image=SKETCH), ControlNetInput(1, image=OTHER)], "upscale": 2}
    call["tiled"] = False
    limited = load(files, *files, policy="dynamic")
    keep_limit(limited, 1)
    free = limited.plan_cache.plan(limited.check(**call), call)
    limit = free.smallest_vram + 0.2 * (free.peak_vram - free.smallest_vram)
    plans = keep_limit(limited, limit / 2**30)
    assert torch.equal(limited(**call), pipe(**call))
    assert [plan.peak_vram <= limit < free.peak_vram for plan in plans] == [True]
    assert {*files} <= set(limited.transfers)


def test_a_lora_changes_its_controlnet_alone(pipe):
    calls = [{**LATENTS, "sketches": ControlNetInput(index, image=SKETCH)} for index in (0, 1)]
    before = [pipe(**call) for call in calls]
    lora = {"blocks.0.hint.lora_A.weight": torch.ones(2, 32), "blocks.0.hint.lora_B.weight": torch.ones(192, 2)}
    pipe.load_lora(pipe.sketch_controlnet[1], state_dict=lora, hotload=True)
    assert [each.role for each in pipe.loras] == ["sketch_controlnet[1]"]
    assert [torch.equal(pipe(**call), old) for call, old in zip(calls, before, strict=True)] == [True, False]
    pipe.clear_lora()
    assert torch.equal(pipe(**calls[1]), before[1])


def test_a_step_cache_skips_layers_and_no_controlnet(pipe):
    """It runs in each of its steps; the first step without it skips nothing."""
    call = {**LATENTS, "num_inference_steps": 6, "sketches": ControlNetInput(image=SKETCH, end=0.5)}
    assert torch.equal(pipe(**call, step_cache="first_block:threshold=0"), pipe(**call))
    runs, reused = [], []
    handle = pipe.sketch_controlnet[0].register_forward_hook(lambda *_: runs.append(len(reused)))
    pipe(**call, step_cache="first_block:threshold=100", on_step=lambda step: reused.append("cond" in step.reused))
    handle.remove()
    assert reused == [False, True, True, False, True, True]
    assert sorted(set(runs)) == [0, 1, 2]


def test_our_own_controlnet_may_be_there_as_well(pipe):
    config = ZImageControlNetConfig(
        dim=192, n_heads=4, n_kv_heads=4, n_layers=2, n_refiner_layers=1, in_channels=32, refiner_hints="none"
    )
    own = ZImageControlNet(config).eval().requires_grad_(False)
    own.load_state_dict(draw_weights(shapes_of(own)))
    both = type(pipe)({**pipe.components, "controlnet": own}, device="cpu", torch_dtype=torch.float32)
    edges, sketch = {"controlnet_inputs": ControlNetInput(image=OTHER)}, {"sketches": ControlNetInput(image=SKETCH)}
    assert torch.equal(both(**LATENTS, **sketch), pipe(**LATENTS, **sketch, cfg_scale=1.0))
    together = both(**LATENTS, **edges, **sketch)
    assert all(relative_error(together, both(**LATENTS, **one)) > 1e-3 for one in (edges, sketch))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sketches": "apple.png"}, TypeError, "sketches='apple.png': expected ControlNetInput"),
        ({"sketches": ControlNetInput()}, TypeError, "with a PIL image"),
        ({"sketches": ControlNetInput(2, image=SKETCH)}, ValueError, "controlnet_id=2, and 2 are loaded"),
        ({"upscale": 3}, ValueError, "upscale=3: expected 2, the factor of the loaded upscaler, or None"),
        ({"sketchs": None}, TypeError, "unknown argument 'sketchs'; did you mean 'sketches'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe.check(**LATENTS, **arguments)


def test_a_controlnet_of_another_transformer_is_refused(pipe):
    network = type(pipe.sketch_controlnet[0])
    config = type(pipe.sketch_controlnet[0].config)
    for wrong in (config(dim=96), config(dim=192, depth=4)):
        others = {**pipe.components, "sketch_controlnet": network(wrong)}
        with pytest.raises(
            ValueError, match=r"ControlNet 0 is for a transformer of width .* has width 192 and 6 layers"
        ):
            type(pipe)(others, device="cpu", torch_dtype=pipe.dtype).check(
                **LATENTS, sketches=ControlNetInput(image=SKETCH)
            )


def test_the_command_line_lists_their_arguments():
    result = CliRunner().invoke(program, ["info", "z-image-nano", "--json"])
    assert result.exit_code == 0, result.output
    assert {"sketches", "upscale"} <= set(json.loads(result.stdout)["schema"]["properties"])
