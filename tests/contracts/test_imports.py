"""Allowed imports between layers and packages, and packages that light modules must not import."""

import json
import subprocess
import sys

import pytest

from source_tree import FAMILIES, LAYERS, imports, is_light, layer, modules

HEAVY = ("torch", "numpy", "transformers")

BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocked())
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "code",
    [
        "import diffsynth",
        "import diffsynth; diffsynth.registry.list()",
        "from diffsynth import registry; registry.problems()",
        "import diffsynth; diffsynth.hookimpl; diffsynth.spec; diffsynth.errors; diffsynth.__version__",
        "from diffsynth import ModelConfig",
        "from click.testing import CliRunner; from diffsynth.cli.group import program\n"
        "for line in ('list', 'plugins', '--help', 'info z-image-turbo'): CliRunner().invoke(program, line.split())",
    ],
)
def test_import_budget(code):
    loaded = json.loads(run(f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert set(loaded) & set(HEAVY) == set()


UNASKED = {
    *("accelerate", "av", "diffusers", "huggingface_hub", "kernels", "modelscope", "peft", "rich", "scipy", "sympy"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor", "torchvision"),
    *("transformers", "triton"),
}
"""Modules that a call of a small model on the CPU does not need; each takes longer to import than the call."""


def test_a_whole_generate_imports_no_more_than_it_needs(tmp_path):
    """Modules of `import torch` itself, which change with its version, do not count."""
    out = tmp_path / "x.png"
    code = f"""
import json, sys
import torch
before = set(sys.modules)
from diffsynth.cli import main
try:
    main(["generate", "z-image-nano", "a red apple", "--height=32", "--width=32", "--steps=1", "-o", {str(out)!r}])
except SystemExit as ended:
    assert not ended.code, ended.code
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    loaded = json.loads(run(code).splitlines()[-1])
    assert out.stat().st_size > 0
    assert "diffsynth.models.qwen3" in loaded
    assert [name for name in loaded if name in UNASKED] == []


def test_import_diffsynth_loads_nothing_else_of_ours():
    loaded = json.loads(run("import diffsynth, sys, json; print(json.dumps(sorted(sys.modules)))"))
    assert [name for name in loaded if name.startswith("diffsynth")] == ["diffsynth"]


def test_light_modules_import_with_torch_blocked():
    light = [name for name in modules() if is_light(name)]
    assert {"diffsynth.registry", "diffsynth.core.loader.recognize", "diffsynth.models.plugin"} <= set(light)
    code = f"""
import importlib, traceback
failed = []
for name in {light!r}:
    try:
        importlib.import_module(name)
    except ImportError:
        failed.append(name + ": " + traceback.format_exc(limit=-2))
print("\\n".join(failed))
"""
    assert run(BLOCK + code).strip() == ""


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] == "diffsynth"])
def test_layers_of_core(name):
    own = LAYERS.index(layer(name))
    for imported, line in imports(name):
        assert imported.split(".")[0] == "diffsynth", f"{name}:{line}: core imports {imported}"
        there = layer(imported)
        assert LAYERS.index(there) <= own, f"{name}:{line} ({LAYERS[own]}) imports {imported} ({there})"


@pytest.mark.parametrize("name", [name for name in modules() if name.split(".")[0] != "diffsynth"])
def test_families_meet_only_through_core(name):
    package = name.split(".")[0]
    for imported, line in imports(name):
        assert imported.split(".")[0] in ("diffsynth", package), f"{name}:{line} imports {imported}"


def test_core_names_no_family():
    for name in modules():
        if name.split(".")[0] == "diffsynth":
            text = modules()[name].read_text(encoding="utf-8")
            # spec.py's docstring shows sources and references by the example of one family.
            named = [family for family in FAMILIES if family in text and name != "diffsynth.spec"]
            assert named == [], f"{name} names {named}"
