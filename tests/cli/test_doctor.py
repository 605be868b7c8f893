"""Tests of `diffsynth doctor`: each fault is found and reported with a next action."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
from click.testing import CliRunner

from diffsynth import _discovery, diagnosis, registry
from diffsynth._discovery import Declared, Problem
from diffsynth.cli.group import program
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.registry import BACKENDS, RegisteredBackend
from diffsynth.diagnosis import environment, installed, machine
from diffsynth.diagnosis.finding import Finding
from diffsynth.spec import QuantizationSpec
from fake_plugins import forget, install
from image_pipeline import catalog, use


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def doctor(*arguments):
    return CliRunner().invoke(program, ["doctor", *arguments])


def named(findings) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_good_installation():
    result = doctor("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["usable"] is True
    assert list(report["sections"]) == list(diagnosis.SECTIONS)
    findings = [finding for section in report["sections"].values() for finding in section]
    assert {finding["state"] for finding in findings} <= {"ok", "note"}
    assert all(finding["next_action"] for finding in findings if finding["state"] != "ok")
    assert len(report["sections"]["questions"]) == 6
    assert all(finding["next_action"] for finding in report["sections"]["questions"])


def test_as_text():
    result = doctor()
    assert result.exit_code == 0
    assert result.stdout.endswith("\nNothing is broken.\n")
    assert "-> Run: diffsynth recognize FILE" in result.stdout
    assert [line for line in result.stdout.splitlines() if line and line[0] != " "][:-1] == list(diagnosis.SECTIONS)


def test_versions_of_our_packages_and_of_what_they_need():
    ours, libraries = named(installed.distributions()), named(installed.requirements())
    assert ours["diffsynth-core"].seen == importlib.metadata.version("diffsynth-core")
    assert {"diffsynth-zimage", "diffsynth-train"} <= set(ours)
    assert libraries["torch"].seen == importlib.metadata.version("torch")
    assert {"transformers", "safetensors", "peft"} <= set(libraries)
    assert "diffsynth-core" not in libraries  # listed among our packages, unless its version is wrong


@pytest.fixture
def versions(monkeypatch):
    """Return a dict that replaces the versions of distributions; None means not installed."""
    known, changed = importlib.metadata.version, {}

    def version(name):
        if changed.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return changed.get(name) or known(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return changed


def test_a_library_that_is_too_new_or_missing(versions):
    versions |= {"transformers": "6.0.1", "einops": None}
    found = named(installed.requirements())
    assert (found["transformers"].state, found["einops"].state) == ("broken", "broken")
    assert "6.0.1; diffsynth-core needs" in found["transformers"].seen
    versions["diffsynth-core"] = "0.0.9"
    assert "0.0.9; diffsynth-" in named(installed.requirements())["diffsynth-core"].seen
    del versions["diffsynth-core"]
    assert found["transformers"].next_action == 'Run: pip install "transformers<6,>=5.17"'
    result = doctor()
    assert result.exit_code == 1
    assert "Broken: environment: einops; environment: transformers." in result.stdout


@pytest.mark.parametrize(
    ("version", "bounds", "within"),
    [
        ("2.15.0+cu130", ">=2.11,<3", True),
        ("2.9.1", ">=2.11,<3", False),
        ("3.0.0", "<3,>=2.11", False),
        ("3.0.0rc1", "<3", False),
        ("0.1.0", "==0.1", True),
        ("0.1.1", "==0.1.0", False),
        ("1.0", "~=0.1", True),  # not checked
    ],
)
def test_bounds(version, bounds, within):
    assert installed.is_within(version, bounds) is within


def test_a_package_that_is_not_installed_says_what_it_brings(versions):
    versions["diffsynth-zimage"] = None
    found = named(installed.distributions())["diffsynth-zimage"]
    assert found.state == "note"
    assert "adds z-image" in found.seen
    assert found.next_action == "Run: pip install diffsynth-zimage"


def test_a_broken_plugin(monkeypatch, tmp_path):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "odd,core")
    install(tmp_path, "odd", "import no_such_module\n")
    try:
        _discovery.refresh()
        result = doctor()
        assert result.exit_code == 1
        assert "fake-odd 1.0: No module named 'no_such_module'" in result.stdout
        assert "-> Run: diffsynth plugins --traceback; or: pip uninstall fake-odd" in result.stdout
        monkeypatch.setenv("DIFFSYNTH_STRICT_PLUGINS", "1")
        _discovery._discovered = None
        strict = doctor("--traceback")
        assert strict.exit_code == 1
        assert "cannot be checked: BrokenPlugin: odd (fake-odd 1.0)" in strict.stdout
        assert "DIFFSYNTH_STRICT_PLUGINS" in strict.stdout
        assert "ModuleNotFoundError" in strict.stderr
    finally:
        forget(before)


def test_the_upstream_package(monkeypatch):
    upstream = Problem("diffsynth", "diffsynth", "2.0", "installs the import name. Run: pip uninstall diffsynth")
    monkeypatch.setattr("diffsynth.registry.problems", lambda: [upstream])
    found = named(installed.plugins())["diffsynth"]
    assert found.state == "broken"
    assert "pip uninstall diffsynth" in found.seen


def test_settings_show_values_and_where_they_are_bad(monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", "hf")
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "yes")
    monkeypatch.setenv("DIFFSYNTH_MODEL_PATH", "/x")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "http://me:word@mirror/hf")
    found = named(environment.settings())
    assert found["DIFFSYNTH_DOWNLOAD_SOURCE"].state == "broken"
    assert "expected one of modelscope, huggingface" in found["DIFFSYNTH_DOWNLOAD_SOURCE"].seen
    assert found["DIFFSYNTH_SKIP_DOWNLOAD"].seen == "true (set: 'yes')"
    assert found["DIFFSYNTH_STRICT_PLUGINS"].seen == "false (not set)"
    assert "no such variable; did you mean 'DIFFSYNTH_MODEL_BASE_PATH'?" in found["DIFFSYNTH_MODEL_PATH"].seen
    assert found["HF_ENDPOINT"].seen == "http://***@mirror/hf"
    result = doctor()
    assert result.exit_code == 1
    assert "secret" not in result.stdout + result.stderr
    assert "word@" not in result.stdout
    assert "My LoRA does nothing" in result.stdout  # listed after the question whose check failed


def test_every_variable_is_among_the_settings():
    readers = [name for name in environment.variable_readers() if name != "TRITON_INTERPRET"]
    found = named(environment.settings())
    assert len([name for name in found if name.startswith("DIFFSYNTH_")]) == len(readers) >= 7


def test_an_allowed_plugin_that_is_not_there(monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_PLUGINS", "zimge")
    found = next(one for one in environment.settings() if one.state == "note")
    assert "names 'zimge', which is not installed; did you mean 'zimage'?" in found.seen


def test_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "a" / "b"))
    found = named(environment.folders())["weights"]
    assert found.seen.startswith(f"{tmp_path / 'a' / 'b'} (created when needed), ")
    (tmp_path / "a").write_text("a file")
    found = named(environment.folders())["weights"]
    assert (found.state, found.seen) == ("broken", f"{tmp_path / 'a' / 'b'}: {tmp_path / 'a'} is a file")
    assert found.next_action.startswith("Set DIFFSYNTH_MODEL_BASE_PATH")


def test_a_folder_without_room_or_permission(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    found = named(environment.folders())["weights"]
    assert (found.state, found.seen) == ("note", f"{tmp_path}, 1.0 GiB free: little")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert named(environment.folders())["weights"].seen == f"{tmp_path} cannot be written"


def test_attention_backends_and_the_one_in_use(monkeypatch):
    found = named(machine.attention())
    assert found["sdpa"].seen == "usable; chosen by `auto`"
    assert found["naive"].seen == "usable if chosen by name: it holds the whole score matrix"
    assert found["flash_attention_2"].seen == "tensors are on cpu; flash_attention_2 needs cuda"
    assert found["flex"].state == "ok"
    assert found["in use"].seen.startswith("auto: sdpa")
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "naive")
    assert named(machine.attention())["in use"].seen == "naive, by DIFFSYNTH_ATTENTION_IMPLEMENTATION"
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "flash3")
    broken = named(machine.attention())["in use"]
    assert broken.state == "broken"
    assert "attention backend 'flash3' is unknown" in broken.seen
    assert "unset DIFFSYNTH_ATTENTION_IMPLEMENTATION" in broken.next_action


class Refuses(NaiveAttention):
    def refuses(self, call):
        return "head dim 64 is not 128"


class IsWrong(NaiveAttention):
    def __call__(self, call):
        return super().__call__(call) + 1


class LacksItsLibrary(NaiveAttention):
    def __call__(self, call):
        raise ImportError("libflash.so: cannot open")


def preferred(**backends):
    """Return a patch that registers backends before all others."""
    first = {name: RegisteredBackend(backend, 1000, None) for name, backend in backends.items()}
    return mock.patch.dict(BACKENDS, {**first, **BACKENDS}, clear=True)


def test_the_reason_why_a_backend_is_not_usable():
    with preferred(picky=Refuses(), wrong=IsWrong(), broken=LacksItsLibrary()):
        found = named(machine.attention())
    assert "head dim 64 is not 128" in found["picky"].seen
    assert found["wrong"].seen == "its result is wrong"
    assert (found["in use"].state, found["in use"].seen) == (
        "ok",
        "auto: sdpa; for a call that it refuses, the next usable one",
    )
    assert found["broken"].seen == "ImportError: libflash.so: cannot open"
    assert {found[name].state for name in ("picky", "wrong", "broken")} == {"note"}


def test_auto_takes_one_that_does_not_work():
    class IsWrongAndWilling(IsWrong):
        avoids = None

    with preferred(wrong=IsWrongAndWilling()):
        found = named(machine.attention())["in use"]
    assert (found.state, found.seen) == ("broken", "auto: wrong, but its result is wrong")
    assert "Set DIFFSYNTH_ATTENTION_IMPLEMENTATION to one of sdpa, " in found.next_action


def test_quantization_backends(monkeypatch):
    assert named(machine.quantization())["int8_row"].state == "ok"
    there = Declared(QuantizationSpec(name="int8", backend="json:dumps"), "toy", "toy-dist", "1.0")
    gone = Declared(QuantizationSpec(name="nf4", backend="json:nothing"), "toy", "toy-dist", "1.0")
    use(monkeypatch, catalog(quantization=(there, gone)))
    found = named(machine.quantization())
    assert (found["int8"].state, found["nf4"].state) == ("ok", "broken")
    assert "has no 'nothing'" in found["nf4"].seen


def test_devices():
    found = named(machine.devices())
    assert found["cpu"].state == "ok"
    assert "GiB of memory free" in found["cpu"].seen


def test_a_device_that_does_not_compute():
    found = machine.check_device("meta")
    assert found.state == "broken"
    assert "does not compute" in found.seen


def test_models_and_how_to_get_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
    found = named(installed.models())
    assert found["zimage:z-image-nano"].seen == "weights present"
    absent = sum(record.weights == "absent" for record in registry.list())
    assert absent == len(registry.list()) - 1
    assert set(found) == {"zimage:z-image-nano", "absent"}
    assert found["absent"].seen == f"weights of {absent} of {absent + 1} models"
    assert found["absent"].next_action == (
        "To see them: diffsynth list; a model is downloaded from modelscope when it is first loaded"
    )
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    vae = tmp_path / "Tongyi-MAI" / "Z-Image-Turbo" / "vae" / "diffusion_pytorch_model.safetensors"
    vae.parent.mkdir(parents=True)
    vae.touch()
    found = named(installed.models())
    fewer = sum(record.weights == "absent" for record in registry.list())
    assert fewer < absent
    assert found["absent"].seen == f"weights of {fewer} of {absent + 1} models"
    assert "unset DIFFSYNTH_SKIP_DOWNLOAD" in found["absent"].next_action
    found = found["zimage:z-image-turbo"]
    assert found.seen == "weights partial: dit, text_encoder, tokenizer"
    assert found.next_action.count("modelscope download --model Tongyi-MAI/Z-Image-Turbo") == 3


def test_no_models(monkeypatch):
    use(monkeypatch, catalog(models=()))
    (found,) = installed.models()
    assert found.next_action == "Install a model family; see diffsynth list"


def test_a_check_that_fails_hides_no_other(monkeypatch):
    def crashes():
        yield Finding("first", "ok", "seen")
        raise OSError("disk on fire")

    monkeypatch.setitem(diagnosis.SECTIONS, "folders", (crashes, environment.folders))
    found = diagnosis.diagnose()["folders"]
    assert [finding.state for finding in found[:2]] == ["ok", "broken"]
    assert "OSError: disk on fire" in found[1].seen
    assert len(found) == 4


def test_nothing_is_broken_without_a_next_action():
    with pytest.raises(ValueError, match="no next action"):
        Finding("x", "broken", "it is")


def test_a_torch_that_cannot_be_imported_is_a_finding():
    """A broken torch, the most frequent fault, must not end the diagnosis."""
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("libcudart.so.13: cannot open shared object file")

sys.meta_path.insert(0, Blocked())
from diffsynth.cli import main
main(["doctor"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "cannot be checked: ImportError: libcudart.so.13" in result.stdout
    assert "zimage:z-image-nano" in result.stdout
    assert "Broken: devices: devices; attention: attention" in result.stdout
    assert "Traceback" not in result.stderr
