"""Cascades: pipelines in order equal their calls by hand."""

import threading
from functools import partial

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffsynth.core.planning import StageKind
from diffsynth.errors import Cancelled, NotEnoughMemory
from diffsynth.runtime.cascade import Cascade, CascadeStage, CascadeStep
from diffsynth.runtime.images import images_to_batch, tensor_to_images
from diffsynth.runtime.pipeline import Pipeline
from diffsynth.runtime.unit import Phase, unit
from diffsynth_zimage import ZImagePipeline
from progress_parts import check_parts
from tiny_z_image import tiny_z_image
from toy_pipeline import ToyNet, ToyPipeline

GIVEN = {"prompt": "a fox", "seed": 3, "num_inference_steps": 2, "height": 32, "width": 48}


@unit("start", phase=Phase.ENCODE)
def read_start(*, input_image: Image.Image | list | Tensor | None = None, height: int, width: int):
    """The level of each input image; 0 without one."""
    if input_image is None:
        return torch.zeros(1)
    return images_to_batch(input_image, height=height, width=width).mean(dim=(1, 2, 3))


@unit("output")
def to_pixels(*, latents: Tensor, start: Tensor, weight: float = 0.5, height: int, width: int, output_type: str):
    levels = (latents.mean(dim=(1, 2, 3)) + weight * start).view(-1, 1, 1, 1)
    pixels = levels.expand(-1, 3, height, width)
    return pixels if output_type == "tensor" else tensor_to_images(pixels)


class Grey(ToyPipeline):
    """The toy pipeline with images as output, and with an input image."""

    units = (*ToyPipeline.units, read_start)
    output_units = (to_pixels,)
    output_kind = "image"

    def check(self, **arguments):
        request = super().check(**arguments)
        if request.values["weight"] < 0:
            raise ValueError("weight must not be negative")
        return request


class Refiner(Grey):
    """Cannot be called without an image."""

    def check(self, **arguments):
        if arguments.get("input_image") is None:
            raise ValueError("needs input_image")
        return super().check(**arguments)


@unit("small")
def take(*, small: Tensor | None = None):
    return small


@unit("output")
def double(*, small: Tensor):
    return 2 * small


class Double(Pipeline):
    """A conversion of tensors: a pipeline without a loop."""

    units = (take,)
    output_units = (double,)


@unit("first_shape", phase=Phase.SHAPE)
def note_shape(*, first: Tensor | None = None):
    """The shape of another stage's latents, which a plan knows and a check does not."""
    return None if first is None else tuple(first.shape)


class Noted(ZImagePipeline):
    """Z-Image with an argument that takes latents."""

    units = (*ZImagePipeline.units, note_shape)


def pipeline(cls):
    components = {"dit": ToyNet()} if "dit" in cls.roles else {}
    return cls(components, device="cpu", torch_dtype=torch.float32)


def two(form="pil", **arguments):
    return Cascade(
        CascadeStage("base", pipeline(Grey), arguments={"output_type": form}),
        CascadeStage("refine", pipeline(Refiner), inputs={"input_image": "base"}, arguments=arguments),
    )


def levels(images):
    return [image.getpixel((0, 0)) for image in (images if isinstance(images, list) else [images])]


@pytest.mark.parametrize("form", ["pil", "tensor"])
@pytest.mark.parametrize(
    "call",
    [
        {"prompt": "abc", "seed": 0},
        {"prompt": ["abc", "abcde"], "seed": 0},
        {"prompt": "abc", "seed": [1, 2], "num_images": 2},
        {"prompt": "abc", "seed": 1, "height": 30, "width": 47},
    ],
)
def test_a_cascade_equals_the_calls_by_hand(form, call):
    cascade = two(form)
    first = pipeline(Grey)(**call, output_type=form)
    second = pipeline(Grey)(**call, input_image=first)
    made = cascade(**call)
    assert type(made) is type(second)
    assert levels(made) == levels(second)
    assert levels(made) != levels(pipeline(Grey)(**call))


