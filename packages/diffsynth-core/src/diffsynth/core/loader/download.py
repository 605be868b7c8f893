"""Fetching a `ModelConfig`'s files with the hub's own library."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from diffsynth.core.loader.config import ModelConfig
from diffsynth.errors import DownloadFailed

logger = logging.getLogger(__name__)


def download(config: ModelConfig) -> None:
    """Fetch what the patterns match into `<root>/<model_id>`.

    Raises:
        DownloadFailed: the hub could not be reached or refused; the message says what else to try.
    """
    folder = config.root / str(config.model_id)
    patterns = [f"{pattern}*" if pattern.endswith("/") else pattern for pattern in config.patterns]
    logger.info("downloading %s from %s to %s", config, config.hub, folder)
    fetch = _FETCHERS[config.hub]
    try:
        fetch(str(config.model_id), str(folder), patterns or None)
    except Exception as error:  # each hub library raises its own kinds, and those of its http client
        other = next(hub for hub in _FETCHERS if hub != config.hub)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise DownloadFailed(
            f"could not fetch {config} from {config.hub}: {type(error).__name__}: {reason:.200}. {_advice(error)}; "
            f"or set DIFFSYNTH_DOWNLOAD_SOURCE={other}; "
            f"or put the files into {folder} and set DIFFSYNTH_SKIP_DOWNLOAD=true; or give ModelConfig a path."
        ) from error


def _advice(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "The repository wants a login or an accepted license: log in with the hub's own command"
    if status == 404:
        return "The hub has no repository of that name: check the spelling"
    return "Check the network and the name"


def _from_modelscope(model_id: str, folder: str, patterns: list[str] | None) -> None:
    from modelscope import snapshot_download

    snapshot_download(model_id, local_dir=folder, allow_file_pattern=patterns)


def _from_huggingface(model_id: str, folder: str, patterns: list[str] | None) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(model_id, local_dir=folder, allow_patterns=patterns)


_FETCHERS: dict[str, Callable[[str, str, Any], None]] = {
    "modelscope": _from_modelscope,
    "huggingface": _from_huggingface,
}
