"""Tests of the hook pages: signatures equal the code's, and each example works when installed as a plugin.

The examples extend `examples/third_party_plugin`, so they can use its network and pipeline.
"""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

import diffsynth
from diffsynth import _discovery, hookspecs, registry
from diffsynth.cli.group import program
from diffsynth.core.attention import attention, available_backends
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.core.loader import header, recognize
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.core.quant.config import QuantizeConfig
from diffsynth.core.quant.methods import method_of
from diffsynth.core.quant.modules import quantize_module
from diffsynth.core.vram import DiskMap, Policy, wrap
from diffsynth.runtime import architectures, declared_backends
from diffsynth.runtime.guidance import GuidanceStep, parse_guidance
from diffsynth.runtime.lora_defaults import published_lora
from diffsynth.runtime.solvers import find_solver, load_solver
from diffsynth.sampling.schedule import z_image_sigmas
from diffsynth.sampling.solver import euler
from diffsynth.spec import resolve
from diffsynth_train.components import training_spec
from diffsynth_train.objectives.base import build_objective
from documented import file_blocks, sections

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "hooks"
TOY = ROOT / "examples" / "third_party_plugin" / "src" / "diffsynth_toy"
HOOKS = [name for name, value in vars(hookspecs).items() if hasattr(value, "diffsynth_spec")]
MODEL = ("register_models", "register_architectures", "register_checkpoints")


def page(name: str) -> str:
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def signature(name: str) -> str:
    return f"{name}{inspect.signature(getattr(hookspecs, name))}".replace("'", "")


def test_a_page_per_hook_and_a_hook_per_page():
    assert len(HOOKS) >= 19
    assert sorted(path.stem for path in FOLDER.glob("*.md")) == sorted([*HOOKS, "index"])


def test_the_index_and_the_navigation_list_them_in_the_order_of_the_code():
    arguments = {name: ", ".join(inspect.signature(getattr(hookspecs, name)).parameters) for name in HOOKS}
    rows = re.findall(r"^\| \[`(.+?)`\]\((.+?)\) \| (.+) \|$", page("index"), flags=re.MULTILINE)
    says = {name: inspect.getdoc(getattr(hookspecs, name)).splitlines()[0] for name in HOOKS}
    assert rows == [(f"{name}({arguments[name]})", f"{name}.md", says[name]) for name in HOOKS]
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert re.findall(r"- (\w+): hooks/(\w+)\.md$", navigation, flags=re.MULTILINE) == [(name, name) for name in HOOKS]


@pytest.mark.parametrize("name", HOOKS)
def test_a_page_has_its_signature_and_its_parts(name):
    title, line, *_ = [line for line in page(name).splitlines() if line]
    assert title == f"# {name}"
    assert line == f"`{signature(name)}`"
    assert list(sections(page(name))) == ["When", "Arguments", "What may go wrong", "Example"]
    assert all(text.strip() for text in sections(page(name)).values())


@pytest.mark.parametrize("name", HOOKS)
def test_an_example_implements_its_hook_and_nothing_else(name):
    implemented = re.findall(r"^@hookimpl\ndef (\w+)\(", page(name), flags=re.MULTILINE)
    assert implemented == [name]