def test_z_image_twice_equals_the_calls_by_hand_to_the_bit():
    """Text to image, then image to image with the same components, through images and through tensors."""
    pipe = tiny_z_image(n_layers=1, with_autoencoder=True)
    for form in ("pil", "tensor"):
        cascade = Cascade(
            CascadeStage("base", pipe, arguments={"output_type": form}),
            CascadeStage("refine", pipe, inputs={"input_image": "base"}, arguments={"denoising_strength": 0.6}),
        )
        results = []
        made = cascade(**GIVEN, output_type="tensor", refine={"seed": 8}, on_stage=results.append)
        first = pipe(**GIVEN, output_type=form)
        second = pipe(**{**GIVEN, "seed": 8}, output_type="tensor", input_image=first, denoising_strength=0.6)
        assert made.shape == (1, 3, 32, 48)
        assert torch.equal(made, second)
        assert not torch.equal(made, pipe(**GIVEN, output_type="tensor"))
        assert [(each.stage, each.seeds) for each in results] == [("base", (3,)), ("refine", (8,))]
        assert results[1].output is made
        if form == "tensor":
            assert torch.equal(results[0].output, first)


def test_arguments_go_to_all_stages_that_have_them():
    cascade = two(weight=0.25)
    assert cascade.arguments["seed"] == ("base", "refine")
    assert cascade.arguments["output_type"] == ("refine",)
    assert cascade.arguments["input_image"] == ("base",)
    requests = cascade.check("abc", seed=4, weight=1.0, base={"weight": 0.0, "prompt": "a"}, output_type="tensor")
    assert [request.values["weight"] for request in requests.values()] == [0.0, 1.0]
    assert [request.values["prompt"] for request in requests.values()] == [["a"], ["abc"]]
    assert [request.loop.output_type for request in requests.values()] == ["pil", "tensor"]
    assert [request.seeds for request in requests.values()] == [[4], [4]]
    assert cascade.check()["refine"].values["weight"] == 0.25


def test_an_input_image_of_the_first_stage_does_not_reach_the_second():
    white = Image.new("RGB", (32, 32), "white")
    cascade = two()
    assert levels(cascade("abc", seed=0, input_image=white, weight=0.1)) == levels(
        pipeline(Grey)("abc", seed=0, weight=0.1, input_image=pipeline(Grey)("abc", input_image=white, weight=0.1))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"sed": 0}, TypeError, "unknown argument 'sed'; did you mean 'seed'"),
        ({"refin": {}}, TypeError, "unknown argument 'refin'; did you mean 'refine'"),
        ({"refine": {"wieght": 1}}, TypeError, "unknown argument 'wieght'; did you mean 'weight'"),
        ({"refine": 0.3}, TypeError, "refine=0.3: expected a mapping of arguments of stage 'refine'"),
        ({"refine": {"weight": -1.0}}, ValueError, "weight must not be negative"),
        ({"refine": {"input_image": None}}, TypeError, "'input_image' of stage 'refine' is the output of stage 'base'"),
        ({"refine": {"num_inference_steps": 0}}, ValueError, "num_inference_steps=0"),
    ],
)
def test_all_stages_are_checked_before_the_first_runs(call, error, message):
    cascade = two()
    started = []
    with pytest.raises(error, match=message):
        cascade("abc", on_step=started.append, **call)
    assert started == []


def test_an_error_of_a_stage_has_a_note_with_its_name():
    with pytest.raises(ValueError, match="weight must not be negative") as caught:
        two()("abc", refine={"weight": -1.0})
    assert caught.value.__notes__ == ["raised in stage 'refine' of a cascade"]


def test_an_argument_that_only_inputs_take_is_refused():
    cascade = Cascade(
        CascadeStage("base", pipeline(ToyPipeline), arguments={"output_type": "latents"}),
        CascadeStage("large", pipeline(Double), inputs={"small": "base"}),
    )
    with pytest.raises(TypeError, match="'small' of stage 'large' is the output of stage 'base'; leave it out"):
        cascade("abc", small=torch.zeros(1))


@pytest.mark.parametrize(
    ("form", "call", "expected"),
    [
        ("pil", {}, (32, 32)),
        ("pil", {"num_images": 2}, [(32, 32)] * 2),
        ("tensor", {"height": 33, "width": 64}, (1, 3, 48, 64)),
    ],
)
def test_a_check_gives_inputs_of_the_size_of_the_real_ones(form, call, expected):
    cascade = two(form)
    seen = cascade.check("abc", **call)["refine"].values["input_image"]
    results = []
    cascade("abc", **call, on_stage=results.append)
    assert size(seen) == size(results[0].output) == expected


def size(image):
    if isinstance(image, list):
        return [each.size for each in image]
    return tuple(image.shape) if isinstance(image, Tensor) else image.size


