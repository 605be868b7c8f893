"""Tests of `registry.register`: plugins of the running program, as in a notebook."""

from __future__ import annotations

import sys
import threading
import types

import pytest
import torch

import diffsynth
from diffsynth import hookimpl, registry
from diffsynth.core.attention import available_backends
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.errors import BrokenPlugin, UnknownModel
from diffsynth.runtime.solvers import find_solver, load_solver, solver_names
from diffsynth.spec import AttentionSpec, GuidanceSpec, ModelSpec, SolverSpec, resolve
from fake_plugins import good

CELL = """
from dataclasses import dataclass
import torch
from diffsynth import Pipeline, Role, hookimpl, unit
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, ModelSpec

DIFFSYNTH_API = 2
FILES = []

@dataclass(frozen=True)
class BlobConfig:
    width: int = 3

class Blob(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.level = torch.nn.Linear(1, config.width)

    def forward(self, x, sigma):
        return x - self.level(sigma[:, None, None])

def infer_config(shapes):
    return BlobConfig(shapes["level.weight"][0])

@unit("sigmas")
def schedule(*, num_inference_steps: int):
    return torch.linspace(1, 0, num_inference_steps + 1)

@unit("latents", random=True)
def noise(*, seeds: list, device: torch.device):
    return torch.stack([torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

@unit("output")
def decode(*, latents: torch.Tensor, gain: float = 1.0):
    return latents * gain

class BlobPipeline(Pipeline):
    roles = {"dit": Role(architectures=("blob",))}
    units = (schedule, noise)
    output_units = (decode,)

    def velocity(self, latents, sigma):
        return self.dit(latents, sigma)

TINY = BlobConfig()

@hookimpl
def register_models(register):
    register(ModelSpec(name="blob-1", family="blob", task="text-to-tensor", pipeline="__main__:BlobPipeline",
                       components={"dit": "here://blob"}, defaults={"num_inference_steps": 2, "gain": 1.0}))

@hookimpl
def register_architectures(register):
    register(ArchitectureSpec(name="blob", module="__main__:Blob", config="__main__:BlobConfig",
                              infer_config="__main__:infer_config", required=("level.weight",),
                              tiny="__main__:TINY", tiny_inputs="__main__:infer_config"))

@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="blob", architecture="blob"))

@hookimpl
def resolve_source(source):
    return FILES if source == "here://blob" else None
"""


@pytest.fixture(autouse=True)
def _nothing_stays(site):
    site.discover()
    yield
    for plugin in registered():
        registry.unregister(plugin)


@pytest.fixture
def notebook(monkeypatch):
    """The module `__main__` of a notebook in which `CELL` was run."""
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)
    exec(CELL, vars(module))
    return module


def registered():
    from diffsynth import _discovery

    return [one.name for one in _discovery.catalog().plugins if one.distribution == "registered"]


def plugin(*specs, **more):
    """An object that declares solvers, attention backends, guidances and models."""
    kinds = {SolverSpec: "solvers", AttentionSpec: "attention", GuidanceSpec: "guidance", ModelSpec: "models"}
    made = types.SimpleNamespace(**{"DIFFSYNTH_API": 2, **more})
    for kind in {kinds[type(spec)] for spec in specs}:
        own = [spec for spec in specs if kinds[type(spec)] == kind]
        name = f"register_{kind}"
        vars(made)[name] = hookimpl(lambda register, own=own: [register(spec) for spec in own], specname=name)
    return made


def solver(name="dash", reference="diffsynth.sampling.solver:euler"):
    return SolverSpec(name=name, solver=reference)


def test_a_model_of_a_notebook_is_listed_loaded_called_and_removed(notebook, tmp_path):
    registry.register(notebook, name="blobs")
    (record,) = registry.list("blob*")
    assert (record.exact_name, record.distribution, record.version) == ("blobs:blob-1", "registered", "in this program")
    assert resolve(record.pipeline) is notebook.BlobPipeline
    module = notebook.Blob(notebook.TINY)
    save_checkpoint(module, tmp_path / "blob.safetensors", architecture="blob", config=notebook.TINY)
    notebook.FILES[:] = [tmp_path / "blob.safetensors"]
    options = {"device": "cpu", "torch_dtype": torch.float32}
    pipe = diffsynth.load("blob-1", **options)
    made = pipe(seed=3, output_type="tensor")
    assert torch.equal(
        made, notebook.BlobPipeline.from_components(dit=module, **options)(seed=3, num_inference_steps=2)
    )
    registry.unregister("blobs")
    assert registry.list() == []
    with pytest.raises(UnknownModel):
        diffsynth.load("blob-1")
    assert torch.equal(pipe(seed=3), made)  # a pipeline that exists keeps what it has


def test_a_cell_that_runs_again_takes_the_place_of_the_former(notebook):
    registry.register(notebook, name="blobs")
    exec(CELL.replace("blob-1", "blob-2"), vars(notebook))
    assert [record.name for record in registry.list()] == ["blob-1"]
    registry.register(notebook, name="blobs")
    assert [record.name for record in registry.list()] == ["blob-2"]
    assert registered() == ["blobs"]


