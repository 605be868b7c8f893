"""Tests of the tiny hub with a third-party plugin, and of errors in its declarations."""

from __future__ import annotations

import gzip
import json
import re
import sys

import pytest

import diffsynth
from diffsynth.core.loader import header
from diffsynth.core.loader.convert import Split
from diffsynth.errors import KeyMismatch, Unrecognized
from diffsynth.testing import tiny_hub
from fake_plugins import Site, forget


@pytest.fixture
def site(tmp_path, monkeypatch):
    before = set(sys.modules)
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "")
    forget(before)  # what earlier tests discovered
    yield Site(folder, monkeypatch)
    forget(before)


PLUGIN = """
from diffsynth.hookspecs import hookimpl
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, ModelSpec

DIFFSYNTH_API = 2


@hookimpl
def register_models(register):
    register(ModelSpec(name="odd-1", family="odd", task="text-to-image", hub_id="Odd/Odd-1",
                       pipeline="fake_odd.parts:OddPipeline", components={{{components}}},
                       tiny={tiny}{more}))


@hookimpl
def register_architectures(register):
    register(ArchitectureSpec(name="odd_net", module="fake_odd.parts:OddNet", config="fake_odd.parts:OddConfig",
                              infer_config="fake_odd.parts:infer", required=("blocks.{{n}}.q.weight", "gain"),
                              tiny="fake_odd.parts:TINY", tiny_inputs="fake_odd.parts:infer"))


@hookimpl
def register_checkpoints(register):
    register(CheckpointSpec(name="odd_net", architecture="odd_net", rules="fake_odd.parts:RULES",
                            layout="fake_odd:odd.json.gz", files=("Odd/Odd-1:net/*.safetensors",),
                            file_stem="odd_net"))
"""

PARTS = """
import dataclasses
import torch
from torch import nn
from diffsynth.core.loader.convert import Drop, Rename, Split
from diffsynth.runtime.role import Processor, Role
from toy_pipeline import ToyPipeline


@dataclasses.dataclass(frozen=True)
class OddConfig:
    width: int = 512
    depth: int = 6


TINY = OddConfig(width=8, depth=2)
RULES = (
    Split("stack.{n}.qkv.weight", ("blocks.{n}.q.weight", "blocks.{n}.k.weight", "blocks.{n}.v.weight")),
    Rename("scale", "gain"),
    Drop("unread"),
)


def infer(shapes):
    return OddConfig(shapes["blocks.0.q.weight"][0], sum(key.endswith(".q.weight") for key in shapes))


class OddNet(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        part = lambda: nn.Linear(config.width, config.width, bias=False)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": part(), "k": part(), "v": part()}) for _ in range(config.depth))
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, latents, sigma, colour):
        return self.gain * (latents - colour.view(-1, 1, 1, 1)) / sigma.view(-1, 1, 1, 1)


class OddPipeline(ToyPipeline):
    roles = {"dit": Role(architectures=("odd_net",)), "second": Role(architectures=("odd_net",), optional=True)}
"""

LAYOUT = {
    **{f"stack.{n}.qkv.weight": (1536, 512) for n in range(6)},
    "scale": (),
    "unread": (512, 3),
}


def install(
    site: Site, tiny: str = "{'dit': {'width': 16}}", more: str = "", *, roles: tuple = ("dit",), published: bool = True
) -> None:
    """Install the plugin `odd`; unless `published`, its checkpoint has no layout, rules or files."""
    components = ", ".join(f'"{role}": "Odd/Odd-1:net/*.safetensors"' for role in roles)
    code = PLUGIN.format(tiny=tiny, more=more, components=components)
    if not published:
        code = re.sub(r", rules=.*?file_stem", ", file_stem", code, flags=re.DOTALL)
    site.install("odd", code)
    folder = site.folder / "fake_odd"
    (folder / "parts.py").write_text(PARTS)
    (folder / "odd.json.gz").write_bytes(gzip.compress(json.dumps({"tensors": LAYOUT}).encode()))


