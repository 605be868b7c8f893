"""Every environment variable, parsed strictly, when asked for and never at import. `docs/environment.md` lists them."""

from __future__ import annotations

import os
from pathlib import Path

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})


def skip_download() -> bool:
    """DIFFSYNTH_SKIP_DOWNLOAD: never touch the network. Default false."""
    return _boolean("DIFFSYNTH_SKIP_DOWNLOAD")


def model_base_path() -> Path:
    """DIFFSYNTH_MODEL_BASE_PATH: where files are looked up and downloaded to. Default `./models`."""
    return Path(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "./models")


def download_source() -> str:
    """DIFFSYNTH_DOWNLOAD_SOURCE: `modelscope` (default) or `huggingface`."""
    return _choice("DIFFSYNTH_DOWNLOAD_SOURCE", ("modelscope", "huggingface"))


def attention_implementation() -> str:
    """DIFFSYNTH_ATTENTION_IMPLEMENTATION: a backend by name, in any case, or `auto` (default)."""
    return os.environ.get("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "").strip().lower() or "auto"


def fused_kernels() -> bool:
    """DIFFSYNTH_FUSED_KERNELS: off runs every layer of `diffsynth.nn` as plain torch. Default true."""
    return _boolean("DIFFSYNTH_FUSED_KERNELS", default=True)


def triton_interpret() -> bool:
    """TRITON_INTERPRET: Triton's own switch; kernels run step by step on the CPU, very slowly. Default false."""
    return _boolean("TRITON_INTERPRET")


def plugins() -> frozenset[str] | None:
    """DIFFSYNTH_PLUGINS: comma-separated allow-list of entry-point names; unset is all, empty is none."""
    value = os.environ.get("DIFFSYNTH_PLUGINS")
    return None if value is None else frozenset(filter(None, (name.strip() for name in value.split(","))))


def strict_plugins() -> bool:
    """DIFFSYNTH_STRICT_PLUGINS: a broken plugin raises instead of being reported. Default false."""
    return _boolean("DIFFSYNTH_STRICT_PLUGINS")


def cache_dir() -> Path:
    """DIFFSYNTH_CACHE_DIR: small caches of ours (file identities). Default `$XDG_CACHE_HOME/diffsynth`."""
    explicit = os.environ.get("DIFFSYNTH_CACHE_DIR")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsynth"


def _boolean(name: str, *, default: bool = False) -> bool:
    if name not in os.environ:
        return default
    value = os.environ[name].strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name}={os.environ[name]!r}: expected true or false")


def _choice(name: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "").strip().lower() or choices[0]
    if value not in choices:
        raise ValueError(f"{name}={os.environ[name]!r}: expected one of {', '.join(choices)}")
    return value
