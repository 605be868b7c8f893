"""Fixtures of `conftest.py`: the network is blocked, memory is filled with NaN, seeds and settings are fixed."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


def test_the_network_is_out_of_reach():
    with socket.socket() as client, pytest.raises(RuntimeError, match="only loopback is allowed"):
        client.connect(("192.0.2.1", 80))


def test_loopback_is_not():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())


def test_memory_of_library_code_is_unfilled():
    library = {"__name__": "diffsynth.nn.example", "torch": torch}
    assert eval("torch.empty(3)", library).isnan().all()
    assert eval("torch.empty_like(torch.zeros(3))", library).isnan().all()
    assert eval("torch.zeros(3).new_empty(2)", library).isnan().all()
    assert eval("torch.empty(3, dtype=torch.int64)", library).shape == (3,)


def test_a_device_context_reaches_every_allocation():
    with torch.device("meta"):
        assert torch.empty(3).is_meta
        assert torch.nn.Linear(2, 2).weight.is_meta
        assert eval("torch.empty(3)", {"__name__": "diffsynth.nn.example", "torch": torch}).is_meta


def test_seeds_are_fixed():
    first = torch.rand(2)
    torch.manual_seed(0)
    assert torch.equal(first, torch.rand(2))


def test_settings_of_the_caller_are_gone():
    assert [name for name in os.environ if name.startswith("DIFFSYNTH_")] == ["DIFFSYNTH_CACHE_DIR"]


def test_slow_files_exist_and_are_run_first(request):
    conftest = request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    folder = Path(__file__).parent
    slow = [folder / name for name in conftest.SLOW_FILES]
    assert [path for path in slow if not path.is_file()] == []
    files = [folder / "cli" / "test_list.py", slow[2], Path(__file__), slow[0]]
    items = [SimpleNamespace(path=path) for path in files]
    conftest.pytest_collection_modifyitems(items)
    assert [item.path for item in items] == [slow[0], slow[2], files[0], files[2]]
    assert not request.config.option.loadscopereorder