def test_latents_pass_through_a_stage_without_a_loop():
    """Latents have no known shape before they are computed, so that the stage is checked without them."""
    cascade = Cascade(
        CascadeStage("base", pipeline(ToyPipeline), arguments={"output_type": "latents"}),
        CascadeStage("large", pipeline(Double), inputs={"small": "base"}),
    )
    steps = []
    made = cascade("abc", seed=0, num_inference_steps=2, on_step=steps.append)
    assert torch.equal(made, 2 * pipeline(ToyPipeline)("abc", seed=0, num_inference_steps=2, output_type="latents"))
    assert [step.stage for step in steps] == ["base", "base"]
    requests = cascade.check("abc")
    assert requests["large"].values["small"] is None
    with pytest.raises(ValueError, match="num_images=0"):
        cascade.check("abc", large={"num_images": 0})
    listed = {name: [stage.kind for stage in stages] for name, stages in cascade.stages(requests).items()}
    assert listed["base"][-1] is StageKind.DENOISE
    assert listed["large"] == [StageKind.PREPARE, StageKind.OUTPUT]


def test_a_later_stage_takes_outputs_of_several_stages():
    cascade = Cascade(
        CascadeStage("base", pipeline(Grey), arguments={"output_type": "tensor"}),
        CascadeStage("large", pipeline(Double), inputs={"small": "base"}),
        CascadeStage("refine", pipeline(Refiner), inputs={"input_image": "large"}, arguments={"weight": 1.0}),
        CascadeStage("last", pipeline(Refiner), inputs={"input_image": "refine"}, arguments={"weight": 0.0}),
    )
    shown = []
    cascade("abc", seed=0, refine={"output_type": "tensor"}, on_stage=shown.append, output_type="tensor")
    base, large, refined, last = (each.output.flatten()[0].item() for each in shown)
    assert (large, refined, last) == pytest.approx((2 * base, 0.3 + 2 * base, 0.3), abs=1e-5)


def test_steps_and_bars_say_which_stage(monkeypatch):
    bars = []

    def bar(items, *, description):
        bars.append(description)
        return items

    monkeypatch.setattr("diffsynth.runtime.cascade.progress_bar", bar)
    steps: list[CascadeStep] = []
    two()("abc", num_inference_steps=2, refine={"num_inference_steps": 3}, on_step=steps.append)
    assert bars == ["base", "refine"]
    assert [(step.stage, step.stage_index, step.index, step.num_steps) for step in steps] == [
        *(("base", 0, index, 2) for index in range(2)),
        *(("refine", 1, index, 3) for index in range(3)),
    ]
    assert [step.progress for step in steps] == pytest.approx([1 / 4, 1 / 2, 2 / 3, 5 / 6, 1])
    assert steps[0].latents.shape == (1, 1, 4, 4)
    bars.clear()
    two()("abc", progress_bar_cmd=partial(bar, description="own"))
    assert bars == ["own", "own"]


@pytest.mark.parametrize(("stage", "finished"), [("base", []), ("refine", ["base"])])
def test_one_event_cancels_all_stages_and_keeps_what_is_done(stage, finished):
    cancel = threading.Event()

    def stop(step):
        if step.stage == stage and step.index == 1:
            cancel.set()

    results = []
    with pytest.raises(Cancelled) as caught:
        two()("abc", seed=0, cancel=cancel, on_step=stop, on_stage=results.append)
    assert caught.value.__notes__ == [f"raised in stage {stage!r} of a cascade"]
    assert [each.stage for each in results] == finished
    if finished:
        assert levels(results[0].output) == levels(pipeline(Grey)("abc", seed=0))


def test_a_cascade_can_be_called_again_after_an_error():
    cascade = two()
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        cascade("abc", cancel=cancel)
    assert levels(cascade("abc", seed=0)) == levels(two()("abc", seed=0))


def test_a_random_seed_is_recorded():
    results = []
    cascade = two()
    made = cascade("abc", num_images=2, on_stage=results.append)
    (seed, following), again = results[0].seeds, results[1].seeds
    assert following == seed + 1
    assert again == (seed, following)
    assert levels(cascade("abc", num_images=2, seed=seed)) == levels(made)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "a cascade without stages"),
        ([("base", {}), ("base", {"input_image": "base"})], "the name belongs to two stages"),
        ([("prompt", {})], "the name belongs to an argument of the call"),
        ([("base", {}), ("refine", {})], "no later stage takes the output of stage 'base'"),
        (
            [("base", {}), ("refine", {"input_image": "bse"})],
            "from 'bse', which is no earlier stage; did you mean 'base'",
        ),
        ([("base", {"input_image": "refine"}), ("refine", {})], "which is no earlier stage.* Earlier stages: none"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages, message):
    pipe = pipeline(Grey)
    with pytest.raises(ValueError, match=message):
        Cascade(*(CascadeStage(name, pipe, inputs=inputs) for name, inputs in stages))


