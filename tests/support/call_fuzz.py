"""Calls with wrong arguments, and what becomes of them."""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffsynth import _discovery
from diffsynth.errors import DiffsynthError, shown
from diffsynth.runtime.controlnet import ControlNetInput
from diffsynth.runtime.guidance import ClassifierFree
from diffsynth.testing.checks.tiny_model import TinyModel


def pipelines() -> list[str]:
    """Return a list of names of models: one of each pipeline that plugins declare, which needs no image if there is
    such a model.
    """
    models = [each.spec for each in _discovery.catalog().models]
    plain_first = sorted(models, key=lambda spec: bool(spec.tiny_inputs))
    first = {spec.pipeline: spec.name for spec in reversed(plain_first)}
    return [first[pipeline] for pipeline in dict.fromkeys(spec.pipeline for spec in models)]


_LARGE = 256
"""Numbers above this are not run, as the call would be long."""


_FUNCTIONS = frozenset({"on_step", "progress_bar_cmd"})
"""Arguments that are the caller's functions, which may raise errors of their own in the loop."""


class Encoded(Exception):
    """The text encoder ran."""


@dataclass(frozen=True)
class Verdict:
    """The result of a call: "clear" (refused in time, by an error that names an argument), "accepted", or a fault."""

    arguments: str
    kind: str
    detail: str = ""

    @property
    def is_faulty(self) -> bool:
        return self.kind not in ("clear", "accepted")

    def __str__(self) -> str:
        return f"{self.arguments}: {self.kind}: {self.detail}"


class FuzzedPipeline:
    """A model with tiny components whose calls are judged."""

    def __init__(self, name: str) -> None:
        declared = next(each for each in _discovery.catalog().models if each.spec.name == name)
        size = {"height": 32, "width": 32, "num_frames": 5}
        model = TinyModel(declared, Path(tempfile.mkdtemp()))
        self.pipe, base = model.pipe, model.arguments(size, num_inference_steps=1, progress_bar_cmd=iter)
        parameters = self.pipe.__signature__.parameters
        self.arguments = list(parameters)
        self._base = {name: value for name, value in {**size, **base}.items() if name in parameters}
        self._base["cfg_scale"] = 1.0

    def verdict(self, arguments: dict[str, Any]) -> Verdict:
        text = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        with contextlib.redirect_stdout(io.StringIO()):  # print is one of the values
            return self._verdict(text, arguments)

    def _verdict(self, text: str, arguments: dict[str, Any]) -> Verdict:
        before = self._run(arguments, encodes=False)
        if not isinstance(before, Encoded):
            return self._judged(text, arguments, before)
        if any(isinstance(value, int) and value > _LARGE for value in arguments.values()):
            return Verdict(text, "accepted", "not run")
        after = self._run(arguments, encodes=True)
        if after is None or not arguments.keys().isdisjoint(_FUNCTIONS):
            return Verdict(text, "accepted")
        return Verdict(text, "late", _text(after))

    def _judged(self, text: str, arguments: dict[str, Any], error: Exception | None) -> Verdict:
        if error is None:
            return Verdict(text, "accepted")
        if not isinstance(error, ValueError | TypeError | DiffsynthError):
            return Verdict(text, "another library's error", _text(error))
        if not any(name in str(error) for name in arguments):
            return Verdict(text, "names no argument", _text(error))
        return Verdict(text, "clear", _text(error))

    def _run(self, arguments: dict[str, Any], *, encodes: bool) -> Exception | None:
        encoders = [part for role, part in self.pipe.parts.items() if role.startswith("text_encoder")]
        for encoder in encoders if not encodes else ():
            encoder.forward = _encoded
        try:
            self.pipe(**{**self._base, **arguments})
        except Exception as error:
            return error
        finally:
            for encoder in encoders:
                vars(encoder).pop("forward", None)
        return None


def _encoded(*args: Any, **kwargs: Any) -> Any:
    raise Encoded


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.300}"


def _unchecked(**fields: Any) -> ControlNetInput:
    """Return a `ControlNetInput` whose fields are changed after it is made."""
    made = ControlNetInput()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