def test_one_that_is_refused_leaves_the_former_in_place():
    registry.register(plugin(solver()), name="mine")
    wrong = plugin(solver(name="euler"))
    with pytest.raises(BrokenPlugin, match="plugin 'mine' is not registered: solver 'euler' is also declared by core"):
        registry.register(wrong, name="mine")
    assert load_solver(find_solver("dash")) is resolve("diffsynth.sampling.solver:euler")
    assert registry.problems() == []
    registry.register(plugin(solver("other")), name="another")  # the one that was refused is gone from the hooks
    assert set(solver_names()) >= {"dash", "other"}


def test_it_survives_a_refresh_and_is_called_as_an_observer(site):
    calls = []

    def observe(step, num_steps):
        calls.append((step, num_steps))

    registry.register(plugin(solver(), step_done=hookimpl(observe)), name="mine")
    site.install("good", good("fake_good", "good-1"))
    registry.refresh()
    assert {record.name for record in registry.list()} == {"good-1"}
    assert "dash" in solver_names()
    from diffsynth import _discovery

    _discovery.notify("step_done", pipeline=None, step=1, num_steps=2, sigma=0.5)
    registry.unregister("mine")
    _discovery.notify("step_done", pipeline=None, step=2, num_steps=2, sigma=0.0)
    registry.refresh()
    assert (calls, "dash" in solver_names()) == ([(1, 2)], False)


def test_an_installed_plugin_keeps_its_name(site):
    site.install("good", good("fake_good", "good-1"))
    site.discover()
    for name in ("good", "core"):
        with pytest.raises(ValueError, match=f"plugin '{name}' is installed; expected another name"):
            registry.register(plugin(solver()), name=name)
    with pytest.raises(
        ValueError, match="plugin 'good' is not registered; it is installed. Run: pip uninstall fake-good"
    ):
        registry.unregister("good")


def test_a_plugin_that_is_installed_later_has_precedence(site):
    registry.register(plugin(solver()), name="good")
    site.install("good", good("fake_good", "good-1"))
    registry.refresh()
    (problem,) = registry.problems()
    assert (
        str(problem)
        == "good (registered in this program): ValueError: plugin 'good' is installed; expected another name"
    )
    assert "dash" not in solver_names()
    registry.unregister("good")
    registry.refresh()
    assert registry.problems() == []


@pytest.mark.parametrize(
    ("broken", "name", "error", "message"),
    [
        (types.SimpleNamespace(DIFFSYNTH_API=2), "mine", TypeError, "has no function marked @diffsynth.hookimpl"),
        (plugin(solver()), None, TypeError, "is no module; expected name= for it"),
        (plugin(solver()), "a:b", ValueError, r"name='a:b': expected a name of letters"),
        (plugin(solver(), DIFFSYNTH_API=1), "mine", BrokenPlugin, "written for DIFFSYNTH_API 1"),
        (plugin(solver(), DIFFSYNTH_API=None), "mine", BrokenPlugin, "states no DIFFSYNTH_API"),
        (plugin(solver(reference="euler")), "mine", BrokenPlugin, "reference 'euler': expected 'package.module:attrib"),
        (plugin(setp_done=hookimpl(lambda: None)), "mine", BrokenPlugin, "hook 'setp_done'.*did you mean 'step_done'"),
        (plugin(register_models=hookimpl(lambda register: sys.exit(3))), "mine", BrokenPlugin, "SystemExit: 3"),
    ],
)
def test_what_is_refused_raises(broken, name, error, message):
    if broken.DIFFSYNTH_API is None:
        del broken.DIFFSYNTH_API
    with pytest.raises(error, match=message):
        registry.register(broken, name=name)
    assert (registered(), registry.problems()) == ([], [])


def test_removing_what_was_not_registered():
    registry.register(plugin(solver()), name="mine")
    with pytest.raises(ValueError, match="plugin 'mina' is not registered; did you mean 'mine'?"):
        registry.unregister("mina")


def test_a_module_has_its_own_name(monkeypatch):
    module = types.ModuleType("app.my_solvers")
    vars(module).update(vars(plugin(solver())))
    registry.register(module)
    assert registered() == ["my_solvers"]


def test_an_attention_backend_is_there_at_once_replaced_and_removed(notebook):
    backend = "class Backend:\n    def refuses(self, call): return None\n    def __call__(self, call): return call.v\n"
    exec(backend + "BACKEND = Backend()", vars(notebook))
    own = plugin(AttentionSpec(name="mine", backend="__main__:BACKEND", priority=9))
    for _ in range(2):
        notebook.BACKEND = notebook.Backend()
        registry.register(own, name="mine")
        assert available_backends()[0] == "mine"
        assert BACKENDS["mine"].backend is notebook.BACKEND
    registry.unregister("mine")
    assert "mine" not in available_backends()


def test_threads_register_while_others_read():
    failures, stop = [], threading.Event()

    def read():
        while not stop.is_set():
            try:
                assert "euler" in solver_names()
                registry.list()
            except Exception as error:
                failures.append(error)

    def write(number):
        for _ in range(20):
            registry.register(plugin(solver(f"dash{number}")), name=f"mine{number}")
            assert f"dash{number}" in solver_names()
            registry.unregister(f"mine{number}")

    reader, writers = threading.Thread(target=read), [threading.Thread(target=write, args=(each,)) for each in range(4)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert (failures, registered()) == ([], [])
