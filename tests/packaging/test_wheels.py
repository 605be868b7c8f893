"""Contents of the wheels, and commands in environments where only these wheels are installed."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

from PIL import Image

from source_tree import ROOT, SOURCES

TOY = "diffsynth_toy"


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


def installed(environment) -> dict[str, str]:
    records = json.loads(environment.run("diffsynth", "list", "--json").stdout)
    return {record["name"]: record["weights"] for record in records}


def passes(environment, tests: Path) -> None:
    """Run a copy of the tests outside this repository, so that its pytest options do not apply."""
    shutil.copytree(tests, environment.folder / "tests")
    result = environment.run("python", "-m", "pytest", "-p", "no:cacheprovider", "tests")
    (count,) = re.findall(r"= (\d+) passed in ", result.stdout)  # none failed, none was skipped
    assert int(count) > 10
