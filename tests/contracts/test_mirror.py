"""Test files mirror the packages: `tests/core/vram/test_stream.py` tests `diffsynth/core/vram/stream.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from source_tree import ROOT, SOURCES

TESTS = ROOT / "tests"
PACKAGES = {name.removeprefix("diffsynth_"): init.parent for name, init in SOURCES.items() if name != "diffsynth"}
"""Folder of tests -> folder of the package; every other mirrored folder belongs to core."""

NO_MIRRORS = {
    "benchmarks",
    "contracts",
    "data",
    "docs",
    "examples",
    "fuzz",
    "gpu",
    "packaging",
    "plugins",
    "rows",
    "support",
}

SCENARIOS: dict[str, str] = {
    "compat/test_imports.py": "the imports of older scripts and manuals",
    "core/attention/test_attention.py": "the function with every backend: values, masks, refusals",
    "core/attention/test_backends.py": "each backend that runs on the CPU against the reference implementation",
    "core/attention/triton/test_compile.py": "the kernels under torch.compile",
    "core/attention/triton/test_kernels.py": "outputs and gradients of all kernels",
    "core/device/test_present.py": "the tables of devices against the devices of this machine",
    "core/loader/reader/test_full_size.py": "headers of published checkpoints at full size",
    "core/loader/test_components.py": "files that hold several components",
    "core/loader/test_damaged_files.py": "damaged and hostile files",
    "core/lora/test_fused_and_hot.py": "fused and hot LoRAs against peft",
    "core/parallel/test_parallel.py": "exchange between two and four processes",
    "core/test_names.py": "the names that `diffsynth.core` offers",
    "core/vram/test_flat_memory.py": "host memory over many steps of streaming from disk",
    "core/vram/test_stream_on_a_device.py": "the order of copies and kernels on a device with queues",
    "flux/flux1/features/test_inpainting.py": "inpainting with FLUX.1 against diffusers",
    "zimage/features/test_inpainting.py": "inpainting with Z-Image against diffusers",
    "flux/flux1/test_bad_inputs.py": "inputs of FLUX.1 that are wrong, or of unusual forms",
    "flux/flux1/test_controlnet_parity.py": "ControlNets of FLUX.1 against diffusers",
    "flux/flux1/test_dit_parity.py": "FluxDiT against diffusers",
    "flux/flux1/test_single_files.py": "FLUX.1 in the single files of other programs",
    "flux/flux1/test_trajectory.py": "whole calls of FLUX.1 against diffusers",
    "flux/flux2/test_dit_parity.py": "Flux2DiT against diffusers",
    "flux/test_memory.py": "plans and memory policies of both lines of FLUX",
    "flux/flux2/test_trajectory.py": "whole calls against diffusers",
    "nn/triton/test_compile.py": "fused layers under torch.compile",
    "pipelines/test_arguments.py": "arguments of existing scripts",
    "pipelines/test_doors.py": "import lines of existing scripts",
    "qwen_image/features/test_kv_cache.py": "keys and values of templates in Qwen-Image's network and calls",
    "qwen_image/test_dit_parity.py": "QwenImageDiT against diffusers",
    "qwen_image/test_lora.py": "LoRAs of Qwen-Image against diffusers",
    "qwen_image/test_plan.py": "plans of Qwen-Image",
    "qwen_image/test_trajectory.py": "whole calls against diffusers",
    "runtime/test_auto_policy.py": "the policy that a plan chooses",
    "runtime/test_expert_switcher.py": "the class that loads the next of two experts",
    "runtime/test_parallel.py": "guidance branches of any pipeline in two processes",
    "runtime/test_threads.py": "calls from several threads",
    "test_conftest.py": "the fixtures of conftest.py",
    "testing/test_tiny_hub_of_a_plugin.py": "the tiny hub with a third-party plugin",
    "utils/test_doors.py": "re-exports in `diffsynth.utils`",
    "wan/test_animate2_trajectory.py": "whole Animate-2 calls against diffusers",
    "wan/test_animate_trajectory.py": "whole Animate calls against diffusers",
    "wan/test_bad_inputs.py": "calls that are refused before a network runs",
    "wan/test_dit_parity.py": "WanDiT against diffusers",
    "wan/test_flat_calls.py": "host memory over many calls",
    "wan/test_flat_memory.py": "host memory over the windows of a video",
    "wan/test_goldens.py": "goldens of whole calls",
    "flux/flux1/test_lora.py": "LoRAs of FLUX.1 against diffusers",
    "flux/flux2/test_lora.py": "LoRAs of FLUX.2 against diffusers",
    "wan/test_lora.py": "LoRAs of Wan against diffusers",
    "wan/test_memory.py": "Wan's networks under memory policies",
    "wan/test_merged_branches.py": "both branches of guidance in one batch",
    "wan/test_trajectory.py": "whole calls against diffusers",
    "wan/test_two_experts.py": "two experts on one device",
    "wan/test_variants_parity.py": "VACE, Animate and Animate-2 against diffusers",
    "wan/test_windows.py": "sliding windows of every conditioning",
    "zimage/test_controlnet_parity.py": "ZImageDiT with ControlNets against diffusers",
    "zimage/test_dit_parity.py": "ZImageDiT against diffusers",
    "zimage/test_from_pretrained.py": "from published files to images",
    "zimage/test_lora.py": "LoRAs of Z-Image against diffusers",
    "zimage/test_plan.py": "plans of Z-Image",
    "zimage/test_trajectory.py": "whole calls against diffusers",
}
"""Test file that belongs to no single module -> what it tests."""

FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("test_*.py"))
MIRRORS = [path for path in FILES if path.parts[0] not in NO_MIRRORS]


@pytest.mark.parametrize("path", MIRRORS, ids=Path.as_posix)
def test_a_test_file_names_its_module(path):
    module = mirrored(path)
    there = module.with_suffix(".py").exists() or module.is_dir()
    named = str(module.with_suffix(".py").relative_to(ROOT))
    assert there or path.as_posix() in SCENARIOS, f"there is no {named}: name a module, or list the scenario here"
    assert not (there and path.as_posix() in SCENARIOS), f"{path} has a module, {named}, and is listed as a scenario"


def test_scenarios_are_there():
    assert set(SCENARIOS) - {path.as_posix() for path in MIRRORS} == set()


def mirrored(path: Path) -> Path:
    """Return the module or package that a test file names, without suffix."""
    package = PACKAGES.get(path.parts[0], SOURCES["diffsynth"].parent)
    folder = path.parent.relative_to(path.parts[0]) if path.parts[0] in PACKAGES else path.parent
    name = path.stem.removeprefix("test_")
    private = package / folder / f"_{name}"  # `test_discovery.py` for `_discovery.py`
    return private if private.with_suffix(".py").exists() else package / folder / name
