"""Tests of the conformance suite: a plugin that violates one requirement fails that case and no other."""

import gzip
import json
import sys

import pytest

from diffsynth import _discovery
from diffsynth.core.loader import header
from diffsynth.testing import CONFORMANCE_VERSION, conformance
from diffsynth.testing.suite import checks_of
from made_plugin import DIT, LAYOUT, NAME, PACKAGE, PIPELINE
from plugin_faults import FAULTS


def test_a_correct_plugin_passes(plugin):
    assert plugin.failures() == {}


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
    "a spelling that nothing reads": (
        "plugin.py",
        'lora_targets=("qkv", "out")',
        'lora_targets=("qkv", "out"), '
        'lora_spellings=(__import__("diffsynth.spec").spec.LoRASpelling(name="odd", down="a", up="b"),)',
        f"{DIT} LoRAs are read as they were written",
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
    "a feature that is left out": ("bright.py", "(*, latents:", "(*, gamma, latents:", "additions to"),
    "an argument of a feature that no unit reads": (
        "bright.py",
        "    brightness: float\n",
        "    brightness: float\n    contrast: float\n",
        "additions to",
    ),
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
        f"training of {PIPELINE} matches",
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
    failures = list(plugin.failures(calls=False))
    assert len(failures) == 1, failures
    assert failures[0].startswith(expected)


def test_a_required_name_that_is_not_there_fails_the_cases_that_read_a_file(plugin):
    plugin.edit("plugin.py", '"letters.weight"', '"words.weight"')
    assert sorted(plugin.failures(calls=False)) == [
        "model zzz-made-1 packaged files match their roles",
        f"{DIT} config is inferred from its shapes",
        f"{DIT} is unchanged by saving and loading",
    ]


ACCEPTED = 'lora_targets=("qkv", "out"), accepted_as=("flux_autoencoder",)'


def test_an_architecture_that_is_accepted_as_another_has_what_roles_need(plugin, monkeypatch):
    """The role `vae` of Z-Image accepts a flux_autoencoder; it calls encode() and decode(), which this one lacks."""
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", f"{NAME},zimage")
    plugin.edit("plugin.py", 'lora_targets=("qkv", "out")', ACCEPTED)
    name = f"{DIT} has what roles of flux_autoencoder need"
    assert list(plugin.failures(calls=False)) == [name]
    (check,) = [check for check in checks_of(f"diffsynth-{NAME}") if check.name == name]
    with pytest.raises(AssertionError, match=r"role 'vae' of .*ZImagePipeline needs encode\(\); .* needs decode\(\)"):
        check.run()
    forward = "    def forward(self, pixels, sigma"
    methods = "    def encode(self, image):\n        return image\n\n    decode = encode\n\n"
    plugin.edit("dit.py", forward, methods + forward)
    for module in [module for module in sys.modules if module.startswith(PACKAGE)]:
        del sys.modules[module]
    assert plugin.failures(calls=False) == {}


def test_an_architecture_is_accepted_as_one_that_is_installed(plugin):
    plugin.edit("plugin.py", 'lora_targets=("qkv", "out")', ACCEPTED.replace("flux", "fluks"))
    _discovery.refresh()
    (check,) = [check for check in checks_of(f"diffsynth-{NAME}") if "has what roles of" in check.name]
    with pytest.raises(AssertionError, match="'fluks_autoencoder' is no architecture.*did you mean 'flux_autoencoder'"):
        check.run()


def test_every_case_is_broken_by_one_of_these(plugin):
    """Every case but those of calls, see `checks/test_calls.py`, and "recognised by signature", which fails only if two
    architectures have one signature.
    """
    _discovery.refresh()
    expected = (
        *(name for *_, name in BROKEN.values()),
        *(each[3] for each in FAULTS.values()),
        *plugin.cases_of_calls(),
    )
    untried = [check.name for check in checks_of(f"diffsynth-{NAME}") if not check.name.startswith(expected)]
    assert untried == [f"{LAYOUT} is recognised by signature, as one architecture"]


def test_two_architectures_of_one_signature(plugin):
    signature = header.signature(
        json.loads(gzip.decompress((plugin.folder / PACKAGE / "published.json.gz").read_bytes()))["tensors"]
    )
    second = SECOND.replace('.convert:RULES"', f'.convert:RULES", signature="{signature}"')
    plugin.edit("plugin.py", "SECOND = ()", f"SECOND = {second}")
    assert list(plugin.failures(calls=False)) == [
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