def test_a_third_party_model_has_a_tiny_version(site, tmp_path):
    install(site)
    assert site.discover().problems == ()
    root = tmp_path / "hub"
    written = tiny_hub(root)
    assert [path.relative_to(root).as_posix() for path in written] == [
        "Odd/Odd-1/net/odd_net-00001-of-00002.safetensors",
        "Odd/Odd-1/net/odd_net-00002-of-00002.safetensors",
    ]
    shapes = header.read(written).shapes
    assert shapes == {"stack.0.qkv.weight": (48, 16), "stack.1.qkv.weight": (48, 16), "scale": (), "unread": (16, 3)}
    pipe = diffsynth.load("odd-1", device="cpu", base_path=root)
    assert pipe.dit.config.width == 16
    assert isinstance(pipe("ab", height=16, width=16, num_inference_steps=2, seed=0), float)


def test_a_third_party_model_under_its_own_key_names(site, tmp_path):
    install(site, published=False)
    shapes = header.read(tiny_hub(tmp_path / "hub")).shapes
    assert set(shapes) == {*(f"blocks.{n}.{part}.weight" for n in range(2) for part in "qkv"), "gain"}
    assert diffsynth.load("odd-1", device="cpu", base_path=tmp_path / "hub").dit.config.width == 16


PARTS_OF_A_BLOCK = ("blocks.{n}.q.weight", "blocks.{n}.k.weight", "blocks.{n}.v.weight")
WRONG = {
    "target": (Split("stack.{n}.qkv.weight", (*PARTS_OF_A_BLOCK[:2], "blocks.{n}.k2.weight")), KeyMismatch),
    "source": (Split("stack.{n}.kqv.weight", PARTS_OF_A_BLOCK), Unrecognized),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_rule_made_wrong_on_purpose_makes_loading_fail(wrong, site, tmp_path, monkeypatch):
    install(site)
    tiny_hub(tmp_path / "hub")
    import fake_odd.parts

    rule, error = WRONG[wrong]
    monkeypatch.setattr(fake_odd.parts, "RULES", (rule, *fake_odd.parts.RULES[1:]))
    with pytest.raises(error):
        diffsynth.load("odd-1", device="cpu", base_path=tmp_path / "hub")
    with pytest.raises(KeyMismatch, match="does not fit: .*missing"):
        tiny_hub(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_two_components_of_one_file_must_agree(site, tmp_path):
    install(site, "{'dit': {'width': 16}, 'second': {'width': 32}}", roles=("dit", "second"))
    message = r"Odd/Odd-1:net/\*.safetensors holds two components, and 'stack.0.qkv.weight' would be \(48, 16\)"
    with pytest.raises(ValueError, match=message):
        tiny_hub(tmp_path / "hub")


MISTAKES = {
    "a field": ("{'dit': {'widht': 16}}", r"'odd-1': tiny\['dit'\] does not fit fake_odd.parts:OddConfig: .*widht"),
    "a size": (
        "{'dit': {'width': 3000}}",
        r"take 108,018,002 bytes, limit 40,000,000; the largest is 'stack.\d.qkv.weight' of shape \(9000, 3000\)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_made_small(mistake, site, tmp_path):
    tiny, message = MISTAKES[mistake]
    install(site, tiny)
    with pytest.raises(ValueError, match=message):
        tiny_hub(tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("tiny", "more", "message"),
    [
        ("{'dits': {'width': 3}}", "", r"tiny has 'dits', no component; did you mean 'dit'\? Its components: dit"),
        ("{'vae': {'width': 3}}", "", r"tiny has 'vae', no component\. Its components: dit"),
        ("{'dit': 3}", "", r"tiny\['dit'\] is 3, expected a mapping"),
        ("{}", ", tiny_processors={'tokenizer': 'no_colon'}", "reference 'no_colon': expected"),
        ("{}", ", tiny_processors={'tokenizer': 'fake_odd.nothing:write'}", "there is no module 'fake_odd.nothing'"),
    ],
)
def test_a_declaration_is_checked_when_it_is_made(tiny, more, message, site):
    install(site, tiny, more)
    (problem,) = site.discover().problems
    assert re.search(message, problem.error)
