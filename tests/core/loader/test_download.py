"""Both hub libraries against a hub on loopback that breaks off, sends wrong content, or refuses."""

import logging
import os
import threading

import pytest
import torch
from safetensors.torch import save

from diffsynth.core.loader import download, header
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.files import find
from diffsynth.core.progress import reporting
from diffsynth.errors import Cancelled, DownloadFailed, NoFiles
from hub_server import Hub, serve

HUBS = ("huggingface", "modelscope")
SECRET = "hub_0123456789secret"
WEIGHTS = save({"weight": torch.arange(100_000.0)})


@pytest.fixture(scope="module")
def server():
    started = serve()
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture(params=HUBS)
def hub(request, server, tmp_path, monkeypatch):
    """Return the hub's name, with its library directed to loopback."""
    files = {
        "transformer/a-00001-of-00002.safetensors": WEIGHTS,
        "transformer/a-00002-of-00002.safetensors": save({"bias": torch.zeros(3)}),
        "vae/x.safetensors": save({"x": torch.ones(2)}),
        "README.md": b"# a model",
    }
    server.hub = Hub(files)
    monkeypatch.setenv("DIFFSYNTH_DOWNLOAD_SOURCE", request.param)
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "")
    from huggingface_hub import constants
    from modelscope_hub import config as modelscope_config

    # The first use in a process reads these variables; a test that ran before may have been that use.
    monkeypatch.setattr(modelscope_config, "_default_config", None)
    # Read from the environment when it is imported, which it was long ago.
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return server.hub


def config(pattern="transformer/*.safetensors", **options):
    return ModelConfig(model_id="owner/model", origin_file_pattern=pattern, **options)


def test_what_matches_is_fetched_and_nothing_else(hub, tmp_path):
    found = find(config())
    assert [file.name for file in found] == ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]
    assert found[0].read_bytes() == WEIGHTS
    assert hub.asked_for("vae/x.safetensors") == hub.asked_for("README.md") == []
    assert header.read(found).shapes == {"weight": (100_000,), "bias": (3,)}


def test_no_request_is_made_when_all_is_there(hub):
    find(config())
    hub.requests.clear()
    assert len(find(config())) == 2
    assert len(find(config(skip_download=True))) == 2
    assert hub.requests == []


def test_an_interrupted_download_goes_on_where_it_was(hub, monkeypatch):
    """The connection breaks within one call, and the library requests the rest of the bytes."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**14)  # what arrives in part of a chunk is asked for again
    _no_waiting(monkeypatch)
    hub.cut["transformer/a-00001-of-00002.safetensors"] = [200_000]
    assert find(config())[0].read_bytes() == WEIGHTS
    ranges = hub.asked_for("transformer/a-00001-of-00002.safetensors")
    assert any(text and not text.startswith("bytes=0-") for text in ranges[1:]), ranges


def test_a_call_that_died_halfway_is_made_again(hub, monkeypatch):
    """ModelScope's library continues after the first half; Hugging Face's starts that file again."""
    path = "transformer/a-00001-of-00002.safetensors"
    _no_waiting(monkeypatch)
    hub.cut[path], hub.dies = [300_000], True
    with pytest.raises(DownloadFailed):
        find(config())
    assert not (config().folder / path).exists()
    hub.refuses, hub.dies = 0, False
    hub.requests.clear()
    assert find(config())[0].read_bytes() == WEIGHTS
    (asked,) = hub.asked_for(path)
    resumes = os.environ["DIFFSYNTH_DOWNLOAD_SOURCE"] == "modelscope"
    assert bool(asked) == resumes


def test_a_download_that_failed_leaves_nothing_that_looks_whole_and_is_repeated(hub, monkeypatch):
    path = "transformer/a-00001-of-00002.safetensors"
    monkeypatch.setattr(hub, "refuses", 503)
    _no_waiting(monkeypatch)
    with pytest.raises(DownloadFailed, match=r"could not fetch owner/model:.*then load again"):
        find(config())
    with pytest.raises(NoFiles, match="no file matches"):
        find(config(skip_download=True))
    hub.refuses = 0
    assert find(config())[0].read_bytes() == WEIGHTS
    assert len(hub.asked_for(path)) == 1


def test_only_the_missing_shard_is_fetched(hub):
    first, second = find(config())
    second.unlink()
    hub.requests.clear()
    assert find(config()) == [first, second]
    assert hub.asked_for("transformer/a-00001-of-00002.safetensors") == []
    assert len(hub.asked_for("transformer/a-00002-of-00002.safetensors")) == 1


def test_one_of_two_patterns_is_there(hub):
    """A file that one pattern matched was once taken as present for the other pattern, too."""
    find(config("vae/*"))
    found = find(config(["vae/*", "transformer/*.safetensors"]))
    assert len(found) == 3


def test_offline_with_something_missing_says_what_and_how_to_get_it(hub, monkeypatch):
    find(config("vae/*"))
    hub.requests.clear()
    name = os.environ["DIFFSYNTH_DOWNLOAD_SOURCE"]
    command = {"huggingface": "hf download owner/model", "modelscope": "modelscope download --model owner/model"}[name]
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    with pytest.raises(
        NoFiles, match=rf"'transformer/\*\.safetensors' in .*Run: {command} --include 'transformer/\*"
    ) as caught:
        find(config(["vae/*", "transformer/*.safetensors"]))
    assert "In " in str(caught.value)
    assert "vae/" in str(caught.value)
    assert hub.requests == []


def test_offline_with_a_missing_shard(hub):
    find(config())[1].unlink()
    hub.requests.clear()
    with pytest.raises(NoFiles, match=r"1 shard is missing.*a-00002-of-00002.*Run: .*--include 'transformer/\*"):
        find(config(skip_download=True))
    assert hub.requests == []


def test_of_two_damaged_files_neither_is_kept(hub, monkeypatch):
    """The check once stopped at the first, and the second stayed, with the hub's checksum as its record."""
    paths = [f"transformer/a-0000{n}-of-00002.safetensors" for n in (1, 2)]
    hub.lies.update(paths)
    _no_waiting(monkeypatch)
    with pytest.raises(DownloadFailed, match=r"sha256|[Hh]ash|integrity|checksum"):
        find(config())
    assert [path for path in paths if (config().folder / path).exists()] == []
    hub.lies.clear()
    assert find(config())[0].read_bytes() == WEIGHTS


