"""Tests of the conformance suite: a plugin that violates one requirement fails that case and no other."""

import gzip
import json
import sys
from unittest import mock

import pytest

from diffsynth import _discovery
from diffsynth.cli.new_plugin import render
from diffsynth.core.attention.registry import BACKENDS
from diffsynth.core.loader import header
from diffsynth.runtime import declared_backends
from diffsynth.testing import CONFORMANCE_VERSION, conformance
from diffsynth.testing.suite import CheckRunner, checks_of

NAME = "zzz-made"
PACKAGE = "diffsynth_zzz_made"
DIT = "zzz_made_dit"
LAYOUT = f"layout {DIT}/published"

MORE = f"""

from diffsynth.spec import AttentionSpec, DoorSpec, SolverSpec, TrainingSpec

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
    register(TrainingSpec(pipeline="{PACKAGE}.pipeline:ZzzMadePipeline", trainable=("dit",)))
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
        self.write("attention.py", ATTENTION.encode())
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

    def failures(self):
        """Return the names of the failed cases, without those skipped because of another failure."""
        _discovery.refresh()
        checks = checks_of(f"diffsynth-{NAME}")
        runner = CheckRunner(checks)
        return [
            check.name for check in checks if not runner.failed_dependency(check) and runner.error(check) is not None
        ]

    def _write(self, path, content):
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(content)


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    doors = sys.modules.pop("diffsynth.pipelines", None)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", NAME)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(declared_backends, "_in_use", set())
    with mock.patch.dict(BACKENDS):
        yield Plugin(tmp_path)
    for name in [name for name in sys.modules if name.startswith((PACKAGE, "diffsynth.pipelines"))]:
        del sys.modules[name]
    if doors is not None:
        sys.modules["diffsynth.pipelines"] = doors
    _discovery._discovered = None


def test_a_correct_plugin_passes(plugin):
    assert plugin.failures() == []


CONSTRUCTED = "        self.config = config\n"
RETURNED = 'return rearrange(self.pixels(x), "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH, q=PATCH)'
NAIVE = "NaiveAttention()(call)"
SECOND = f"""(ArchitectureSpec(
    name="second", module="{PACKAGE}.dit:ZzzMadeDiT", config="{PACKAGE}.config:ZzzMadeDiTConfig",
    infer_config="{PACKAGE}.config:infer_config", required=(
        "patches.weight", "positions.weight", "letters.weight", "time.mlp.0.weight", "blocks.{{n}}.qkv.weight",
        "pixels.0.weight",
    ), tiny="{PACKAGE}.config:TINY",
    tiny_inputs="{PACKAGE}.config:tiny_inputs",
),)

@hookimpl(specname="register_checkpoints")
def second_checkpoints(register):
    register(CheckpointSpec(name="second", architecture="second", rules="{PACKAGE}.convert:RULES"))

@hookimpl(specname="register_architectures")
def second_architectures(register):
    register(SECOND[0])