def test_a_stage_checks_its_own_names():
    pipe = pipeline(Grey)
    with pytest.raises(TypeError, match="unknown argument 'input_imag'; did you mean 'input_image'"):
        CascadeStage("base", pipe, inputs={"input_imag": "x"})
    with pytest.raises(TypeError, match="unknown argument 'weigh'; did you mean 'weight'"):
        CascadeStage("base", pipe, arguments={"weigh": 1.0})
    with pytest.raises(ValueError, match="'weight' has an input and a default"):
        CascadeStage("base", pipe, inputs={"weight": "x"}, arguments={"weight": 1.0})
    with pytest.raises(ValueError, match="expected a name that can be a keyword"):
        CascadeStage("the base", pipe)
    with pytest.raises(TypeError, match="expected a Pipeline"):
        CascadeStage("base", ToyNet())


def test_a_plan_has_the_plans_of_all_stages():
    """The input of a stage has the size that the stage before it returns."""
    pipe, other = tiny_z_image(n_layers=1, with_autoencoder=True), tiny_z_image(n_layers=1, with_autoencoder=True)
    strength = {"denoising_strength": 0.6}
    cascade = Cascade(
        CascadeStage("base", pipe, arguments={"output_type": "tensor"}),
        CascadeStage("refine", other, inputs={"input_image": "base"}, arguments=strength),
    )
    size = {"height": 64, "width": 32, "num_inference_steps": 1}
    plan = cascade.plan(**size, device="cuda")
    alone = other.plan(**size, device="cuda", input_image=torch.zeros(1, 3, 64, 32, device="meta"), **strength)
    assert [(each.name, each.vram, each.activations) for each in plan.plans["refine"].stages] == [
        (each.name, each.vram, each.activations) for each in alone.stages
    ]
    assert "encode_input_image" in {stage.name for stage in alone.stages}
    assert "encode_input_image" not in {stage.name for stage in plan.plans["base"].stages}
    weights = sum(tensor.nbytes for part in (pipe.dit, pipe.vae, pipe.text_encoder) for tensor in part.parameters())
    held = 4 * 3 * 64 * 32  # the output of the first stage
    assert plan.beside == {"base": weights, "refine": weights + held}
    assert plan.peak_vram == max(each.peak_vram + plan.beside[name] for name, each in plan.plans.items())
    assert plan.to_dict()["stages"]["refine"]["beside"] == weights + held
    assert plan.to_dict()["peak_ram"] == max(each.peak_ram for each in plan.plans.values())


def test_components_that_stages_share_are_counted_once():
    pipe = tiny_z_image(n_layers=1, with_autoencoder=True)
    cascade = Cascade(CascadeStage("base", pipe), CascadeStage("refine", pipe, inputs={"input_image": "base"}))
    plan = cascade.plan(height=32, width=32, num_inference_steps=1, device="cuda")
    assert plan.beside == {"base": 0, "refine": 0}
    assert plan.peak_vram == max(each.peak_vram for each in plan.plans.values())


def test_a_plan_for_a_limit_takes_other_stages_to_be_offloaded():
    """A limit that cannot be kept names the stage."""
    pipes = [tiny_z_image(n_layers=1), tiny_z_image(n_layers=1)]
    cascade = Cascade(
        CascadeStage("base", pipes[0], arguments={"output_type": "latents"}),
        CascadeStage("next", Noted.from_components(**pipes[1].components, device="cpu"), inputs={"first": "base"}),
    )
    call = {"height": 32, "width": 32, "num_inference_steps": 1, "output_type": "latents", "device": "cuda"}
    latents = 4 * 16 * 4 * 4
    assert cascade.plan(**call, vram_limit=1.0).beside == {"base": 0, "next": latents}
    with pytest.raises(NotEnoughMemory) as caught:
        cascade.plan(**call, vram_limit=1e-6)
    assert caught.value.__notes__ == ["raised in stage 'base' of a cascade"]


def test_progress_names_the_stage_of_the_cascade():
    seen = []
    two()("abc", on_progress=seen.append)
    stages = list(dict.fromkeys(each.cascade_stage for each in seen))
    assert stages == ["base", "refine"]
    for stage in stages:
        check_parts([each for each in seen if each.cascade_stage == stage])
