"""Messages about packages that are not installed: each names the package and the install command."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from types import ModuleType

import pytest
from click.testing import CliRunner

from diffsynth import _discovery, registry
from diffsynth._discovery import Catalog, Declared, Plugin
from diffsynth.cli.group import program
from diffsynth.core.loader import first_party, header, recognize
from diffsynth.core.loader.convert import Rename
from diffsynth.core.loader.layouts import layout_of
from diffsynth.errors import UnknownModel, Unrecognized
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, CommandSpec, ModelSpec
from source_tree import ROOT

PACKAGES = {
    "diffsynth-absent": {
        "models": {"absent-1.3b": "Owner/Absent-1.3B", "absent-tiny": None},
        "commands": ["vanish"],
        "architectures": {"absent_dit": [["blocks.N.attn.q", "blocks.N.attn.k", "head"], ["layers.N.qkv", "out"]]},
    },
    "diffsynth-train": {"commands": ["train"], "models": {"hidden": None}, "architectures": {"x_dit": [["head"]]}},
}

spec = importlib.util.spec_from_file_location("first_party_tool", ROOT / "tools" / "first_party.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setattr(first_party, "packages", lambda: PACKAGES)
    _discovery.refresh()


def test_the_file_is_what_the_families_declare():
    assert tool.TARGET.read_text(encoding="utf-8") == tool.text(), "run tools/first_party.py"
    assert "z-image-turbo" in first_party.packages()["diffsynth-zimage"]["models"]
    assert "z_image_dit" in first_party.packages()["diffsynth-zimage"]["architectures"]
    assert first_party.packages()["diffsynth-train"] == {"commands": ["train"]}


def test_it_is_read_only_after_a_failure():
    code = (
        "import sys, diffsynth; from diffsynth import registry; registry.list(); registry.get('z-image-turbo');"
        "print('diffsynth.core.loader.first_party' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize("name", ["absent-1.3b", "ABSENT-1.3B", "owner/absent-1.3b", "absent:absent-1.3b"])
def test_a_model_of_a_package_that_is_not_installed(packages, name):
    with pytest.raises(UnknownModel) as caught:
        registry.get(name)
    assert str(caught.value) == (
        f"{name!r} is not installed. It is in diffsynth-absent. Run: pip install diffsynth-absent"
    )


def test_a_misspelled_one(packages):
    with pytest.raises(UnknownModel) as caught:
        registry.get("absent-1.4b")
    assert str(caught.value) == (
        "'absent-1.4b' is not installed. Did you mean 'absent-1.3b' of diffsynth-absent? "
        "Run: pip install diffsynth-absent"
    )


def test_one_that_nobody_has(packages):
    with pytest.raises(UnknownModel, match=r"^'qqqq' is not installed\. Run: diffsynth list$"):
        registry.get("qqqq")


def test_what_is_installed_is_nearer(packages):
    with pytest.raises(UnknownModel, match=r"did you mean 'z-image-turbo'\?$"):
        registry.get("z-image-trubo")


def test_a_package_that_is_left_out(packages, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "zimage")
    _discovery.refresh()
    with pytest.raises(UnknownModel, match="diffsynth-train is installed, but DIFFSYNTH_PLUGINS leaves it out. Set: D"):
        registry.get("hidden")
    assert first_party.how_to_get("diffsynth-train").endswith("Set: DIFFSYNTH_PLUGINS=train,zimage")
    monkeypatch.delenv("DIFFSYNTH_PLUGINS")
    _discovery.refresh()


def test_a_package_that_is_too_old(packages):
    with pytest.raises(UnknownModel, match=r"It is in diffsynth-train\. Run: pip install -U diffsynth-train"):
        registry.get("hidden")


def test_a_command(packages):
    result = CliRunner().invoke(program, ["vanish"])
    assert result.exit_code == 2
    assert "there is no command 'vanish'  It is in diffsynth-absent. Run: pip install diffsynth-absent" in result.stderr


def test_an_architecture(packages):
    assert first_party.where_is_architecture("absent_dit") == (
        "It is in diffsynth-absent. Run: pip install diffsynth-absent"
    )
    assert first_party.where_is_architecture("nobody_dit") == ""


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_keys(packages, prefix):
    message = "Its keys are those of absent_dit, which is in diffsynth-absent. Run: pip install diffsynth-absent"
    for keys in (
        ["blocks.0.attn.q", "blocks.11.attn.k", "head", "more"],
        ["blocks.0.attn.q", "blocks.11.attn.k"],
        ["layers.3.qkv", "out"],
    ):
        assert first_party.whose_keys([prefix + key for key in keys]) == message
    assert first_party.whose_keys([prefix + "blocks.0.attn.q"]) == ""
    assert first_party.whose_keys([prefix + "head"]) == ""  # of diffsynth-train, which is in use: recognition says why
    assert first_party.whose_keys([]) == ""


def test_the_real_z_image_without_its_package(monkeypatch):
    """With core alone, `load("z-image-turbo")` and its published file both name the package to install."""
    find = importlib.metadata.distribution

    def distribution(name):
        if name == "diffsynth-zimage":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    checkpoints = _discovery.catalog().layouts()[1]
    shapes = layout_of(next(each for each in checkpoints if each.layout.endswith("z_image_turbo_dit.json.gz")))
    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "")
    _discovery.refresh()
    try:
        with pytest.raises(UnknownModel, match=r"It is in diffsynth-zimage\. Run: pip install diffsynth-zimage$"):
            registry.get("Tongyi-MAI/Z-Image-Turbo")
        layouts = _discovery.catalog().layouts()
        for metadata in ({}, {"diffsynth.architecture": "z_image_dit"}):
            with pytest.raises(Unrecognized) as caught:
                recognize.recognize(header_of(shapes, metadata), *layouts)
            assert "z_image_dit" in str(caught.value)
            assert str(caught.value).endswith("in diffsynth-zimage. Run: pip install diffsynth-zimage")
    finally:
        monkeypatch.delenv("DIFFSYNTH_PLUGINS")
        _discovery.refresh()


def header_of(shapes, metadata):
    tensors = {key: header.TensorInfo("BF16", shape) for key, shape in shapes.items()}
    return header.Header(tensors=tensors, metadata=metadata)


def test_core_alone_lists_what_to_install(monkeypatch):
    monkeypatch.setattr(_discovery, "_discovered", _discovery._Discovered(Catalog(), manager=None))
    result = CliRunner().invoke(program, ["list"])
    assert result.exit_code == 0
    first, *lines = result.stdout.splitlines()
    assert first == "No models are installed. Each model family is a package:"
    assert any(re.match(r"  pip install diffsynth-zimage +# z-image, z-image-nano, ", line) for line in lines)
    assert all(line.startswith("  pip install diffsynth-") for line in lines)


def test_the_generator_takes_what_a_family_may_have(monkeypatch):
    """The generator handles other names, a layout without a file, a model in a wheel, and a family without anything."""

    def declared(fact, distribution="diffsynth-new"):
        return Declared(fact, "new", distribution, "1.0")

    dit = ArchitectureSpec(
        name="new_dit", module="a:B", config="a:C", infer_config="a:d", tiny="a:E", tiny_inputs="a:f",
        required=("layers.{n}.attention.to_q.weight", "x_pad"),
    )  # fmt: skip
    layouts = (
        CheckpointSpec(name="new_dit", architecture="new_dit"),
        CheckpointSpec(
            name="new_dit/renamed",
            architecture="new_dit",
            rules="first_party_rules:RULES",
            layout="diffsynth_zimage:layouts/z_image_turbo_dit.json.gz",
        ),
        CheckpointSpec(name="new_dit/unproved", architecture="new_dit", rules="first_party_rules:RULES"),
    )
    model = ModelSpec(name="new", family="new", task="t", pipeline="a:P", components={})
    catalog = Catalog(
        plugins=(Plugin("new", "diffsynth-new", "1.0"),),
        models=(declared(model), declared(ModelSpec(**{**vars(model), "name": "other"}), "other")),
        commands=(declared(CommandSpec(name="draw", command="a:c")),),
        architectures=(declared(dit),),
        checkpoints=tuple(map(declared, layouts)),
    )
    rules = ModuleType("first_party_rules")
    rules.RULES = (Rename("x_pad_token", "x_pad"),)
    monkeypatch.setitem(sys.modules, "first_party_rules", rules)
    found = tool.collect(catalog, ["diffsynth-empty", "diffsynth-new"])
    query = "layers.N.attention.to_q.weight"
    assert json.loads(json.dumps(found)) == {
        "diffsynth-new": {
            "models": {"new": None},
            "commands": ["draw"],
            "architectures": {"new_dit": [[query, "x_pad"], [query, "x_pad_token"]]},
        }
    }