"""

BROKEN = {
    "config imports torch": ("config.py", "from dataclasses", "import torch\nfrom dataclasses", "light modules import"),
    "plugin tries numpy": (
        "plugin.py",
        "DIFFSYNTH_API = 2",
        "try:\n    import numpy\nexcept ImportError:\n    pass\nDIFFSYNTH_API = 2",
        "light modules import",
    ),
    "another API": ("plugin.py", "DIFFSYNTH_API = 2", "DIFFSYNTH_API = 1", "states the API version"),
    "raises at import": ("plugin.py", "DIFFSYNTH_API = 2", "DIFFSYNTH_API = 2\n1 / 0", "loads"),
    "somebody's name": ("plugin.py", f'"{DIT}"', '"flux_autoencoder"', "names are unique"),
    "a dead reference": ("plugin.py", ".dit:ZzzMadeDiT", ".dit:Missing", "references resolve"),
    "a reference to another kind": ("plugin.py", ".dit:ZzzMadeDiT", ".config:TINY", "references resolve"),
    "a solver that is no function": ("plugin.py", "sampling.solver:euler", "spec:API_VERSION", "references resolve"),
    "no architecture": ("plugin.py", f'architecture="{DIT}", f', 'architecture="none", f', "references resolve"),
    "a door that breaks": ("doors/zzz_made.py", "ZzzMadePipeline", "Missing", "door made imports"),
    "memory in the constructor": (
        "dit.py",
        CONSTRUCTED,
        CONSTRUCTED + '        self.register_buffer("table", torch.zeros(3, device="cpu"), persistent=False)\n',
        f"{DIT} builds on meta",
    ),
    "a buffer that nobody fills": (
        "dit.py",
        CONSTRUCTED,
        CONSTRUCTED + '        self.register_buffer("table", torch.zeros(3), persistent=False)\n',
        f"{DIT} has no tensor on meta",
    ),
    "a tensor that is no buffer": (
        "dit.py",
        CONSTRUCTED,
        CONSTRUCTED + "        self.table = torch.zeros(3)\n",
        f"{DIT} has no tensor on meta",
    ),
    "NaN": ("dit.py", RETURNED, RETURNED + " * float('nan')", f"{DIT} forward"),
    "dice in forward": ("dit.py", RETURNED, RETURNED + " + torch.rand(1)", f"{DIT} forward"),
    "a depth that is not told": ("config.py", "depth=1 + max", "depth=2 + max", f"{DIT} config is inferred"),
    "a required name that is not there": (
        "plugin.py",
        '"letters.weight"',
        '"words.weight"',
        f"{DIT} config is inferred",
    ),
    "a tuple that comes back a list": (
        "config.py",
        "    depth: int = 2\n",
        "    depth: int = 2\n    axes: tuple = (1, 2)\n",
        f"{DIT} is unchanged by saving",
    ),
    "a weight read past its layer": (
        "dit.py",
        RETURNED,
        RETURNED + " + self.positions.weight.mean()",
        f"{DIT} reads no parameter",
    ),
    "a list of blocks that is not there": (
        "plugin.py",
        'repeated_blocks=("blocks",)',
        'repeated_blocks=("block",)',
        f"{DIT} has the blocks that it declares",
    ),
    "blocks for a step cache that are not there": (
        "plugin.py",
        'repeated_blocks=("blocks",)',
        'repeated_blocks=("blocks",), cached_blocks=("block",)',
        f"{DIT} has the blocks that it declares",
    ),
    "a block that is run without calling it": (
        "dit.py",
        "x = block(x)",
        "x = type(block).forward(block, x)",
        f"{DIT} output does not depend",
    ),
    "a layer to change that is not there": ("plugin.py", '("qkv", "out")', '("qkv", "to_q")', f"{DIT} has the layers"),
    "a layer that is more than a product": (
        "dit.py",
        "self.qkv = nn.Linear(width, 3 * width)",
        'self.qkv = type("Odd", (nn.Linear,), {"forward": lambda self, x: nn.Linear.forward(self, x).abs()})'
        "(width, 3 * width)",
        f"{DIT} output is the same with a LoRA",
    ),
    "another signature": ("plugin.py", 'signature="', 'signature="0', f"{LAYOUT} has the declared signature"),
    "rules that lose a key": (
        "convert.py",
        "(Rename(",
        '(Rename("net.positions.bias", "lost"), Rename(',
        f"{LAYOUT} converts with no missing keys",
    ),
    "two architectures alike": (
        "plugin.py",
        "SECOND = ()",
        f"SECOND = {SECOND}",
        f"{LAYOUT} is recognised by structure",
    ),
    "a condition that nobody writes": ("pipeline.py", "sigma, *, letters", "sigma, *, words, letters", "units of"),
    "a velocity that reads what nobody writes": ("pipeline.py", "sigma, *, ", "sigma, *, gamma, ", "units of"),
    "a default that is no argument": (
        "plugin.py",
        "components={",
        'defaults={"stepz": 4}, components={',
        f"model {NAME}-1 fits",
    ),
    "weights that are not packed": (
        "plugin.py",
        "/dit.safetensors",
        "/missing.safetensors",
        f"model {NAME}-1 packaged files",
    ),
    "training data that goes nowhere": (
        "plugin.py",
        'trainable=("dit",)',
        'trainable=("dit",), data={"caption": "caption"}',
        "training of",
    ),
    "attention without the mask": (
        "attention.py",
        NAIVE,
        "NaiveAttention()(replace(call, mask=None))",
        "attention made equals naive with a mask",
    ),
    "attention that is not causal": (
        "attention.py",
        NAIVE,
        "NaiveAttention()(replace(call, causal=False))",
        "attention made equals naive with the causal mask",
    ),
    "attention without the scale": (
        "attention.py",
        NAIVE,
        "NaiveAttention()(replace(call, scale=40**-0.5))",
        "attention made equals naive with a scale",
    ),
    "attention that cannot group": (
        "attention.py",
        NAIVE,
        f"{NAIVE} * (call.q_per_kv == 1)",
        "attention made equals naive with grouped heads",
    ),
    "attention without windows": (
        "attention.py",
        NAIVE,
        "NaiveAttention()(replace(call, window=None))",
        "attention made equals naive with a window",
    ),
    "attention that mixes samples": (
        "attention.py",
        NAIVE,
        "NaiveAttention()(replace(call, cu_seqlens=None))",
        "attention made equals naive with packed samples",
    ),
    "attention without the bias": (
        "attention.py",
        NAIVE,
        "NaiveAttention()(replace(call, score_bias=None))",
        "attention made equals naive with a score bias",
    ),
    "attention for self-attention alone": (
        "attention.py",
        NAIVE,
        f"{NAIVE} * (1 + 0 ** abs(call.k.shape[1] - 111) * call.is_plain)",
        "attention made equals naive with another number of keys",
    ),
    "attention that misjudges the plain case": (
        "attention.py",
        NAIVE,
        f"{NAIVE} * (1 + (call.k.shape[1] == 63) * (call.q_per_kv == 1) * (call.scale < 0.5))",
        "attention made equals naive with a plain call",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_fails_its_case_and_no_other(plugin, name):
    path, old, new, expected = BROKEN[name]
    plugin.edit(path, old, new)
    failures = plugin.failures()
    assert len(failures) == 1, failures
    assert failures[0].startswith(expected)


ACCEPTED = 'lora_targets=("qkv", "out"), accepted_as=("flux_autoencoder",)'


def test_an_architecture_that_is_accepted_as_another_has_what_roles_need(plugin, monkeypatch):
    """The role `vae` of Z-Image accepts a flux_autoencoder; it calls encode() and decode(), which this one lacks."""
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", f"{NAME},zimage")
    plugin.edit("plugin.py", 'lora_targets=("qkv", "out")', ACCEPTED)
    name = f"{DIT} has what roles of flux_autoencoder need"
    assert plugin.failures() == [name]
    (check,) = [check for check in checks_of(f"diffsynth-{NAME}") if check.name == name]
    with pytest.raises(AssertionError, match=r"role 'vae' of .*ZImagePipeline needs encode\(\); .* needs decode\(\)"):
        check.run()
    forward = "    def forward(self, pixels, sigma"
    methods = "    def encode(self, image):\n        return image\n\n    decode = encode\n\n"
    plugin.edit("dit.py", forward, methods + forward)
    for module in [module for module in sys.modules if module.startswith(PACKAGE)]:
        del sys.modules[module]
    assert plugin.failures() == []


def test_an_architecture_is_accepted_as_one_that_is_installed(plugin):
    plugin.edit("plugin.py", 'lora_targets=("qkv", "out")', ACCEPTED.replace("flux", "fluks"))
    _discovery.refresh()
    (check,) = [check for check in checks_of(f"diffsynth-{NAME}") if "has what roles of" in check.name]
    with pytest.raises(AssertionError, match="'fluks_autoencoder' is no architecture.*did you mean 'flux_autoencoder'"):
        check.run()


def test_every_case_is_broken_by_one_of_these(plugin):
    """Every case but "recognised by signature", which fails only if two architectures have one signature."""
    _discovery.refresh()
    expected = [name for *_, name in BROKEN.values()]
    untried = [check.name for check in checks_of(f"diffsynth-{NAME}") if not check.name.startswith(tuple(expected))]
    assert untried == [f"{LAYOUT} is recognised by signature, as one architecture"]


def test_two_architectures_of_one_signature(plugin):
    signature = header.signature(
        json.loads(gzip.decompress((plugin.folder / PACKAGE / "published.json.gz").read_bytes()))["tensors"]
    )
    second = SECOND.replace('.convert:RULES"', f'.convert:RULES", signature="{signature}"')
    plugin.edit("plugin.py", "SECOND = ()", f"SECOND = {second}")
    assert plugin.failures() == [
        f"{LAYOUT} is recognised by signature, as one architecture",
        f"{LAYOUT} is recognised by structure, as one architecture",
    ]


def test_a_case_fails_with_its_cause_and_what_builds_on_it_is_skipped(plugin):
    plugin.edit("dit.py", RETURNED, RETURNED + " * float('nan')")
    _discovery.refresh()
    run = conformance(f"diffsynth-{NAME}")
    (mark,) = run.pytestmark
    cases = {case.id: case.values[0] for case in mark.args[1]}
    with pytest.raises(AssertionError, match="returned NaN or infinity; is every parameter initialised"):
        run(cases[f"{DIT} forward is finite and reproducible"])
    with pytest.raises(pytest.skip.Exception, match="while 'zzz_made_dit forward"):
        run(cases[f"{DIT} is unchanged by saving and loading"])
    run(cases[f"{DIT} builds on meta without allocating memory"])


def test_a_backend_that_refuses_is_skipped_with_its_reason(plugin):
    plugin.edit("attention.py", "return None", "return 'no such device'")
    _discovery.refresh()
    run = conformance(f"diffsynth-{NAME}")
    cases = {case.id: case.values[0] for case in run.pytestmark[0].args[1]}
    with pytest.raises(pytest.skip.Exception, match="made refuses here: float32: no such device"):
        run(cases["attention made equals naive with a mask"])


def test_a_distribution_that_is_not_there():
    with pytest.raises(ValueError, match="'diffsynth-cora' has no plugin; did you mean 'diffsynth-core'"):
        conformance("diffsynth-cora")


def test_without_pytest_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytest", None)
    with pytest.raises(ImportError, match="Run: pip install pytest"):
        conformance("diffsynth-core")


def test_the_version_is_the_one_of_the_manual():
    from source_tree import ROOT

    assert (
        f"`diffsynth.testing.CONFORMANCE_VERSION` is {CONFORMANCE_VERSION}."
        in (ROOT / "docs/conformance.md").read_text()
    )
