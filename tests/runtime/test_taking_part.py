"""Records name the plugins that took part in a call, and no others."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from diffsynth import Feature, Phase, hookimpl, provenance, registry, unit
from diffsynth.core.attention import attention, use_attention
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.runtime import declared_backends
from diffsynth.runtime.guidance import ClassifierFree
from diffsynth.runtime.taking_part import plugins_of_call
from diffsynth.runtime.writers import write
from diffsynth.sampling.solver import euler
from diffsynth.spec import (
    ArchitectureSpec,
    AttentionSpec,
    FeatureSpec,
    GuidanceSpec,
    LoRASpec,
    ModelSpec,
    SolverSpec,
    WriterSpec,
)
from image_pipeline import catalog, image_pipeline, use
from toy_pipeline import ToyNet, ToyPipeline

CALL = {"prompt": "red", "seed": 1, "num_inference_steps": 2}
PIPELINE = "fake_part_model:Greys"
HERE = "registered in this program"


class Net(ToyNet):
    """The network of the plugin `network`, which calls attention()."""

    def forward(self, latents, sigma, colour):
        return super().forward(latents, sigma, colour) + 0 * attention(latents, latents, latents)


class Greys(ToyPipeline):
    """The pipeline of the plugin `model`."""


@dataclass(frozen=True, kw_only=True)
class Strong(ClassifierFree):
    """The guidance of the plugin `guidance`."""


class Cache:
    """A step cache of the plugin `guidance`."""


@unit("latents", phase=Phase.LATENTS)
def shift_latents(*, latents: torch.Tensor, shift_by: float = 0.0):
    """Return the latents, moved."""
    return latents + shift_by


def write_label(output, path, *, record):
    """Write the names of the plugins in the record."""
    path.write_text(" ".join(record["plugins"]))


PLUGINS = {
    "model": [
        ModelSpec(name="grey-1", family="grey", task="x", pipeline=PIPELINE, components={"dit": "a/b:c"}),
        ModelSpec(name="grey-2", family="grey", task="x", pipeline=PIPELINE, components={"dit": "a/b:c"}),
    ],
    "network": [
        ArchitectureSpec(
            name="net",
            module="fake_part_network:Net",
            config="fake_part_network:Net",
            infer_config="fake_part_network:Net",
            required=(),
            tiny="fake_part_network:Net",
            tiny_inputs="fake_part_network:Net",
            accepted_as=("toy_net",),
        )
    ],
    "feature": [FeatureSpec(pipeline=PIPELINE, feature="fake_part_feature:SHIFT")],
    "solver": [SolverSpec(name="dash", solver="fake_part_solver:euler")],
    "guidance": [GuidanceSpec(name="strong", guidance="fake_part_guidance:Strong")],
    "attention": [AttentionSpec(name="part", backend="fake_part_attention:BACKEND", priority=-200)],
    "lora": [LoRASpec(name="fast", pipeline=PIPELINE, defaults={"num_inference_steps": 2}, names=("*-fast-*",))],
    "writer": [WriterSpec(suffix=".label", kind="labels", writer="fake_part_writer:write_label")],
    "idle": [SolverSpec(name="idle", solver="fake_part_idle:euler")],
}
CODE = {
    "model": [Greys],
    "network": [Net],
    "feature": [],
    "solver": [euler],
    "guidance": [Strong, Cache],
    "attention": [],
    "lora": [],
    "writer": [write_label],
    "idle": [euler],
}
HOOKS = {"model": "models", "network": "architectures", "feature": "features", "solver": "solvers", "lora": "loras"}


@pytest.fixture(scope="module", autouse=True)
def _plugins():
    """One plugin of each kind, whose code is in a package of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, specs in PLUGINS.items():
            code = types.ModuleType(f"fake_part_{name}")
            for one in CODE[name]:
                setattr(code, one.__name__, one)
                if isinstance(one, type):
                    patch.setattr(one, "__module__", code.__name__)
            patch.setitem(sys.modules, code.__name__, code)
            kind = f"register_{HOOKS.get(name, {'writer': 'writers', 'idle': 'solvers'}.get(name, name))}"
            hook = hookimpl(lambda register, specs=specs: [register(spec) for spec in specs], specname=kind)
            registry.register(types.SimpleNamespace(DIFFSYNTH_API=2, declare=hook), name=name)
        sys.modules["fake_part_feature"].SHIFT = Feature("shift", units=(shift_latents,))
        sys.modules["fake_part_attention"].BACKEND = NaiveAttention()
        yield
        for name in PLUGINS:
            registry.unregister(name)