class Sneaky:
    """An object whose text form fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ONCE_FAULTY = {
    "prompt": (range(3), np.zeros((32, 32, 3)), "\ud800", [["a"], ["b"]], [["a", "b"]]),
    "negative_prompt": (["\udfff"], 3, [], [["a", "b"]]),
    "embedded_guidance": (1e300, float("nan")),
    "kontext_images": (range(3), []),
    "edit_image": (range(3), "sketch.png"),
    "inpaint_mask": (range(3),),
    "input_video": (range(9), ["a"] * 9),
    "denoising_strength": (0.5,),
    "input_image": ("sketch.png", torch.zeros(1, 3, 32, 32, device="meta"), torch.full((1, 3, 32, 32), 255.0)),
    "rand_device": ("cuda:99", "meta", "nowhere", 3),
    "seed": (10**400, 2**64, True, [0.5]),
    "sigma_shift": (1e300, float("nan"), 10**400),
    "tiled": ("false", 1, "no"),
    "tile_size": (0, [1], (None, 2), "ab"),
    "cfg_scale": (float("inf"), -(10**30), torch.ones(())),
    "num_inference_steps": (10**9, 2.0),
    "num_images": (10**9,),
    "height": (10**9, 10**400),
    "num_frames": (10**9,),
    "cancel": (True, "now"),
    "on_step": (lambda: None, 3),
    "progress_bar_cmd": (lambda a, b: a, "tqdm"),
    "output_type": (np.zeros(0),),
    "camera_control_origin": ([float("nan")] * 19, [1]),
    "camera_control_speed": (float("nan"),),
}
"""Argument -> values that were accepted, refused late, or by an error of another library."""


@functools.cache
def wrong_values() -> list[Any]:
    """Return a list of values of many kinds, most of which an argument must refuse."""
    written = io.BytesIO()
    Image.effect_noise((64, 64), 60).save(written, "PNG")
    truncated = Image.open(io.BytesIO(written.getvalue()[:700]))
    closed = Image.open(io.BytesIO(written.getvalue()))
    closed.close()
    emptied = Image.new("RGB", (8, 8))
    emptied.close()
    red = Image.new("RGB", (32, 32), "red")
    return [
        *(None, True, False, 0, 1, -1, 2, 3, 17, 10**9, -(10**30), 10**400),
        *(0.0, 0.5, -0.5, 1.5, 1e300, float("nan"), float("inf"), -float("inf"), 1j),
        *(
            "",
            "text",
            "true",
            "false",
            "1",
            "nan",
            "\ud800",
            "a\x00b",
            "cuda:99",
            "cpu",
            "meta",
            "\x1b]0;x\x07",
            b"bytes",
        ),
        *(
            [],
            (),
            {},
            set(),
            [None],
            [[]],
            [1],
            [1, 2],
            [0, 0],
            [-1, 5],
            ["a"],
            ["a", "b"],
            ["\udfff"],
            [float("nan")] * 19,
        ),
        *({"a": 1}, {1: 2}, range(3), iter([1]), (each for each in "ab")),
        *(object(), Sneaky(), Sneaky, int, type, len, print, lambda: None, lambda a, b, c: None, lambda _: None, list),
        *(threading.Event(), threading.Lock(), Path("sketch.png"), Path("/"), io.BytesIO(b"x")),
        *(np.zeros((32, 32, 3), np.uint8), np.float32(1), np.int64(4), np.bool_(True), np.zeros(0)),
        *(torch.zeros(()), torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 5, 32, 32), torch.zeros(2, 2), torch.zeros(0)),
        torch.full((1, 3, 32, 32), float("nan")),
        torch.full((1, 3, 5, 32, 32), 255.0),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 3, 32, 32, device="meta"),
        *(
            red,
            [red],
            [red] * 5,
            [red, 1],
            red.convert("P"),
            red.convert("RGBA"),
            Image.new("L", (1, 200)),
            [red, closed],
        ),
        *(Image.new("RGB", (0, 5)), truncated, closed, emptied, [truncated] * 5),
        *(ControlNetInput(), ControlNetInput(image=red), ControlNetInput(image="x"), [ControlNetInput(image=closed)]),
        *(_unchecked(image=red, scale=float("nan")), _unchecked(controlnet_id="0"), ClassifierFree(), ClassifierFree),
        *([["a"], ["b"]], [["a", "b"], "c"]),
        *(torch.device("cpu"), torch.float32, torch.nn.Identity(), NotImplemented, ..., Exception("x")),
    ]
