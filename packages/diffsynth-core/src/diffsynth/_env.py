"""Readers of all environment variables, strictly parsed on each call and never at import; see `docs/environment.md`.

The docstring of each reader begins with its variable's name: `diffsynth doctor` takes the name from there.
"""

from __future__ import annotations

import os
from pathlib import Path

from diffsynth.core.paths import expanded

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off", ""})
_MAX_IMAGE_PIXELS = 178_956_970


def skip_download() -> bool:
    """DIFFSYNTH_SKIP_DOWNLOAD: whether to work without the network. Default false."""
    return _boolean("DIFFSYNTH_SKIP_DOWNLOAD")


def model_base_path() -> Path:
    """DIFFSYNTH_MODEL_BASE_PATH: folder that files are looked up in and downloaded to. Default `./models`."""
    return expanded(os.environ.get("DIFFSYNTH_MODEL_BASE_PATH") or "./models")


def download_source() -> str:
    """DIFFSYNTH_DOWNLOAD_SOURCE: hub to download from, `modelscope` (default) or `huggingface`."""
    return _choice("DIFFSYNTH_DOWNLOAD_SOURCE", ("modelscope", "huggingface"))


def attention_implementation() -> str:
    """DIFFSYNTH_ATTENTION_IMPLEMENTATION: name of an attention backend, case ignored, or `auto` (default)."""
    return os.environ.get("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "").strip().lower() or "auto"


def fused_kernels() -> bool:
    """DIFFSYNTH_FUSED_KERNELS: whether layers of `diffsynth.nn` are fused kernels, else plain torch. Default true."""
    return _boolean("DIFFSYNTH_FUSED_KERNELS", default=True)


def triton_interpret() -> bool:
    """TRITON_INTERPRET: Triton's variable; whether kernels run on the CPU in its interpreter, slowly. Default false."""
    return _boolean("TRITON_INTERPRET")


def plugins() -> frozenset[str] | None:
    """DIFFSYNTH_PLUGINS: set of the entry-point names of the plugins to load; None, if it is not set, loads all.

    The variable holds names with commas between them; an empty one loads none.
    """
    value = os.environ.get("DIFFSYNTH_PLUGINS")
    return None if value is None else frozenset(filter(None, (name.strip() for name in value.split(","))))


def strict_plugins() -> bool:
    """DIFFSYNTH_STRICT_PLUGINS: whether a broken plugin raises instead of being reported. Default false."""
    return _boolean("DIFFSYNTH_STRICT_PLUGINS")


def cache_dir() -> Path:
    """DIFFSYNTH_CACHE_DIR: folder of small caches, such as file identities. Default `$XDG_CACHE_HOME/diffsynth`,
    else `~/.cache/diffsynth`.
    """
    explicit = os.environ.get("DIFFSYNTH_CACHE_DIR")
    if explicit:
        return expanded(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffsynth"


def max_image_pixels() -> int:
    """DIFFSYNTH_MAX_IMAGE_PIXELS: largest number of pixels of an image that is read. Default 178956970, which is the
    limit of PIL and about 540 MB as RGB.
    """
    value = os.environ.get("DIFFSYNTH_MAX_IMAGE_PIXELS", "").strip()
    if not value:
        return _MAX_IMAGE_PIXELS
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"DIFFSYNTH_MAX_IMAGE_PIXELS={value!r}: expected a positive integer")
    return int(value)


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
