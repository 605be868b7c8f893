"""Contents of the wheels, and commands in environments where only these wheels are installed."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from source_tree import ROOT, SOURCES

TOY = "diffsynth_toy"

CLASSIFIER = "Programming Language :: Python :: "
CORE = tomllib.loads((ROOT / "packages/diffsynth-core/pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHER_PYTHONS = [
    line.removeprefix(CLASSIFIER)
    for line in CORE["classifiers"]
    if line.startswith(f"{CLASSIFIER}3.") and line != CLASSIFIER + "{}.{}".format(*sys.version_info)
]
"""Versions of Python that the packages declare, except the one that runs the tests."""


def wheel(wheels: Path, package: str) -> Path:
    (found,) = wheels.glob(f"{package}-*.whl")
    return found


def test_every_file_of_a_package_is_in_its_wheel(wheels):
    """Also weights, layouts, templates and doors. The wheels are built from source distributions."""
    for import_name, init in SOURCES.items():
        source = init.parents[1]
        files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
        wanted = {name for name in files if "__pycache__" not in name}
        distribution = init.parents[2].name.replace("-", "_")
        inside = set(zipfile.ZipFile(wheel(wheels, distribution)).namelist())
        assert wanted, import_name
        assert wanted - inside == set(), import_name


@pytest.mark.parametrize("import_name", SOURCES)
def test_metadata_of_a_wheel(wheels, import_name):
    """Classifiers are checked by hatchling, which refuses unknown ones."""
    package = SOURCES[import_name].parents[2]
    archive = zipfile.ZipFile(wheel(wheels, package.name.replace("-", "_")))
    (entry,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(entry))
    assert metadata["Summary"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload(decode=True).decode() == (package / "README.md").read_text(encoding="utf-8")
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    assert "Programming Language :: Python :: {}.{}".format(*sys.version_info) in classifiers
    assert not any(line.startswith("License ::") for line in classifiers), "the expression states it"
    names = archive.namelist()
    assert f"{import_name}/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if re.search(r"(^|/)(tests?|conftest\.py|__pycache__)(/|$)", name)]


@pytest.mark.parametrize("import_name", SOURCES)
def test_the_readme_of_a_package_needs_no_other_file(import_name):
    """An index renders it alone, where a relative link or image leads nowhere."""
    text = (SOURCES[import_name].parents[2] / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {SOURCES[import_name].parents[2].name}\n")
    assert re.findall(r"\]\(|<img|<a ", text) == []


def test_the_install_page_has_the_sizes_of_the_wheels(wheels):
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(diffsynth-[\w-]+)` \| .+ \| ([\d.]+) \| [\d.]+ \|$", page, flags=re.MULTILINE)
    assert len(rows) == len(SOURCES)
    for package, shown in rows:
        size = wheel(wheels, package.replace("-", "_")).stat().st_size / 1e6
        assert abs(float(shown) - size) <= max(0.1, 0.25 * size), f"{package}: {size:.2f} MB"


def test_core_alone_lists_nothing_and_says_what_to_install(wheels, environment):
    environment.install(wheel(wheels, "diffsynth_core"))
    result = environment.run("diffsynth", "list")
    assert "No models are installed" in result.stdout
    assert "pip install diffsynth-" in result.stdout
    where = environment.run("python", "-c", "import diffsynth; print(diffsynth.__file__)").stdout
    assert Path(where.strip()).is_relative_to(environment.folder)


def test_core_and_z_image_draw(wheels, environment):
    environment.install(wheel(wheels, "diffsynth_core"), wheel(wheels, "diffsynth_zimage"))
    assert installed(environment) == {
        "z-image": "absent",
        "z-image-turbo": "absent",
        "z-image-omni-base": "absent",
        "z-image-nano": "present",
    }
    generate = ("generate", "z-image-nano", "a red apple", "--steps", "2", "--height", "64", "--width", "64")
    environment.run("diffsynth", *generate, "--dtype", "float32", "-o", "apple.png")
    with Image.open(environment.folder / "apple.png") as image:
        assert image.size == (64, 64)
    door = "from diffsynth.pipelines.z_image import ZImagePipeline; print(ZImagePipeline.__module__)"
    assert environment.run("python", "-c", door).stdout.strip() == "diffsynth_zimage.pipeline"


def test_a_third_party_plugin_is_installed_and_removed(wheels, environment):
    environment.install(wheel(wheels, "diffsynth_core"), wheel(wheels, TOY))
    assert installed(environment) == {"toy-1": "present"}
    environment.run("diffsynth", "generate", "toy-1", "red", "--seed", "1", "-o", "red.png")
    with Image.open(environment.folder / "red.png") as image:
        assert image.size == (32, 32)
        red, green, blue = image.getpixel((16, 16))
        assert red > 150 > 100 > max(green, blue)
    environment.uninstall("diffsynth-toy")
    assert installed(environment) == {}


def test_a_third_party_unit_is_added_to_z_image(wheels, environment):
    environment.install(*(wheel(wheels, name) for name in ("diffsynth_core", "diffsynth_zimage", TOY)))
    code = """
