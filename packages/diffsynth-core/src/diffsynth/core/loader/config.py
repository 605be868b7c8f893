"""`ModelConfig`: the files of one checkpoint, and the placement of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffsynth import _env
from diffsynth.core.paths import expanded
from diffsynth.core.quant.config import quantize_config
from diffsynth.errors import did_you_mean, shown
from diffsynth.spec import parse_source

DOWNLOAD_SOURCES = ("modelscope", "huggingface")
VRAM_KEYS = tuple(
    f"{state}_{what}" for state in ("offload", "onload", "preparing", "computation") for what in ("device", "dtype")
)


@dataclass
class ModelConfig:
    """The source of one checkpoint. A field that is set overrides the environment variable of the same meaning.

    Args:
        path: a local file, or the files of one checkpoint.
        model_id: repository on the hub, "owner/name".
        origin_file_pattern: glob inside the repository, or several; None, "" or "./" is the whole repository and a
            trailing "/" a folder: both give the folder's path.
        download_source: "modelscope" or "huggingface".
        revision: branch, tag or commit of the repository; its files are kept in a folder of their own.
        token: access token for repositories that require a login; None uses the token that the hub's own login
            stored. It is never shown.
        local_model_path: root under which `<model_id>/...` is looked up and downloaded to.
        skip_download: never touch the network.
        offload_device, offload_dtype, onload_device, onload_dtype, preparing_device, preparing_dtype,
            computation_device, computation_dtype: placements of the VRAM engine.
        clear_parameters: not available in this version.
        state_dict: tensors in memory, in place of files.
        quantize: the quantization of the component's linear layers: a `QuantizeConfig` or `MixedQuantizeConfig`, the
            name of a method such as "fp8_row", a dict of the config's fields, or a JSON file with such a dict.
        source: another source, `scheme://location`; plugins resolve its scheme by the hook `resolve_source`.
        role: the pipeline's role that the file is for; other components in the file are not loaded. None finds the role
            of each component by its architecture.

    Raises:
        ValueError: no source or two, an unknown download source, or a setting this version does not have yet.
        TypeError: a field of another type, such as a `ModelConfig` as path.
    """

    path: str | Path | Sequence[str | Path] | None = None
    model_id: str | None = None
    origin_file_pattern: str | Sequence[str] | None = None
    download_source: str | None = None
    local_model_path: str | Path | None = None
    skip_download: bool | None = None
    offload_device: Any = None
    offload_dtype: Any = None
    onload_device: Any = None
    onload_dtype: Any = None
    preparing_device: Any = None
    preparing_dtype: Any = None
    computation_device: Any = None
    computation_dtype: Any = None
    clear_parameters: bool = False
    state_dict: Mapping[str, Any] | None = None
    quantize: Any = None
    source: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    role: str | None = None

    def __post_init__(self) -> None:
        self._check_types()
        given = [name for name in ("path", "model_id", "state_dict", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"ModelConfig got {' and '.join(given) or 'no source'}; expected one of path, model_id, state_dict"
            )
        if self.download_source is not None and self.download_source not in DOWNLOAD_SOURCES:
            raise ValueError(
                f"download_source={self.download_source!r}: expected {' or '.join(DOWNLOAD_SOURCES)}"
                f"{did_you_mean(self.download_source, DOWNLOAD_SOURCES)}"
            )
        if self.skip_download is not None and not isinstance(self.skip_download, bool):
            raise ValueError(f"skip_download={self.skip_download!r}: expected True, False or None (the environment)")
        if self.model_id is None and (given := [name for name in ("revision", "token") if getattr(self, name)]):
            raise ValueError(f"ModelConfig got {' and '.join(given)} without a model_id; they are for the hub")
        for pattern in self.patterns:
            if pattern.startswith("/") or ".." in pattern.split("/"):
                raise ValueError(f"origin_file_pattern={pattern!r}: expected a glob inside the repository")
        if self.quantize is not None:
            self.quantize = quantize_config(self.quantize)
        if self.clear_parameters:
            raise ValueError("ModelConfig got clear_parameters, which this version does not have yet; leave it out")

    def _check_types(self) -> None:
        """Raise TypeError for a field of another type."""
        paths = self.path if isinstance(self.path, list | tuple) else [self.path]
        if not all(isinstance(each, str | Path | None) for each in paths) or (len(paths) != 1 and None in paths):
            raise TypeError(f"path={shown(self.path)}: expected a path, or a list of the files of one checkpoint")
        patterns = self.origin_file_pattern
        for each in patterns if isinstance(patterns, list | tuple) else [patterns]:
            if not isinstance(each, str | None):
                raise TypeError(f"origin_file_pattern={shown(patterns)}: expected a glob, or a list of globs")
        for name in ("model_id", "download_source", "source", "revision", "token", "role"):
            value = getattr(self, name)
            if not isinstance(value, str | None):
                what = "text" if name == "token" else f"text, got {shown(value)}"
                raise TypeError(f"{name}: expected {what}")
        if not isinstance(self.local_model_path, str | Path | None):
            raise TypeError(f"local_model_path={shown(self.local_model_path)}: expected a path")
        if not isinstance(self.state_dict, Mapping | None):
            raise TypeError(f"state_dict is a {type(self.state_dict).__name__}; expected a dict key -> tensor")

    @classmethod
    def from_source(cls, text: str, **fields: Any) -> ModelConfig:
        """Return a `ModelConfig` for a source string, `owner/repository:pattern` or `scheme://location`, with `fields`
        as its other fields.
        """
        parsed = parse_source(text)
        if parsed.scheme:
            return cls(source=text, **fields)
        return cls(model_id=parsed.model_id, origin_file_pattern=parsed.pattern, **fields)

    @property
    def vram_keys(self) -> dict[str, Any]:
        """A dict of the eight placement fields, `offload_device` to `computation_dtype`: field name -> value, None if
        not set.
        """
        return {name: getattr(self, name) for name in VRAM_KEYS}

    @property
    def root(self) -> Path:
        """`Path` of the folder with one folder for each repository, to which they are downloaded; the environment's if
        `local_model_path` is None.
        """
        return expanded(self.local_model_path) if self.local_model_path is not None else _env.model_base_path()

    @property
    def folder(self) -> Path:
        """`Path` of the local folder of this repository, `root/owner/name`, with `@revision` appended if one is set
        (its `/` replaced by `--`).
        """
        at = f"@{self.revision.replace('/', '--')}" if self.revision else ""
        return self.root / f"{self.model_id}{at}"

    @property
    def offline(self) -> bool:
        """Whether downloads are off: `skip_download`, or if that is None the environment variable
        DIFFSYNTH_SKIP_DOWNLOAD.
        """
        return _env.skip_download() if self.skip_download is None else self.skip_download

    @property
    def hub(self) -> str:
        """Name of the hub to download from, "modelscope" or "huggingface"; the environment's if `download_source` is
        not set.
        """
        return self.download_source or _env.download_source()

    @property
    def patterns(self) -> tuple[str, ...]:
        """A tuple of globs of files (folders: a trailing "/") inside the repository; empty for the whole repository."""
        pattern = self.origin_file_pattern
        several = [pattern] if isinstance(pattern, str) or pattern is None else list(pattern)
        return tuple(each for each in several if each not in (None, "", "./"))

    def __str__(self) -> str:
        if self.model_id is not None:
            at = f"@{self.revision}" if self.revision else ""
            return f"{self.model_id}{at}:{','.join(self.patterns)}"
        return self.source or ("a state_dict" if self.state_dict is not None else str(self.path))