@pytest.fixture
def pipe():
    made = Greys({"dit": ToyNet()}, device="cpu", torch_dtype=torch.float32)
    return made.named("grey-1", {})


def recorded(pipe, **arguments):
    return dict(pipe(**CALL, **arguments, return_record=True).record["plugins"])


def test_the_model_takes_part_and_nothing_else(pipe):
    assert recorded(pipe) == {"model": HERE}


@pytest.mark.parametrize(
    ("plugin", "used", "unused"),
    [
        ("solver", {"solver": "dash"}, {"solver": "euler"}),
        ("feature", {"shift_by": 0.5}, {"shift_by": 0.0}),
        ("guidance", {"guidance": "strong", "cfg_scale": 2.0}, {"guidance": "strong", "cfg_scale": 1.0}),
        ("guidance", {"guidance": Strong(), "cfg_scale": 2.0}, {"guidance": ClassifierFree(), "cfg_scale": 2.0}),
    ],
)
def test_a_plugin_is_named_when_it_is_used_and_absent_when_not(pipe, plugin, used, unused):
    assert recorded(pipe, **used) == {"model": HERE, plugin: HERE}
    assert recorded(pipe, **unused) == {"model": HERE}


def test_a_step_cache_by_its_class(pipe):
    assert plugins_of_call(pipe, {"step_cache": Cache()}) == {"model": HERE, "guidance": HERE}


def test_the_plugin_of_a_network_and_of_an_attention_backend():
    pipe = Greys({"dit": Net()}, device="cpu", torch_dtype=torch.float32)
    assert recorded(pipe) == {"model": HERE, "network": HERE}
    declared_backends.use_declared_backends()
    with use_attention("part"):
        assert recorded(pipe) == {"model": HERE, "network": HERE, "attention": HERE}
    assert "attention" in provenance.record(pipe, CALL)["plugins"]  # of the latest call
    pipe(**CALL)
    assert "attention" not in provenance.record(pipe, CALL)["plugins"]


def test_a_declared_lora_whose_defaults_are_in_force(pipe, monkeypatch):
    def loaded(name, **defaults):
        lora = types.SimpleNamespace(files=(Path(f"{name}.safetensors"),), call_defaults=defaults)
        monkeypatch.setattr(Greys, "loras", [lora])
        return plugins_of_call(pipe, CALL)

    assert loaded("a-fast-1", num_inference_steps=2) == {"model": HERE, "lora": HERE}
    assert loaded("a-fast-1") == {"model": HERE}
    assert loaded("a-slow-1", num_inference_steps=2) == {"model": HERE}


def test_the_writer_of_the_file(pipe, tmp_path):
    made = pipe(**CALL, return_record=True)
    write(made.output, tmp_path / "a.label", record=made.record)
    assert (tmp_path / "a.label").read_text() == "model writer"
    write({"x": torch.tensor(made.output)}, tmp_path / "a.safetensors", record=made.record)
    assert provenance.read(tmp_path / "a.safetensors")["plugins"] == {"model": HERE}


def test_an_installed_plugin_is_named_by_its_distribution(monkeypatch):
    use(monkeypatch, catalog())
    assert provenance.record(image_pipeline(), {"prompt": ""})["plugins"] == {"diffsynth-toy": "1.2"}
