"""Repeated calls: counted as if each were made, made once for each form, and plain calls outside a trace."""

import contextlib

import pytest
import torch
from torch import nn

from diffsynth.core import repeats
from diffsynth.core.planning.tracer import MetaTracer
from diffsynth.core.repeats import repeated
from diffsynth.models.config import TINY_FLUX_AUTOENCODER, WanAutoencoderConfig
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.models.wan_autoencoder import WanAutoencoder


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def on_meta(*shape):
    return torch.empty(shape, device="meta")


WAN = WanAutoencoderConfig(dim=8, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,))
TILES = {"tiled": True, "tile_size": (4, 5), "tile_stride": (2, 3)}
LOOPS = {
    "decode a video in tiles": ("cuda", WanAutoencoder, WAN, lambda vae: vae.decode(on_meta(1, 16, 3, 6, 8), **TILES)),
    "decode a video": ("cpu", WanAutoencoder, WAN, lambda vae: vae.decode(on_meta(1, 16, 6, 4, 4))),
    "encode a video": ("cuda", WanAutoencoder, WAN, lambda vae: vae.encode(on_meta(1, 3, 11, 8, 8))),
    "decode an image in tiles": (
        "cpu",
        FluxAutoencoder,
        TINY_FLUX_AUTOENCODER,
        lambda vae: vae.decode(on_meta(1, 16, 28, 28), tiled=True, tile_size=(16, 16), tile_stride=(12, 12)),
    ),
}


def count(vae, run, device_type, *, each):
    """Return the trace of a run, the live bytes after it, its shape, and the layer calls; `each` makes all of them."""
    calls, blocks = [], dict(vae.named_children())
    hook = vae.decoder.register_forward_hook(lambda *_: calls.append(None))
    other = vae.encoder.register_forward_hook(lambda *_: calls.append(None))
    really = repeats.intercepted_by(lambda function, *arguments: function(*arguments))
    with MetaTracer(device_type, {"vae": vae}, {"vae": blocks}) as tracer, tracer.stage("vae") as stage:
        with really if each else contextlib.nullcontext():
            kept = run(vae)
        live = dict(tracer.allocations.live)
    hook.remove()
    other.remove()
    return stage, live, kept.shape, len(calls)


@pytest.mark.parametrize("name", LOOPS)
def test_a_trace_with_repeats_counts_the_same_as_one_of_every_call(name):
    device_type, cls, config, run = LOOPS[name]
    with torch.device("meta"):
        vae = cls(config).eval()
    *all_of_them, made = count(vae, run, device_type, each=True)
    *once, made_once = count(vae, run, device_type, each=False)
    assert once == all_of_them
    assert once[0].flops > 0
    assert once[0].block_calls
    assert made_once < made


class Kept:
    """An object that a function changes."""

    def __init__(self, kept=None):
        self.kept = kept


class Slotted(Kept):
    __slots__ = ("hidden",)


class Twice:
    """A function that counts its calls."""

    def __init__(self, function=lambda x, *_: x * 2):
        self.calls = 0
        self._function = function

    def __call__(self, *arguments):
        self.calls += 1
        return self._function(*arguments)


def calls_of(function, *arguments):
    with MetaTracer("cuda", {}) as tracer, tracer.stage("stage"):
        for each in arguments:
            repeated(function, *each())
    return function.calls


def keep(x, cache):
    cache.kept = x + 1
    return x * 2


def share(x, cache):
    cache.kept = x[:1]
    return x * 2


MADE_ONCE = {
    "tensors": (Twice(), lambda: (on_meta(3),)),
    "of tensors and values": (Twice(), lambda: (on_meta(3), [1, "two"], {"three": None})),
    "with an object": (Twice(), lambda: (on_meta(3), Kept(on_meta(2)))),
    "that change an object": (Twice(keep), lambda: (on_meta(3), Kept(on_meta(2)))),
    "of views": (Twice(), lambda: (on_meta(5)[1:4],)),
}
MADE_EACH = {
    "known values": (Twice(), lambda: (torch.zeros(3, device="meta"),)),
    "tensors with memory": (Twice(), lambda: (torch.zeros(3),)),
    "results that are views": (Twice(lambda x: x[1:]), lambda: (on_meta(3),)),
    "an attribute that is a view": (Twice(share), lambda: (on_meta(3), Kept())),
    "a list that grows": (Twice(lambda x, y: y.append(x + 1)), lambda: (on_meta(3), [])),
    "results with known values": (Twice(lambda x: torch.arange(3, device="meta")), lambda: (on_meta(3),)),
    "results of unknown kinds": (Twice(lambda x: object()), lambda: (on_meta(3),)),
    "functions, whose closures nobody sees": (Twice(), lambda: (on_meta(3), lambda: None)),
    "objects with more than attributes": (Twice(), lambda: (on_meta(3), Slotted())),
    "modules": (Twice(), lambda: (on_meta(3), nn.Identity())),
}


@pytest.mark.parametrize("name", MADE_ONCE)
def test_calls_of_the_same_form_are_made_once(name):
    function, arguments = MADE_ONCE[name]
    assert calls_of(function, arguments, arguments, arguments) == 1


@pytest.mark.parametrize("name", MADE_EACH)
def test_calls_that_may_do_something_else_are_all_made(name):
    function, arguments = MADE_EACH[name]
    assert calls_of(function, arguments, arguments) == 2


def test_calls_of_other_forms_are_made():
    """1 and True are equal, shapes of one size are not, and the form of an object may change."""
    looks = [(on_meta(3), 1), (on_meta(3), True), (on_meta(4), 1), (on_meta(4).double(), 1), (on_meta(3, 1), 1)]
    looks += [(on_meta(3), Kept()), (on_meta(3), Kept(on_meta(1))), (on_meta(3), (on_meta(1),)), (on_meta(3), [])]
    assert calls_of(Twice(), *(lambda each=each: each for each in looks)) == len(looks)


def test_a_graph_keeps_its_tensors():
    with torch.enable_grad():
        assert calls_of(Twice(), lambda: (on_meta(3),), lambda: (on_meta(3),)) == 2


def test_what_an_object_keeps_is_made_again():
    """The memory of a cache is counted for every object, and goes with it."""
    with MetaTracer("cuda", {}) as tracer, tracer.stage("stage"):
        caches = [Kept() for _ in range(5)]
        for cache in caches:
            repeated(keep, on_meta(256), cache)
        assert tracer.allocations.live["device"] == 5 * 1024
        del cache, caches
        assert tracer.allocations.live["device"] == 0


def swap(x, cache):
    cache.kept = None
    cache.kept = x.new_empty(768)


def test_what_an_object_kept_goes_before_the_new_comes():
    with MetaTracer("cuda", {}) as tracer, tracer.stage("stage") as stage:
        caches = [Kept(on_meta(1024)) for _ in range(3)]
        for cache in caches:
            repeated(swap, on_meta(1), cache)
    assert stage.device_bytes == 3 * 4096 + 512


def test_outside_a_trace_every_call_is_made():
    function, cache = Twice(keep), Kept()
    assert [repeated(function, torch.tensor([1.0]), cache).item() for _ in range(3)] == [2, 2, 2]
    assert function.calls == 3
    assert cache.kept.item() == 2