def test_every_example_has_its_test():
    tested = [name.removeprefix("test_effect_of_") for name in globals() if name.startswith("test_effect_of_")]
    assert sorted(tested) == sorted(HOOKS)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Return a function that installs the examples of some pages as the plugin `toy` and returns its folder."""
    before, folder = set(sys.modules), tmp_path / "site" / "diffsynth_toy"
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def install(*names: str, beside: str = "") -> Path:
        shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("plugin.py", "*.safetensors", "__pycache__"))
        plugin = "DIFFSYNTH_API = 2\n"
        for name in names:
            for file, text in file_blocks(sections(page(name))["Example"], unnamed="diffsynth_toy/plugin.py"):
                if file == "diffsynth_toy/plugin.py":
                    plugin += text
                else:
                    target = folder.parent / file
                    assert not target.exists() or target.read_text(encoding="utf-8") == text, f"{file} differs"
                    target.parent.mkdir(exist_ok=True)
                    target.write_text(text, encoding="utf-8")
        (folder / "plugin.py").write_text(plugin, encoding="utf-8")
        information = folder.parent / "diffsynth_toy-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: diffsynth-toy\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text("[diffsynth]\ntoy = diffsynth_toy.plugin\n")
        monkeypatch.setenv("DIFFSYNTH_PLUGINS", ",".join(["toy", beside]))
        assert _discovery.refresh().problems == ()
        config = resolve("diffsynth_toy.config:TINY")
        net = resolve("diffsynth_toy.dit:ToyDiT")(config)
        save_checkpoint(net, folder / "dit.safetensors", architecture="toy_dit", config=config, dtype=torch.float32)
        return folder

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("diffsynth_toy"):
            del sys.modules[name]
    _discovery._discovered = None


def draw(**arguments):
    pipe = diffsynth.load("toy-1", device="cpu", torch_dtype=torch.float32)
    return pipe("red", seed=0, num_inference_steps=2, **arguments)


def test_effect_of_register_models(toy):
    toy(*MODEL)
    record = registry.get("TOY-1")
    assert (record.exact_name, record.license, record.weights) == ("toy:toy-1", "MIT", "present")
    pipe = diffsynth.load("toy-1", device="cpu", torch_dtype=torch.float32)
    assert inspect.signature(pipe).parameters["num_inference_steps"].default == 8
    assert pipe("red", seed=0).size == (32, 32)


def test_effect_of_register_architectures(toy):
    folder = toy("register_architectures")
    (found,) = recognize.recognize(header.read([folder / "dit.safetensors"]), *_discovery.catalog().layouts())
    assert (found.architecture.name, found.tier) == ("toy_dit", "metadata")


def test_effect_of_register_checkpoints(toy, tmp_path):
    toy("register_architectures", "register_checkpoints")
    config = resolve("diffsynth_toy.config:TINY")
    tensors = resolve("diffsynth_toy.dit:ToyDiT")(config).state_dict()
    for prefix, name in (("blocks.", "toy_dit"), ("transformer_blocks.", "toy_dit/diffusers")):
        file = tmp_path / "net.safetensors"
        save_file({key.replace("blocks.", prefix): tensor.contiguous() for key, tensor in tensors.items()}, file)
        (found,) = recognize.recognize(header.read([file]), *_discovery.catalog().layouts())
        assert (found.checkpoint.name, found.config, found.tier) == (name, config, "structure")


class ReadsItsParts(torch.nn.MultiheadAttention):
    """Module that reads parameters of a list's items without calling them, so it must not be split there."""

    def __init__(self):
        super().__init__(8, 2)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        return x @ self.parts[0].weight + x @ self.parts[1].weight


def test_effect_of_register_layer_wrappers(toy, tmp_path):
    module, x = torch.nn.Sequential(ReadsItsParts(), ReadsItsParts()).requires_grad_(False), torch.randn(3, 8)
    expected = module(x)
    save_file(module.state_dict(), tmp_path / "net.safetensors")
    source = DiskMap(tmp_path / "net.safetensors").source_of(module)

    def streamed():
        handle = wrap(
            module.to("meta"), Policy.preset("disk", "cpu"), source=source, smallest=0, **architectures.cuts(None)
        )
        handle.configure(resident=(), slots=1)
        try:
            return handle.blocks, module(x)
        finally:
            handle.unwrap()

    with pytest.raises(RuntimeError, match=r"0.parts.0.weight is read while its block does not run.* `atomic`"):
        streamed()
    toy("register_layer_wrappers")
    blocks, output = streamed()
    assert blocks == (), "nothing is cut any more"
    assert torch.equal(output, expected)


