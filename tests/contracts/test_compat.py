"""`diffsynth.compat` is for door modules: nothing else of ours is built on it."""

import ast

import pytest

from source_tree import modules

DOORS = {
    "diffsynth.configs",
    "diffsynth.core",
    "diffsynth.core.device.npu_compatible_device",
    "diffsynth.core.loader",
    "diffsynth.core.loader.model",
    "diffsynth.core.quant",
    "diffsynth.core.vram.layers",
    "diffsynth.diffusion",
    "diffsynth.diffusion.base_pipeline",
    "diffsynth.diffusion.template",
    "diffsynth.metrics",
    "diffsynth.models",
    "diffsynth.pipelines",
    "diffsynth.utils",
    "diffsynth.utils.data",
    "diffsynth_flux.doors.flux2_image",
    "diffsynth_qwen_image.doors.qwen_image",
    "diffsynth_wan.doors.wan_video",
    "diffsynth_zimage.doors.z_image",
}
"""Modules under names that older scripts import, and packages that have such names or modules beside their own."""


def names_compat(name: str) -> bool:
    """Whether a module imports `diffsynth.compat`, or refers to it in a string other than a docstring."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.startswith("diffsynth.compat") for alias in node.names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if f"{node.module}.".startswith("diffsynth.compat."):
                return True
            if node.module == "diffsynth" and any(alias.name == "compat" for alias in node.names):
                return True
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings
        if is_text and "diffsynth.compat" in node.value:
            return True
    return False


@pytest.mark.parametrize("name", [name for name in modules() if not name.startswith("diffsynth.compat")])
def test_only_doors_name_compat(name):
    assert not names_compat(name) or name in DOORS


def test_the_list_of_doors_is_true():
    assert set(modules()) >= DOORS
    assert [name for name in DOORS if not names_compat(name)] == []
