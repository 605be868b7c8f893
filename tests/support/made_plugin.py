"""A plugin that is made from the template of `diffsynth new-plugin`, passes all checks, and can be broken by edits."""

import gzip
import json

from diffsynth import _discovery
from diffsynth.cli.new_plugin import render
from diffsynth.core.loader import header
from diffsynth.testing.checks import calls
from diffsynth.testing.checks.check import Subject
from diffsynth.testing.suite import CheckRunner, checks_of

NAME = "zzz-made"
PACKAGE = "diffsynth_zzz_made"
DIT = "zzz_made_dit"
LAYOUT = f"layout {DIT}/published"
PIPELINE = f"{PACKAGE}.pipeline:ZzzMadePipeline"
MODEL = f"model {NAME}-1"

MORE = f"""

from diffsynth.spec import (
    AttentionSpec, CommandSpec, DoorSpec, FeatureSpec, GuidanceSpec, LayerWrapperSpec, LoRASpec, ObjectiveSpec,
    QuantizationSpec, SolverSpec, TrainingSpec, WriterSpec,
)

LAYOUT = CheckpointSpec(
    name="{DIT}/published", architecture="{DIT}", rules="{PACKAGE}.convert:RULES", signature="SIGNATURE",
    layout="{PACKAGE}:published.json.gz",
)
SECOND = ()


@hookimpl
def register_attention(register):
    register(AttentionSpec(name="made", backend="{PACKAGE}.attention:BACKEND"))


@hookimpl
def register_solvers(register):
    register(SolverSpec(name="made", solver="diffsynth.sampling.solver:euler"))


@hookimpl
def register_doors(register):
    register(DoorSpec(name="made", folder="{PACKAGE}:doors"))


@hookimpl
def register_training(register):
    register(TrainingSpec(pipeline="{PIPELINE}", trainable=("dit",), schedule="{PACKAGE}.more:schedule"))


@hookimpl
def register_features(register):
    register(FeatureSpec(pipeline="{PIPELINE}", feature="{PACKAGE}.bright:BRIGHT"))


@hookimpl
def register_guidance(register):
    register(GuidanceSpec(name="made", guidance="{PACKAGE}.more:MadeGuidance"))


@hookimpl
def register_writers(register):
    register(WriterSpec(suffix=".made", kind="image", writer="{PACKAGE}.more:write"))


@hookimpl
def register_objectives(register):
    register(ObjectiveSpec(name="made", objective="{PACKAGE}.more:MadeObjective"))


@hookimpl
def register_commands(register):
    register(CommandSpec(name="made", command="{PACKAGE}.more:command"))


@hookimpl
def register_layer_wrappers(register):
    register(LayerWrapperSpec(layer="torch.nn:Bilinear", atomic=True))


@hookimpl
def register_quantization(register):
    register(QuantizationSpec(name="made", backend="{PACKAGE}.more:write"))


@hookimpl
def register_loras(register):
    register(LoRASpec(name="made", pipeline="{PIPELINE}", defaults={{"num_inference_steps": 2}}, names=("*-made.*",)))
"""

MORE_CODE = """
from dataclasses import dataclass

import click
import torch

from diffsynth.runtime.guidance import Guidance
from diffsynth.sampling.solver import euler


def schedule(num_steps):
    return torch.linspace(1, 0, num_steps + 1)


def backwards(velocity, latents, sigmas, **options):
    return euler(lambda *arguments: -velocity(*arguments), latents, sigmas, **options)


def quiet(velocity, latents, sigmas, *, noise=None, on_step=None, progress=iter):
    return euler(velocity, latents, sigmas, progress=progress)


def eager(velocity, latents, sigmas, **options):
    velocity(latents, sigmas[0])
    return euler(velocity, latents, sigmas, **options)


@dataclass(frozen=True, kw_only=True)
class MadeGuidance(Guidance):
    def combine(self, predictions, cfg_scale, step):
        return predictions["cond"] * cfg_scale


def write(output, path, *, record):
    if not hasattr(output, "save"):
        raise TypeError("expected an image")
    output.save(path, format="PNG")


class MadeObjective:
    def units(self):
        return ()

    def loss(self, values, generator):
        return values


@click.command()
def command():
    pass
"""

FEATURE = """
from typing import TypedDict
import torch
from diffsynth import Feature, Phase, unit


class BrightArguments(TypedDict, total=False):
    brightness: float


@unit("latents", phase=Phase.LATENTS)
def brighten(*, latents: torch.Tensor, brightness: float = 0.0):
    return latents + brightness


BRIGHT = Feature("bright", arguments=BrightArguments, units=(brighten,))
"""

ATTENTION = """
from dataclasses import replace
from diffsynth.core.attention.naive import NaiveAttention

class Backend:
    def refuses(self, call):
        return None

    def __call__(self, call):
        return NaiveAttention()(call)

BACKEND = Backend()
"""

RULES = """
from diffsynth.core.loader.convert import Rename

RULES = (Rename("net.{*}", "{*}"),)
"""


class Plugin:
    """The files of a plugin that passes all checks, until some are edited."""

    def __init__(self, folder):
        self.folder = folder
        for path, content in render(NAME).items():
            if path.startswith("src/"):
                self._write(path.removeprefix("src/"), content)
        weights = header.read([folder / PACKAGE / "dit.safetensors"])
        shapes = {f"net.{key}": shape for key, shape in weights.shapes.items()}
        self.write("published.json.gz", gzip.compress(json.dumps({"tensors": shapes}).encode()))
        plugin = (folder / PACKAGE / "plugin.py").read_text()
        plugin = plugin.replace("    register(CheckpointSpec(", "    register(LAYOUT)\n    register(CheckpointSpec(")
        self.write("plugin.py", (plugin + MORE).replace("SIGNATURE", header.signature(shapes)).encode())
        self.write("bright.py", FEATURE.encode())
        self.write("attention.py", ATTENTION.encode())
        self.write("more.py", MORE_CODE.encode())
        self.write("convert.py", RULES.encode())
        self.write("doors/zzz_made.py", f"from {PACKAGE}.pipeline import ZzzMadePipeline\n".encode())
        info = f"{PACKAGE}-0.1.0.dist-info"
        self._write(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: diffsynth-{NAME}\nVersion: 0.1.0\n".encode())
        self._write(f"{info}/entry_points.txt", f"[diffsynth]\n{NAME} = {PACKAGE}.plugin\n".encode())

    def write(self, path, content):
        self._write(f"{PACKAGE}/{path}", content)

    def edit(self, path, old, new):
        text = (self.folder / PACKAGE / path).read_text()
        assert text.count(old) >= 1, f"{path} has no {old!r}"
        self.write(path, text.replace(old, new).encode())

    def failures(self, *, calls=None):
        """Return name -> error of the failed cases, without those skipped because of another failure; with `calls=True`
        only of those that call the model, with `calls=False` only of the others.
        """
        _discovery.refresh()
        checks = checks_of(f"diffsynth-{NAME}")
        runner, called = CheckRunner(checks), self.cases_of_calls()
        chosen = [check for check in checks if calls in (None, check.name in called)]
        tried = [check for check in chosen if not runner.failed_dependency(check)]
        return {check.name: error for check in tried if (error := runner.error(check)) is not None}

    def cases_of_calls(self):
        """Return the names of the cases that call the model."""
        return [check.name for check in calls.checks(Subject.find(f"diffsynth-{NAME}"))]

    def _write(self, path, content):
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)