@mock.patch.dict(BACKENDS)
def test_effect_of_register_attention(toy, monkeypatch):
    monkeypatch.setattr(declared_backends, "_in_use", {})
    toy(*MODEL, "register_attention")
    usual = draw(output_type="tensor")
    assert available_backends()[-2:] == ("naive", "averages")
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "averages")
    assert not torch.equal(draw(output_type="tensor"), usual)
    x = torch.randn(1, 3, 2, 8)
    with pytest.raises(diffsynth.errors.Refused, match="it knows no mask"):
        attention(x, x, x, causal=True)


def test_effect_of_register_solvers(toy):
    toy("register_solvers")
    spec = find_solver("adams_bashforth")
    assert (spec.evaluations_per_step, spec.uses_noise) == (1, False)
    begin, levels = torch.ones(1, dtype=torch.float64), []

    def error(solver, num_steps):
        def velocity(latents, sigma):
            levels.append(sigma)
            return latents

        return (solver(velocity, begin, z_image_sigmas(num_steps, shift=1.0)) - torch.e**-1).abs().item()

    ours = load_solver(spec)
    assert error(ours, 20) < error(euler, 20) / 10
    assert error(ours, 40) == pytest.approx(error(ours, 20) / 4, rel=0.1)
    assert len(levels) == 3 * 20 + 40, "one evaluation per step"


def test_effect_of_register_quantization(toy):
    toy("register_quantization")
    method = method_of("toy_int8", {})
    weight = torch.randn(4, 8)
    parts = method.quantize(weight)
    assert parts["weight"].dtype == torch.int8
    assert (method.dequantize(parts, torch.float32) - weight).abs().max() <= weight.abs().max() / 127 / 2 * 1.001
    layer = torch.nn.Sequential(torch.nn.Linear(8, 4)).requires_grad_(False)
    assert quantize_module(layer, QuantizeConfig("toy_int8")) == ["0"]


def test_effect_of_register_training(toy):
    toy("register_training")
    found = training_spec(SimpleNamespace(pipeline="diffsynth_toy.pipeline:ToyPipeline"))
    assert found.trainable == ("dit",)
    assert resolve(found.schedule)(4)[-1] == 0


def test_effect_of_register_objectives(toy):
    toy("register_training", "register_objectives")
    recipe = SimpleNamespace(objective={"name": "root_flow_match", "table": 10}, pipeline="")
    pipe = resolve("diffsynth_toy.pipeline:ToyPipeline").from_components(
        dit=resolve("diffsynth_toy.dit:ToyDiT")(resolve("diffsynth_toy.config:TINY")),
        device="cpu",
        torch_dtype=torch.float32,
    )
    objective = build_objective(recipe, pipe, _discovery.catalog().training[0].spec)
    values = {"input_latents": torch.randn(2, 3, 8, 8), "letters": torch.tensor([[1], [2]])}
    loss, parts = objective.loss(values, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(parts["mse"].sqrt().item())


def test_effect_of_register_features(toy):
    toy("register_features", beside="zimage")
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)
    assert inspect.signature(pipe).parameters["mirror"].default is False
    request = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "output_type": "latents"}
    assert not torch.equal(pipe("apple", mirror=True, **request), pipe("apple", **request))
    assert registry.problems() == []


def test_effect_of_register_commands(toy):
    toy("register_commands")
    assert "Say what would be painted." in CliRunner().invoke(program, ["--help"]).stdout
    assert CliRunner().invoke(program, ["paint", "red"]).stdout == "a red disc\n"


def test_effect_of_register_writers(toy, tmp_path):
    toy(*MODEL, "register_writers")
    line = "generate toy-1 red -o red.ppm --seed 0 --steps 2 --device cpu --dtype float32"
    result = CliRunner().invoke(program, line.split())
    assert (result.exit_code, result.stdout) == (0, "red.ppm\n"), result.output
    assert Image.open(tmp_path / "red.ppm").tobytes() == draw().convert("RGB").tobytes()
    made_by = json.loads((tmp_path / "red.ppm").read_bytes().split(b"\n")[1].removeprefix(b"# "))
    assert (made_by["model"], made_by["prompt"], made_by["seed"]) == ("toy-1", "red", 0)


