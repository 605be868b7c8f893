"""Reading parts of a component gives the same bits as reading all of it, for every rule and dtype."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from diffsynth.core.device.upload import UploadRing
from diffsynth.core.loader import convert, header, pickled
from diffsynth.core.loader.checkpoint import read_files
from diffsynth.core.loader.dtypes import torch_dtypes
from diffsynth.core.loader.reader import blocks
from diffsynth.core.loader.reader import source as sources
from diffsynth.core.loader.reader.ops import apply_rule
from diffsynth.core.loader.reader.source import ComponentSource, read_tensors
from diffsynth.core.loader.scaled import Scaled
from diffsynth.core.loader.state_dict import load_state_dict
from diffsynth.errors import CorruptFile

RULES = (
    convert.Rename("plain", "layers.0.plain"),
    convert.Split("rows", ("layers.0.a", "layers.0.b"), 0, (3, 5)),
    convert.Split("columns", ("layers.0.c", "layers.0.d"), 1),
    convert.Fuse(("top", "bottom"), "layers.0.fused"),
    convert.Fuse(("left", "right"), "layers.0.fused_columns", 1),
    convert.Fuse(("half", "single"), "layers.0.promoted"),
    convert.Reshape("flat", "layers.1.reshaped", (4, -1)),
    convert.Permute("kernel", "layers.1.permuted", (3, 2, 0, 1)),
    convert.ReorderChunks("modulation", "layers.1.reordered", (2, 0, 1)),
    convert.ReorderChunks("gates", "layers.1.reordered_columns", (1, 0), 1),
    convert.Tie("embed", "head"),
    convert.Dequantize("low", "low_scale", "layers.1.dequantized"),
    Scaled(convert.Split("low_rows", ("layers.1.e", "layers.1.f")), ("rows_scale",)),
    convert.Constant("layers.1.constant", (3, 2), 0.5),
    convert.Apply(torch.add, ("x", "y"), "layers.1.applied", lambda x, y: x),
    convert.Check("checked", lambda tensor: None),
    convert.Drop("unread"),
)
OPS = {rule for rule in vars(convert).values() if isinstance(rule, type) and issubclass(rule, convert.Rule)}


def tensors():
    def some(*shape):
        return torch.randn(shape)

    return {
        "plain": some(5, 7), "rows": some(8, 3), "columns": some(4, 6), "top": some(2, 3), "bottom": some(4, 3),
        "left": some(2, 3), "right": some(2, 5), "half": some(2, 3).half(), "single": some(2, 3), "flat": some(24),
        "kernel": some(3, 2, 4, 5), "modulation": some(6, 3), "gates": some(3, 6), "embed": some(9, 2),
        "low": some(4, 4).to(torch.float8_e4m3fn), "low_scale": some(4, 1),
        "low_rows": some(4, 4).to(torch.float8_e4m3fn), "rows_scale": torch.tensor(0.25),
        "x": some(3), "y": some(3), "unread": some(2), "through": torch.randn(()),
        "nothing": some(0, 3), "checked": some(2),
    }  # fmt: skip


def save(found, folder, shards=2):
    keys = list(found)
    files = [folder / f"{n}.safetensors" for n in range(shards)]
    for n, file in enumerate(files):
        save_file({key: found[key] for key in keys[n::shards]}, file)
    return header.read(files)


def source_of(head, dtype, rules=RULES):
    plan = convert.plan(rules, head.shapes)
    return ComponentSource(head, plan.targets, dict.fromkeys(plan.targets, dtype))


def expected(source, found, dtype):
    return {
        key: apply_rule(target.rule, tuple(found[name] for name in target.sources), target.index).to(dtype)
        for key, target in source._targets.items()
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


def test_every_rule_is_here():
    assert {type(rule) for rule in RULES} == (OPS - {convert.Rule}) | {Scaled}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("copy", [True, False])
def test_every_rule_streams_as_it_loads(tmp_path, dtype, copy):
    found = tensors()
    source = source_of(save(found, tmp_path), dtype)
    whole = source.read(copy=copy)
    assert same(whole, expected(source, found, dtype))
    for key in source.keys:
        assert same(source.read([key], copy=copy), {key: whole[key]})
    for prefix in ("layers.0.", "layers.1."):
        part = source.read(source.targets_of(prefix), copy=copy)
        assert part.keys() == {key for key in whole if key.startswith(prefix)}
        assert all(torch.equal(part[key], whole[key]) for key in part)


def test_a_pickle_and_a_state_dict_give_the_same(tmp_path):
    found = tensors()
    torch.save(found, tmp_path / "x.pth")
    for head in (read_files([tmp_path / "x.pth"]), pickled.of_state_dict(found)):
        source = source_of(head, torch.float32)
        assert same(source.read(), expected(source, found, torch.float32))


def test_only_a_state_dict_shares_its_tensors(tmp_path):
    found = {"plain": torch.ones(3)}
    torch.save(found, tmp_path / "x.pth")
    pointers = [
        source_of(head, torch.float32, ()).read()["plain"].data_ptr()
        for head in (pickled.of_state_dict(found), read_files([tmp_path / "x.pth"]))
    ]
    assert pointers[0] == found["plain"].data_ptr() != pointers[1]


def test_parameters_of_a_given_state_dict_stay_as_they_are():
    """Loading freezes the module; it once could have frozen the parameters that the caller had given."""
    given = {"plain": torch.nn.Parameter(torch.ones(3)), "rows": torch.nn.Parameter(torch.ones(8, 3))}
    made = source_of(pickled.of_state_dict(given), torch.float32, RULES[:2]).read()
    assert not any(tensor.requires_grad_(False).requires_grad for tensor in made.values())
    assert all(parameter.requires_grad for parameter in given.values())


@pytest.mark.parametrize("name", [name for name in torch_dtypes() if name != "F8_E8M0"])
def test_every_dtype_is_read_and_converted(tmp_path, name):
    dtype = torch_dtypes()[name]
    found = {"a": torch.arange(24).reshape(4, 6).to(dtype), "b": torch.ones(3).to(dtype)}
    save_file(found, tmp_path / "x.safetensors")
    head = header.read([tmp_path / "x.safetensors"])
    assert same(read_tensors(head, device="cpu"), found)
    into = torch.complex64 if dtype.is_complex else torch.float32
    assert same(source_of(head, into, ()).read(), {key: tensor.to(into) for key, tensor in found.items()})


def test_tensors_larger_than_a_block_and_many_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 256)
    monkeypatch.setattr(sources, "BLOCK", 256)
    found = {f"t{n}": torch.randn(n) for n in (1, 2, 3, 5, 400, 7, 1000)}
    head = save(found, tmp_path, 3)
    reads, read = [], blocks.BlockReader._read

    def spy(self, file, start, landings):
        reads.append(sum(landing.numel() * landing.element_size() for landing in landings))
        read(self, file, start, landings)

    monkeypatch.setattr(blocks.BlockReader, "_read", spy)
    assert same(source_of(head, torch.float32, ()).read(), found)
    assert max(reads) <= 256
    assert sum(reads) == sum(tensor.numel() * 4 for tensor in found.values())
    assert len(reads) < 3 + 1400 * 4 // 256 + 3
    assert same(source_of(head, torch.float32, ()).read(copy=False), found)


def test_fill_takes_tensors_that_are_there(tmp_path):
    found = tensors()
    source = source_of(save(found, tmp_path), torch.float32)
    keys = source.targets_of("layers.0.")
    flat = torch.full((source.size(keys) // 4,), 7.0)
    views, first = {}, 0
    for key in keys:
        shape = torch.Size(source.shapes[key])
        views[key], first = flat[first : first + shape.numel()].view(shape), first + shape.numel()
    source.fill(views)
    assert first == flat.numel()
    assert same(views, source.read(keys))
    with pytest.raises(ValueError, match=r"cannot fill \(2, 2\); expected \(5, 7\)"):
        source.fill({"layers.0.plain": torch.zeros(2, 2)})
    with pytest.raises(KeyError, match=r"did you mean 'layers.0.plain'"):
        source.read(["layers.0.plane"])


def test_mapped_tensors_are_private_and_tied_ones_apart(tmp_path):
    found = tensors()
    head = save(found, tmp_path, 1)
    before = head.files[0].read_bytes()
    made = source_of(head, torch.float32).read(copy=False)
    for tensor in made.values():
        tensor.zero_()
        assert not torch.any(tensor)
    assert head.files[0].read_bytes() == before
    again = source_of(head, torch.float32).read(["embed", "head"], copy=False)
    again["embed"].zero_()
    assert torch.equal(again["head"], found["embed"])


def test_mapped_where_the_system_cannot_populate(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_madvise", lambda: None)
    found = tensors()
    source = source_of(save(found, tmp_path), torch.float32)
    assert same(source.read(copy=False), expected(source, found, torch.float32))


@pytest.mark.parametrize("copy", [True, False])
def test_a_file_put_in_its_place_is_an_error(tmp_path, copy):
    found = tensors()
    head = save(found, tmp_path, 1)
    source = source_of(head, torch.float32)
    save_file(found, tmp_path / "new")
    os.replace(tmp_path / "new", head.files[0])
    with pytest.raises(CorruptFile, match=r"0\.safetensors changed since its header was read"):
        source.read(copy=copy)


def test_a_file_written_to_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    head = save(tensors(), tmp_path, 1)
    check, calls = header.Header.check_unchanged, []

    def touch_between(self, file, descriptor=None):
        calls.append(file)
        if len(calls) == 2:
            os.utime(file, ns=(1, 1))
        check(self, file, descriptor)

    monkeypatch.setattr(header.Header, "check_unchanged", touch_between)
    with pytest.raises(CorruptFile, match="changed since its header was read"):
        source_of(head, torch.float32).read()


def test_an_error_of_a_thread_names_the_file_and_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 256)
    head = save({f"t{n}": torch.randn(64) for n in range(100)}, tmp_path, 2)
    begun, read = [], blocks.BlockReader._read

    def spy(self, file, start, landings):
        begun.append(start)
        if len(begun) == 5:
            head.files[1].unlink()
        read(self, file, start, landings)

    monkeypatch.setattr(blocks.BlockReader, "_read", spy)
    with pytest.raises(CorruptFile, match=r"1\.safetensors cannot be read at byte \d+: .*No such file"):
        source_of(head, torch.float32, ()).read()
    assert len(begun) < 60
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("diffsynth-read")]


def test_ctrl_c_stops_the_threads():
    # A program that a shell starts in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started, done = threading.Event(), []

    def task():
        started.set()
        threading.Event().wait(0.01)
        done.append(1)

    def interrupt():
        started.wait()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            blocks.run_tasks([task] * 5000)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(done) < 1000
    for thread in threading.enumerate():
        if thread.name.startswith("diffsynth-read"):
            thread.join(5)
            assert not thread.is_alive()


def test_a_byte_budget_bounds_what_is_held():
    budget, held, most, lock = blocks.ByteBudget(100), [0], [0], threading.Lock()

    def task(size):
        with budget.of(size):
            with lock:
                held[0] += size
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.002)
            with lock:
                held[0] -= size

    blocks.run_tasks([lambda size=size: task(size) for size in (60, 30, 50, 90, 250, 10) * 5])
    assert most[0] == 250  # which is more than there is, and was alone


class Event:
    """An event of a device whose copies arrive only when the event is waited for."""

    def __init__(self, pending):
        self.pending = pending

    def synchronize(self):
        for source, destination in self.pending:
            destination.copy_(source)
        self.pending.clear()


class SlowRing(UploadRing):
    """An upload ring whose copies arrive when their event is waited for, so that early refilling gives wrong data."""

    def __init__(self, device, **options):
        super().__init__(device, **options)
        self.local, self.events = threading.local(), []

    def upload(self, pairs):
        self.local.pending = [*getattr(self.local, "pending", []), *pairs]

    def mark(self, device):
        self.events.append(Event(self.local.__dict__.pop("pending", [])))
        return self.events[-1]

    def wait(self):
        for event in self.events:
            event.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_of_the_ring_are_not_reused_before_their_copy_is_done(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(blocks, "BLOCK", 256)
    found = tensors() | {f"t{n}": torch.randn(300) for n in range(20)}
    source = source_of(save(found, tmp_path), dtype)
    ring = SlowRing("cpu", buffers=2, size=256)
    monkeypatch.setattr("diffsynth.core.device.record_event", ring.mark)
    into = {key: torch.full(shape, -1.0, dtype=dtype) for key, shape in source.shapes.items()}
    requests = {key: source._requests(key, tensor.view(-1)) for key, tensor in into.items()}
    tasks = source._reader.tasks([request for some in requests.values() for request in some or ()], ring)
    budget = blocks.ByteBudget(1000)
    tasks += [
        lambda key=key: source._make(key, into[key], ring, budget) for key, some in requests.items() if some is None
    ]
    blocks.run_tasks(tasks)
    ring.wait()
    assert same(into, expected(source, found, dtype))
    assert len(ring.events) > 20


def test_the_ring_gives_its_buffers_back_after_an_error():
    ring = UploadRing("cpu", buffers=1, size=64)
    for _ in range(3):
        with pytest.raises(RuntimeError), ring.buffer():
            raise RuntimeError
    with ring.buffer() as buffer:
        assert buffer.numel() == 64


def test_read_ahead_stops_at_its_limit_and_when_told(tmp_path, monkeypatch):
    head = save({f"t{n}": torch.randn(64) for n in range(8)}, tmp_path, 2)
    source = source_of(head, torch.float32, ())
    asked = []
    monkeypatch.setattr(blocks.BlockReader, "discard", lambda self, file, start, end: asked.append(end - start))
    source.read_ahead(limit=1500, stop=lambda: False)
    assert sum(asked) == 1500
    asked.clear()
    source.read_ahead(limit=1500, stop=lambda: True)
    assert asked == []


PEAK = """
import sys, torch
from diffsynth.core.loader import convert, header
from diffsynth.core.loader.reader.source import ComponentSource
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
head = header.read([__import__("pathlib").Path(sys.argv[1])])
plan = convert.plan((), head.shapes)
source = ComponentSource(head, plan.targets, dict.fromkeys(plan.targets, getattr(torch, sys.argv[2])))
torch.ones(1).half()
before = anonymous()
made = source.read()
print((anonymous() - before) * 1024 / sum(t.numel() * t.element_size() for t in made.values()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_model_and_little_more(tmp_path, dtype):
    """A file of 256 MB is loaded in a process of its own; converted it takes half of that, and buffers are small."""
    file = tmp_path / "x.safetensors"
    sparse(file, {f"layer{n}": 2**21 for n in range(32)})
    result = subprocess.run([sys.executable, "-c", PEAK, file, dtype], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < (1.05 if dtype == "float32" else 1.35)


def sparse(file, counts):
    import json

    entries, end = {}, 0
    for key, count in counts.items():
        entries[key] = {"dtype": "F32", "shape": [count], "data_offsets": [end, end + 4 * count]}
        end += 4 * count
    text = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def test_the_cost_of_many_small_tensors_is_linear(tmp_path, monkeypatch):
    """A LoRA of 1,000 layers took 12 s: for each tensor, all earlier ones of its block were counted again."""
    counted = []
    room = blocks.ReadRequest.room.fget
    monkeypatch.setattr(blocks.ReadRequest, "room", property(lambda self: counted.append(1) or room(self)))
    tensors = {f"layers.{index}.weight": torch.full((2,), float(index)) for index in range(500)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = load_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert len(counted) <= 3 * len(tensors)
