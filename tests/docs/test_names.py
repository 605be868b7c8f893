"""Every name that a plugin author or a host application needs stands on a page, as the code has it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import diffsynth.core.gradient
from diffsynth import _discovery, errors, hookspecs, spec
from diffsynth.core.loader import convert
from diffsynth.runtime.composition import PIPELINE_VALUES, RESERVED
from diffsynth.runtime.guidance_branches import MERGES
from diffsynth.runtime.loop import WINDOWS
from diffsynth.runtime.request import LOOP_NAMES, LOOP_VALUES
from documented import blocks, sections
from source_tree import FAMILIES, ROOT, modules, syntax_tree

HOW = "Run: uv run --all-packages tools/reference.py"
PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text("utf-8") for path in ROOT.glob("docs/**/*.md")}
NOT_FOR_PLUGINS = ("diffsynth.compat", "diffsynth.pipelines")
"""Modules whose names are those of older scripts: `coming-from-diffsynth-studio.md` has them."""

PUBLIC = [
    name
    for name, file in modules().items()
    if name.split(".")[0] == "diffsynth"
    and "\n__all__ = " in file.read_text(encoding="utf-8")
    and not name.startswith(NOT_FOR_PLUGINS)
]
"""Modules of core that list their public names."""

CORE_API = {
    "attention": """attention_forward torch_sdpa_sliding_window flash_attention_4 flash_attention_3 flash_attention_2
        sage_attention xformers_attention flex_attention""",
    "data": """UnifiedDataset load_from_cache check_data_equal default_image_operator default_video_operator
        DataProcessingOperator DataProcessingOperatorRaw DataProcessingPipeline ToInt ToFloat ToStr ToList
        ToAbsolutePath LoadVideo SequencialProcess RouteByExtensionName RouteByType LoadTorchPickle LoadImage
        ImageCropAndResize LoadGIF LoadAudio LoadAudioWithTorchaudio LoadPureAudioWithTorchaudio
        FrameSamplerByRateMixin""",
    "gradient": "gradient_checkpoint_forward",
    "loader": """load_state_dict load_state_dict_from_safetensors load_state_dict_from_bin load_keys_dict
        load_metadata_from_safetensors hash_state_dict_keys hash_model_file load_model load_model_with_disk_offload
        ModelConfig""",
    "vram": """skip_model_initialization DiskMap AutoTorchModule AutoWrappedModule AutoWrappedNonRecurseModule
        AutoWrappedLinear LoRAHotLoadMixin enable_vram_management enable_vram_management_recursively
        fill_vram_config""",
    "device": """IS_CUDA_AVAILABLE IS_NPU_AVAILABLE get_device_type get_available_device_type get_device_name
        parse_device_type parse_nccl_backend get_nccl_backend synchronize empty_cache get_torch_device get_device_id
        enable_high_precision_for_bf16""",
}
"""Page in `docs/api/` -> names of DiffSynth-Studio's core API, each of which an example uses."""

NOT_HERE = {
    "attention": "initialize_attention_priority torch_sdpa rearrange_qkv rearrange_out",
    "gradient": "OffloadTrainingManager",
    "loader": """check_input parse_original_file_pattern parse_download_source parse_skip_download download
        require_downloading reset_local_model_path check_download_source download_if_necessary vram_config""",
    "vram": "AutoWrappedQuantizedModule",
    "device": "npu_patch",
    "pipelines": """load_models_to_device get_vram get_module freeze_except step split_pipeline_units
        flush_vram_management_device download_and_load_models check_vram_management_state cfg_guided_model_fn
        load_training_template_model FlowMatchScheduler ModelLogger""",
    "index": "register_quant_backend QuantBackend",
}
"""Page -> names of that API that this version does not have; the page says what takes their place."""


def load_tool() -> ModuleType:
    """Return `tools/reference.py` as a module."""
    found = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


reference = load_tool()