def test_effect_of_register_doors(toy, monkeypatch):
    import diffsynth.pipelines

    toy("register_doors")
    monkeypatch.setattr(diffsynth.pipelines, "__path__", list(diffsynth.pipelines.__path__))
    monkeypatch.delitem(sys.modules, "diffsynth.pipelines.toy", raising=False)
    diffsynth.pipelines.__path__ += diffsynth.pipelines._folders()
    door = importlib.import_module("diffsynth.pipelines.toy")
    assert door.ToyPipeline is resolve("diffsynth_toy.pipeline:ToyPipeline")
    del sys.modules["diffsynth.pipelines.toy"]


def test_effect_of_register_guidance(toy):
    toy("register_guidance")
    guidance = parse_guidance("interval:low=0.5")
    predictions = {"cond": torch.full((3, 2), 3.0), "uncond": torch.ones(3, 2)}
    step = GuidanceStep(torch.zeros(3, 2), torch.tensor([0.9, 0.6, 0.3]), 0, 4, True, {})
    assert guidance.combine(predictions, 4.0, step)[:, 0].tolist() == [3, 9, 3]


def test_effect_of_register_loras(toy):
    folder = toy("register_architectures", "register_loras")
    pipe = resolve("diffsynth_toy.pipeline:ToyPipeline")
    spec = published_lora(pipe, None, [folder / "toy-fast-4steps-v2.safetensors"])
    assert spec.defaults == {"num_inference_steps": 4, "cfg_scale": 1.0}


def test_effect_of_resolve_source(toy, tmp_path):
    folder = toy("register_architectures", "resolve_source")
    (tmp_path / "store").mkdir()
    shutil.copy(folder / "dit.safetensors", tmp_path / "store" / "net.safetensors")
    pipe = resolve("diffsynth_toy.pipeline:ToyPipeline").from_pretrained(
        model_configs=[diffsynth.ModelConfig.from_source("store://*.safetensors")], device="cpu"
    )
    assert pipe.component_files["dit"] == [tmp_path / "store" / "net.safetensors"]


@pytest.fixture
def logged(toy, caplog):
    """Return a function that generates with a page's observer installed and returns its log lines."""

    def run(name: str) -> list[str]:
        caplog.set_level(logging.INFO, logger="diffsynth_toy.plugin")
        toy(*MODEL, name)
        draw()
        return [record.getMessage() for record in caplog.records if record.name == "diffsynth_toy.plugin"]

    return run


def test_effect_of_checkpoint_recognized(logged):
    assert logged("checkpoint_recognized") == ["dit.safetensors: toy_dit, told by metadata"]


def test_effect_of_component_loaded(logged):
    (line,) = logged("component_loaded")
    assert re.fullmatch(r"dit is a toy_dit, loaded in \d+\.\d s", line)


def test_effect_of_pipeline_ready(logged):
    assert logged("pipeline_ready") == ["ToyPipeline on cpu"]


def test_effect_of_denoise_started(logged):
    assert logged("denoise_started") == ["2 steps on (1, 3, 32, 32)"]


def test_effect_of_step_done(logged):
    assert logged("step_done") == ["1/2 at sigma 0.500", "2/2 at sigma 0.000"]


def test_effect_of_training_step_done(toy, tmp_path):
    toy("training_step_done")
    for step in (10, 20):
        _discovery.notify("training_step_done", step=step, loss=0.5, metrics={"loss": 0.5, "mse": 0.25})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[1]) == {"step": 20, "loss": 0.5, "mse": 0.25}


def test_effect_of_adapter_saved(toy, tmp_path):
    folder = toy("adapter_saved")
    _discovery.notify("adapter_saved", path=folder / "dit.safetensors", step=7)
    assert (tmp_path / "backup" / "7-dit.safetensors").read_bytes() == (folder / "dit.safetensors").read_bytes()