import inspect, diffsynth, torch
pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)
assert inspect.signature(pipe).parameters["mirror"].default is False
request = dict(prompt="", height=64, width=64, num_inference_steps=1, cfg_scale=1.0, seed=1)
plain, mirrored = pipe(**request), pipe(**request, mirror=True)
print(plain.tobytes() != mirrored.tobytes())
"""
    assert environment.run("python", "-c", code).stdout.strip() == "True"


def test_the_example_passes_its_own_test(wheels, environment):
    environment.install(wheel(wheels, "diffsynth_core"), wheel(wheels, TOY))
    passes(environment, ROOT / "examples" / "third_party_plugin" / "tests")


def test_what_new_plugin_writes_passes_its_own_test_unchanged(wheels, environment):
    environment.install(wheel(wheels, "diffsynth_core"))
    environment.run("diffsynth", "new-plugin", "my-model", "--output", "written")
    subprocess.run(
        ["uv", "build", "--quiet", "--wheel", "--out-dir", "built", "written"], cwd=environment.folder, check=True
    )
    environment.install(*(environment.folder / "built").glob("*.whl"))
    assert installed(environment) == {"my-model-1": "present"}
    passes(environment, environment.folder / "written" / "tests")


@pytest.mark.parametrize("version", OTHER_PYTHONS)
def test_all_code_compiles_and_light_commands_run_on_another_python(wheels, environment_of, version):
    """Compiled libraries such as torch are those of this Python and cannot be imported by the other one, so that this
    shows also that light commands do without them.
    """
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine")
    other = environment_of(python)
    other.install(*(file for file in wheels.glob("*.whl") if not file.name.startswith(TOY)))
    (site,) = other.folder.glob("lib/python*/site-packages")
    weights = SOURCES["diffsynth_zimage"].parent / "nano" / "dit.safetensors"
    code = f"""
import compileall, json, sys
from click.testing import CliRunner
from diffsynth.cli.group import program
def run(*arguments):
    result = CliRunner().invoke(program, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output
assert all(compileall.compile_dir(f"{site}/{{name}}", quiet=1) for name in {list(SOURCES)})
weights = {{record["name"]: record["weights"] for record in json.loads(run("list", "--json"))}}
assert weights["z-image-nano"] == "present" and len(weights) > 50
assert "ZImagePipeline" in run("info", "z-image-nano")
assert "z_image_dit" in run("recognize", {str(weights)!r})
run("plugins")
assert "torch" not in sys.modules
print("{{}}.{{}}".format(*sys.version_info))
"""
    assert other.run("python", "-c", code).stdout.splitlines()[-1] == version


def interpreter(version: str) -> str | None:
    """Return the path of a Python of this version on the PATH or in pyenv's folder, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(map(str, pyenv.glob(f"{version}.*/bin/python3")))]
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    for candidate in filter(None, candidates):
        result = subprocess.run([candidate, "-I", "-c", code], capture_output=True, text=True, check=False)
        if result.stdout.strip() == version:
            return candidate
    return None


def installed(environment) -> dict[str, str]:
    records = json.loads(environment.run("diffsynth", "list", "--json").stdout)
    return {record["name"]: record["weights"] for record in records}


def passes(environment, tests: Path) -> None:
    """Run a copy of the tests outside this repository, so that its pytest options do not apply."""
    shutil.copytree(tests, environment.folder / "tests")
    result = environment.run("python", "-m", "pytest", "-p", "no:cacheprovider", "tests")
    (count,) = re.findall(r"= (\d+) passed in ", result.stdout)  # none failed, none was skipped
    assert int(count) > 10