def identity(value: Any, name: str) -> tuple[str, str]:
    """Return where a name is defined; constants are told by their name alone."""
    is_ours = (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__.startswith("diffsynth")
    return (value.__module__, value.__qualname__) if is_ours else ("", name)


def entries() -> set[tuple[str, str]]:
    """Return the names that the pages have an entry for."""
    found = (pair for text in PAGES.values() for pair in reference.documented(text))
    return {identity(getattr(importlib.import_module(module), name), name) for module, name in found}


def needed() -> Iterator[tuple[str, str, Any]]:
    """Yield (module, name, value) of the names that need an entry: those that modules list, those of the modules of
    declarations, errors and extensions, and those that our families, the trainer, the examples and the pages import.
    """
    for module in PUBLIC:
        for name in importlib.import_module(module).__all__:
            yield module, name, getattr(importlib.import_module(module), name)
    points = [importlib.import_module(name) for name in modules() if name.endswith(".extension")]
    for module in (spec, errors, *points):
        for name in reference.public_names(module):
            yield module.__name__, name, getattr(module, name)
    files = [file for name, file in modules().items() if name.split(".")[0] != "diffsynth"]
    trees = [syntax_tree(file) for file in (*files, *ROOT.glob("examples/**/*.py"))]
    trees += [ast.parse(code) for text in PAGES.values() for _, kind, code in blocks(text) if kind == "python"]
    for tree in trees:
        for module, name in imported(tree):
            if not module.startswith(NOT_FOR_PLUGINS):
                yield module, name, getattr(importlib.import_module(module), name)


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (module, name) of each public name that a file imports from core; modules are left out."""
    for node in ast.walk(tree):
        module = node.module if isinstance(node, ast.ImportFrom) else None
        if module and module.split(".")[0] == "diffsynth":
            for alias in node.names:
                if f"{module}.{alias.name}" not in modules() and not alias.name.startswith("_"):
                    yield module, alias.name


def missing() -> list[str]:
    """Return the needed names without an entry."""
    there = entries()
    found = {
        f"{module}.{name}"
        for module, name, value in needed()
        if not inspect.ismodule(value) and name != "__version__" and identity(value, name) not in there
    }
    return sorted(found)


def test_every_public_name_has_an_entry():
    assert len(PUBLIC) >= 15
    assert missing() == [], f"name these in a comment of a page in docs/api/. {HOW}"


def test_a_new_name_without_an_entry_is_found(monkeypatch):
    def offload_everything():
        """Return nothing."""

    offload_everything.__module__ = "diffsynth.core.gradient"
    monkeypatch.setattr(diffsynth.core.gradient, "offload_everything", offload_everything, raising=False)
    monkeypatch.setattr(diffsynth.core.gradient, "__all__", ["gradient_checkpoint_forward", "offload_everything"])
    assert missing() == []  # the page names the module, so that the tool writes the entry
    page = PAGES["api/gradient.md"]
    assert "### offload_everything\n\n`offload_everything()`\n\nReturn nothing." in reference.rewritten(page)
    assert reference.rewritten(page) != page

    class NewSpec:
        """A declaration without a page."""

    NewSpec.__module__ = "diffsynth.spec"
    monkeypatch.setattr(spec, "NewSpec", NewSpec, raising=False)
    assert missing() == ["diffsynth.spec.NewSpec"]


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if reference.PART.search(text)])
def test_a_page_is_what_the_tool_writes(page):
    """Signatures, arguments, fields of declarations, and the units of pipelines in their order."""
    text = PAGES[page]
    for old, new in zip(reference.PART.findall(text), reference.PART.findall(reference.rewritten(text)), strict=True):
        assert old == new, f"{page}: {old[:3]} is not what the code says. {HOW}"


def test_every_field_of_a_declaration_and_every_argument_of_a_hook_is_explained():
    kinds = [value for value in vars(spec).values() if hasattr(value, "__dataclass_fields__")]
    assert len(kinds) >= 17
    for kind in kinds:
        text = reference.body(inspect.cleandoc(kind.__doc__))
        names = re.findall(r"`(\w+)`", "\n".join(line.partition("`: ")[0] + "`" for line in text.splitlines()))
        assert set(kind.__dataclass_fields__) <= set(names), kind.__name__
    for name, hook in vars(hookspecs).items():
        if hasattr(hook, "diffsynth_spec"):
            part = sections(PAGES[f"hooks/{name}.md"])["Arguments"]
            for argument in inspect.signature(hook).parameters:
                assert re.search(rf"^(\* )?`{argument}`", part, flags=re.MULTILINE), (name, argument)


def test_each_pipeline_has_a_table_of_its_units():
    shown = {target for text in PAGES.values() for kind, target, *_ in reference.PART.findall(text) if kind == "units"}
    pipelines = {f"{family}:{name}" for family in FAMILIES for name in importlib.import_module(family).__all__}
    assert shown == pipelines
    table = reference.units("diffsynth_zimage:ZImagePipeline").splitlines()
    names = [row.split(" | ")[1].strip("`") for row in table[2:]]
    program = diffsynth.spec.resolve("diffsynth_zimage:ZImagePipeline").build_program()
    assert names == [step.name for step in (*program.units, *program.outputs)]


def test_the_table_follows_the_order_of_the_program(monkeypatch):
    pipeline = diffsynth.spec.resolve("diffsynth_zimage:ZImagePipeline")
    before = reference.units("diffsynth_zimage:ZImagePipeline")
    monkeypatch.setattr(pipeline, "units", (pipeline.units[1], pipeline.units[0], *pipeline.units[2:]))
    assert reference.units("diffsynth_zimage:ZImagePipeline") != before


def test_the_values_that_are_given():
    text = sections(PAGES["api/plugins.md"])["Values"]
    _, *tables = text.split("\n\n| name")
    given, meant, velocity = [re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) for table in tables]
    assert (*given, *LOOP_NAMES) == PIPELINE_VALUES
    assert {*LOOP_VALUES, MERGES, WINDOWS, "output"} <= set(meant)
    assert tuple(velocity) == RESERVED


@pytest.mark.parametrize("page", CORE_API)
def test_every_name_of_the_core_api_is_in_an_example(page):
    code = "\n".join(text for _, language, text in blocks(PAGES[f"api/{page}.md"]) if language == "python")
    used = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(ast.parse(code))}
    assert set(CORE_API[page].split()) - used == set()


@pytest.mark.parametrize("page", NOT_HERE)
def test_what_is_not_here_is_said(page):
    words = set(re.findall(r"`(\w+)`", PAGES[f"api/{page}.md"]))
    assert set(NOT_HERE[page].split()) - words == set()


def test_every_conversion_rule_is_in_an_example():
    rules = {
        name for name, value in vars(convert).items() if inspect.isclass(value) and convert.Rule in value.__mro__[1:]
    }
    assert len(rules) >= 12
    section = sections(PAGES["api/loader.md"])["Conversion rules"]
    ((*_, code),) = [block for block in blocks(section) if block[1] == "python"]
    called = {
        node.func.id
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert rules - called == set()


def test_the_glossary_has_a_word_for_each_kind_of_declaration_once():
    words = [
        word
        for row in re.findall(r"^\| (\*\*.+?) \|", PAGES["glossary.md"], flags=re.MULTILINE)
        for word in re.findall(r"\*\*(.+?)\*\*", row)
    ]
    assert sorted(words) == sorted(set(words))
    kinds = {kind.rstrip("s").replace("_", " ") for kind in _discovery.KINDS}
    assert kinds - {word.lower() for word in words} == set()
