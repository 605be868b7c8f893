"""Answers to frequent questions for this machine, each with the command to run."""

from __future__ import annotations

from diffsynth import _discovery, _env
from diffsynth.diagnosis.finding import Finding
from diffsynth.diagnosis.installed import absent_packages
from diffsynth.diagnosis.machine import GIB, attention, in_gib


def file_not_detected() -> list[Finding]:
    """Return one `Finding`: the numbers of known architectures and layouts, and how to find out why a file matches
    none.
    """
    architectures, checkpoints = _discovery.catalog().layouts()
    more = ", ".join(name for name, models in absent_packages().items() if models)
    seen = f"{len(architectures)} architectures in {len(checkpoints)} published layouts are known"
    action = "Run: diffsynth recognize FILE (shows the nearest architecture, differing keys and missing shards)"
    return [Finding("My file is not detected", "ok", seen + (f"; {more} would add more" if more else ""), action)]


def out_of_memory() -> list[Finding]:
    """Return one `Finding`: the free memory of the default device, and how to use less."""
    from diffsynth.core import device

    where = device.default_device()
    free = device.available_memory(where)
    if where.type == "cpu":
        action = "Use a smaller height, width or num_images; vram_limit has no effect on a CPU"
    else:
        limit = "GIB" if free is None else f"{free / GIB * 0.8:.0f}"
        action = f"diffsynth.load(NAME, vram_limit={limit}) offloads what a stage does not use; or use a smaller size"
    seen = f"{where} has {in_gib(free)} free for weights and activations"
    return [Finding("Out of memory", "ok", seen, action)]


def where_files_go() -> list[Finding]:
    """Return one `Finding`: the folders of weights and caches, and how to change them."""
    weights = _env.model_base_path().expanduser().absolute()
    seen = f"weights into {weights}/OWNER/REPOSITORY, small caches into {_env.cache_dir()}"
    action = "Set DIFFSYNTH_MODEL_BASE_PATH, or pass base_path= to diffsynth.load()"
    return [Finding("Where do files go", "ok", seen, action)]


def which_attention() -> list[Finding]:
    """Return one `Finding`: the attention backend in use, and how to force another."""
    used = next(finding for finding in attention() if finding.name == "in use")
    action = "Set DIFFSYNTH_ATTENTION_IMPLEMENTATION to force one; by default the best usable one is chosen"
    return [Finding("Which attention is used", used.state, used.seen, used.next_action or action)]


def downloads() -> list[Finding]:
    """Return one `Finding`: the hub that files are downloaded from, and how to change that or work offline; or that
    downloads are off, and how to turn them on.
    """
    hub = _env.download_source()
    if _env.skip_download():
        seen, action = "off: files are only looked up in the folder of weights", "unset DIFFSYNTH_SKIP_DOWNLOAD"
        return [Finding("Where do downloads come from", "ok", seen, f"To fetch what is missing: {action}")]
    other = {"modelscope": "huggingface", "huggingface": "modelscope"}[hub]
    seen = f"from {hub}, missing files only"
    action = f"Other hub: DIFFSYNTH_DOWNLOAD_SOURCE={other}. Never: DIFFSYNTH_SKIP_DOWNLOAD=true"
    return [Finding("Where do downloads come from", "ok", seen, action)]


def lora() -> list[Finding]:
    """Return one `Finding`: LoRAs are loaded with `load_lora()`, and how to find out what a file is."""
    action = "Run: diffsynth recognize FILE (shows whether a file is a LoRA, and for which model)"
    return [Finding("My LoRA does nothing", "ok", "pipelines load them with load_lora()", action)]


QUESTIONS = (file_not_detected, out_of_memory, where_files_go, which_attention, downloads, lora)
