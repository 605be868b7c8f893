"""What users ask most, answered for this machine, each with what to type."""

from __future__ import annotations

from diffsynth import _discovery, _env
from diffsynth.diagnosis.finding import Finding
from diffsynth.diagnosis.installed import absent_packages
from diffsynth.diagnosis.machine import GIB, attention, in_gib


def file_not_detected() -> list[Finding]:
    """Which layouts are known, and how to learn why a file has none of them."""
    architectures, checkpoints = _discovery.catalog().layouts()
    more = ", ".join(name for name, models in absent_packages().items() if models)
    seen = f"{len(architectures)} architectures in {len(checkpoints)} published layouts are known here"
    action = "Run: diffsynth recognize FILE (names what is nearest, the keys that differ, and shards that are missing)"
    return [Finding("My file is not detected", "ok", seen + (f"; {more} would add some" if more else ""), action)]


def out_of_memory() -> list[Finding]:
    """How much is free where computation happens, and how to need less."""
    from diffsynth.core import device

    where = device.default_device()
    free = device.available_memory(where)
    if where.type == "cpu":
        action = "Take a smaller height, width or num_images; vram_limit has no effect on a CPU"
    else:
        limit = "GIB" if free is None else f"{free / GIB * 0.8:.0f}"
        action = f"diffsynth.load(NAME, vram_limit={limit}) has on the device only what a stage uses; or a smaller size"
    seen = f"{where} has {in_gib(free)} free for weights and activations"
    return [Finding("Out of memory", "ok", seen, action)]


def where_files_go() -> list[Finding]:
    """Folders of weights and caches."""
    weights = _env.model_base_path().expanduser().absolute()
    seen = f"weights into {weights}/OWNER/REPOSITORY, small caches into {_env.cache_dir()}"
    action = "Set DIFFSYNTH_MODEL_BASE_PATH, or give base_path= to diffsynth.load()"
    return [Finding("Where do files go", "ok", seen, action)]


def which_attention() -> list[Finding]:
    """The backend in use."""
    used = next(finding for finding in attention() if finding.name == "in use")
    action = "Set DIFFSYNTH_ATTENTION_IMPLEMENTATION to force one; unset, it is the best that does not refuse"
    return [Finding("Which attention is used", used.state, used.seen, used.next_action or action)]


def downloads() -> list[Finding]:
    """Where files come from, and how to stay offline."""
    hub = _env.download_source()
    if _env.skip_download():
        seen, action = "off: files are only looked for in the folder of weights", "unset DIFFSYNTH_SKIP_DOWNLOAD"
        return [Finding("Where do downloads come from", "ok", seen, f"To fetch what is missing: {action}")]
    other = {"modelscope": "huggingface", "huggingface": "modelscope"}[hub]
    seen = f"from {hub}, and only what is not there"
    action = f"Other hub: DIFFSYNTH_DOWNLOAD_SOURCE={other}. Never: DIFFSYNTH_SKIP_DOWNLOAD=true"
    return [Finding("Where do downloads come from", "ok", seen, action)]


def lora() -> list[Finding]:
    """Whether adapters can be loaded, and how to learn what a file is."""
    from diffsynth.runtime.pipeline import Pipeline

    loads = hasattr(Pipeline, "load_lora")
    seen = "pipelines load them with load_lora()" if loads else "this version of diffsynth-core does not load them"
    action = "Run: diffsynth recognize FILE (tells whether a file is a LoRA, and for what)"
    return [Finding("My LoRA does nothing", "ok", seen, action)]


QUESTIONS = (file_not_detected, out_of_memory, where_files_go, which_attention, downloads, lora)