def test_what_is_not_what_was_announced_is_refused_and_removed(hub, monkeypatch):
    path = "transformer/a-00001-of-00002.safetensors"
    hub.lies.add(path)
    _no_waiting(monkeypatch)
    with pytest.raises(DownloadFailed, match=r"sha256|[Hh]ash|integrity|checksum"):
        find(config())
    assert not (config().folder / path).exists()
    hub.lies.clear()
    assert find(config())[0].read_bytes() == WEIGHTS


def test_a_pattern_that_the_repository_does_not_have(hub):
    with pytest.raises(NoFiles, match=r"no file matches 'unet/\*'.*has none: check the pattern"):
        find(config("unet/*"))


def test_revisions_do_not_mix(hub):
    find(config("vae/*"))
    found = find(config("vae/*", revision="refs/pr/3"))
    assert found[0].parent.parent.name == "model@refs--pr--3"
    assert any("refs/pr/3" in url or "refs%2Fpr%2F3" in url for _, url, _ in hub.requests)


def test_the_token_is_sent_and_never_shown(hub, monkeypatch, caplog):
    wanted = config("vae/*", token=SECRET)
    with caplog.at_level(logging.DEBUG):
        find(wanted)
    sent = [headers for _, _, headers in hub.requests if SECRET in str(headers)]
    assert sent
    assert SECRET not in caplog.text
    assert SECRET not in repr(wanted) + str(wanted)
    hub.refuses = 401
    _no_waiting(monkeypatch)
    with pytest.raises(DownloadFailed, match="a login or an accepted license") as caught:
        find(config("transformer/*", token=SECRET))
    assert SECRET not in _everything_printed(caught.value)


def test_a_library_that_quotes_the_token_is_not_quoted(hub, monkeypatch):
    def fetch(config, task):
        raise ValueError(f"Illegal header value b'Bearer {config.token}'")

    monkeypatch.setitem(download._FETCHERS, os.environ["DIFFSYNTH_DOWNLOAD_SOURCE"], fetch)
    with pytest.raises(DownloadFailed, match=r"Illegal header value b'Bearer \*\*\*'") as caught:
        find(config(token=SECRET))
    assert SECRET not in _everything_printed(caught.value)


def test_a_full_disk_says_so(hub, monkeypatch):
    """The error is raised where the libraries write the file."""
    _no_waiting(monkeypatch)
    _full_disk(monkeypatch)
    with pytest.raises(DownloadFailed, match=r"No space left.*Make room on the disk of .*owner/model"):
        find(config("vae/*"))
    monkeypatch.undo()


def test_progress_counts_the_bytes_of_all_files(hub):
    seen = []
    with reporting(seen.append):
        find(config())
        find(config())  # nothing is fetched again
    assert {(each.stage, each.unit, each.description) for each in seen} == {("download", "bytes", str(config()))}
    done = [each.done for each in seen]
    assert done == sorted(done)
    size = sum(len(data) for path, data in hub.files.items() if path.startswith("transformer/"))
    assert (seen[0].done, seen[0].total) == (0, None)
    assert (seen[-1].done, seen[-1].total) == (size, size)


@pytest.mark.parametrize("end", ["cancel", "callback"])
def test_a_download_that_is_ended_resumes(end, hub, monkeypatch):
    """It ends at its next block. ModelScope's library continues there, Hugging Face's starts that file again."""
    path, cancel = "transformer/a-00001-of-00002.safetensors", threading.Event()
    for name in ("huggingface_hub.constants", "modelscope_hub._download"):
        monkeypatch.setattr(f"{name}.DOWNLOAD_CHUNK_SIZE", 2**14)
    monkeypatch.setattr("diffsynth.core.progress._INTERVAL", 0)

    def on_progress(each):
        if each.done >= 100_000:
            cancel.set()
            if end == "callback":
                raise ZeroDivisionError("mine")

    expected = Cancelled if end == "cancel" else ZeroDivisionError
    with pytest.raises(expected), reporting(on_progress, cancel=cancel if end == "cancel" else None):
        find(config())
    assert not (config().folder / path).exists()
    assert len(hub.asked_for(path)) == 1, "it was tried again"
    hub.requests.clear()
    assert find(config())[0].read_bytes() == WEIGHTS
    (asked,) = hub.asked_for(path)
    assert bool(asked) == (os.environ["DIFFSYNTH_DOWNLOAD_SOURCE"] == "modelscope")


def _everything_printed(error):
    import traceback

    return "".join(traceback.format_exception(error))


def _no_waiting(monkeypatch):
    """Retry without waiting."""
    import time

    from modelscope_hub._download_control import _DownloadControl

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(_DownloadControl, "sleep", lambda self, seconds: None)


def _full_disk(monkeypatch):
    import builtins
    import io
    from pathlib import Path

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    def opened(path, mode="r", *rest, real=builtins.open, **options):
        if str(path).endswith(".incomplete") and any(letter in mode for letter in "wa+"):
            return Full(path, mode.replace("b", ""))
        return real(path, mode, *rest, **options)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(Path, "open", lambda path, mode="r", *rest, **options: opened(path, mode, *rest, **options))
