"""Harness that runs users' scripts without a GPU and without a network, and checks of their calls. It replaces only:

device ("cuda" becomes "cpu"), precision where asked, size, number of frames, of steps and of T5's tokens,
`modelscope.dataset_snapshot_download`, `torch.cuda.mem_get_info`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelscope
import pytest
import torch
from PIL import Image, ImageChops
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from diffsynth import Pipeline
from diffsynth.core.data.media_writer import save_video
from diffsynth.core.vram.managed import managed
from diffsynth.errors import MissingComponent
from limited import keep_limit

SIDE = 16
"""Divisor of the sides of images and videos, and of the number of T5's tokens."""

STEPS = 6
"""Default divisor of the number of steps, rounded up: 8 become 2, 50 become 9."""

FRAMES = 10
"""Divisor of the frames after the first, rounded to multiples of 4: 81 become 9, 49 become 5, 121 become 13."""

CLIP_FRAMES = 14
"""Number of frames of a video in a data set."""

MEMORY = 80 * 2**30


@dataclass(frozen=True)
class Call:
    """One call of a pipeline in a script: the script's arguments, except for the device, and the result."""

    pipe: Pipeline
    arguments: dict[str, Any]
    output: Any
    steps: int = STEPS

    def again(self, **changed: Any) -> Any:
        """Return the result with some arguments changed; those set to `...` are left out."""
        arguments = self.arguments | changed
        given = {name: value for name, value in arguments.items() if value is not ...}
        return _small(self.pipe, given, steps=self.steps)

    def default_of(self, name: str) -> Any:
        """Return the pipeline's default of an argument."""
        return self.pipe.__signature__.parameters[name].default

    def is_default(self, name: str) -> bool:
        """Return whether a value is the pipeline's default."""
        return self.default_of(name) == self.arguments[name]

    @property
    def fixed(self) -> dict[str, Any]:
        """Arguments of a call whose result does not change from run to run: a seed, unless the script has one."""
        return {} if "seed" in self.arguments else {"seed": 0}


@dataclass
class Harness:
    """Environment in which scripts run, and a record of their calls.

    Args:
        monkeypatch: undoes the replacements.
        folder: the working directory of scripts.
        steps: how many times fewer steps are taken.
        precise: bf16 becomes fp32, which a CPU without it is four times as fast in.
    """

    monkeypatch: pytest.MonkeyPatch
    folder: Path
    steps: int = STEPS
    precise: bool = False
    calls: list[Call] = field(default_factory=list)

    def run(self, script: str) -> list[Call]:
        """Run a script; its exceptions propagate."""
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(modelscope, "dataset_snapshot_download", write_data_set)
        self.monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
        tree = ast.fix_missing_locations(_Replace(self.precise).visit(ast.parse(script)))
        before = len(self.calls)
        exec(compile(tree, "script", "exec"), {"__name__": "__main__", _CALL: self._call})
        return self.calls[before:]

    def _call(self, pipe: Pipeline, **arguments: Any) -> Any:
        output = _small(pipe, arguments, steps=self.steps)
        self.calls.append(Call(pipe, arguments, output, self.steps))
        return output


def differs(one: Any, other: Any) -> bool:
    """Return whether two images, or two lists of them, differ in size or in any pixel."""
    if isinstance(one, Image.Image):
        return one.size != other.size or ImageChops.difference(one, other).getbbox(alpha_only=False) is not None
    return len(one) != len(other) or any(differs(a, b) for a, b in zip(one, other, strict=True))


def check_arguments(
    call: Call, *, neutral: Mapping[str, Sequence[Any]] | None = None, unchanging: Iterable[str] = ()
) -> set[str]:
    """Check that each argument of a call has its effect, and return those without which the call is refused.

    Without the argument the result is another one, except for `unchanging`. All defaults, and each neutral value, give
    the bits of the call without them. A script that has no seed gets one, so that initial latents are the same.

    Args:
        call: of a script.
        neutral: argument -> its values, beside the default, that change nothing.
        unchanging: arguments that change no result.
    """
    output = call.again(**call.fixed)
    assert call.fixed or not differs(output, call.output), "the same call gives another result"
    changed = [name for name in call.arguments if not call.is_default(name)]
    refused = set()
    for name in changed:
        try:
            without = call.again(**call.fixed | {name: ...})
        except (ValueError, MissingComponent):
            refused.add(name)
            continue
        assert differs(without, output) == (name not in unchanging), f"{name}: expected an effect, or none"
        for value in (neutral or {}).get(name, ()):
            again = call.again(**call.fixed | {name: value})
            assert not differs(again, without), f"{name}={value!r} is not neutral"
    rest = set(changed) - refused - {"seed"}  # its default is another seed for each call
    defaults = call.again(**call.fixed | {name: call.default_of(name) for name in rest})
    assert not differs(defaults, call.again(**call.fixed | dict.fromkeys(rest, ...)))
    return refused


def check_low_vram(call: Call, other: Call, *, stored: torch.dtype | None, on_disk: bool) -> None:
    """Check the call of a script for little memory: results are those of the plain script, to the bit, also on a device
    that has room for no block; and every component is stored as the script says.

    Args:
        call: of the script for little memory, whose blocks travel, see `limited.let_blocks_travel`.
        other: of the plain script.
        stored: dtype of the weights in the state onload.
        on_disk: whether offloaded weights are on disk.
    """
    expected = other.again(**other.fixed) if other.fixed else other.output
    assert not differs(call.again(**call.fixed) if call.fixed else call.output, expected)
    for role, part in call.pipe.parts.items():
        if isinstance(part, nn.Module):
            policy = managed(part).policy
            assert (policy.onload.dtype, policy.offload.on_disk) == (stored, on_disk), role
    plans = keep_limit(call.pipe, 0)
    assert not differs(call.again(**call.fixed), expected)
    (plan,) = plans
    assert not any(part.resident for stage in plan.stages for part in stage.components)


def round_weights(folder: Path, dtype: torch.dtype) -> None:
    """Round the weights in all weight files below a folder to values that a narrower dtype has, too."""

    def rounded(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key: tensor.to(dtype).to(tensor.dtype) if tensor.is_floating_point() else tensor
            for key, tensor in tensors.items()
        }

    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
            metadata = file.metadata()
        save_file(rounded(tensors), path, metadata)
    for path in folder.rglob("*.bin"):
        torch.save(rounded(torch.load(path)), path)


def write_data_set(dataset_id: str, local_dir: str, allow_file_pattern: str | list[str], **unread: Any) -> str:
    """Write an image or a video under every file name of the data set; replaces the hub's download."""
    names = [allow_file_pattern] if isinstance(allow_file_pattern, str) else allow_file_pattern
    for number, name in enumerate(names):
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.linear_gradient("L").rotate(90 * number).resize((64, 64)).convert("RGB")
        if path.suffix == ".mp4":
            save_video([image.rotate(9 * turn) for turn in range(CLIP_FRAMES)], path)
        else:
            image.save(path)
    return local_dir


_CALL = "_call_of_the_harness"


class _Replace(ast.NodeTransformer):
    """Replace the device, the precision and the call of `pipe`."""

    def __init__(self, precise: bool) -> None:
        self.precise = precise

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        self.generic_visit(node)
        return ast.Attribute(node.value, "float32", node.ctx) if self.precise and node.attr == "bfloat16" else node

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("cpu") if node.value == "cuda" else node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node = self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "pipe":
            return ast.Call(ast.Name(_CALL, ast.Load()), [node.func, *node.args], node.keywords)
        return node


def _small(pipe: Pipeline, arguments: dict[str, Any], *, steps: int) -> Any:
    """Call with sides, frames and steps divided, whether they are given or defaults."""
    defaults = {name: parameter.default for name, parameter in pipe.__signature__.parameters.items()}
    asked = defaults | arguments
    small = {name: asked[name] // SIDE for name in ("height", "width") if name in asked}
    small["num_inference_steps"] = -(-asked["num_inference_steps"] // steps)
    if "t5_sequence_length" in asked:
        small["t5_sequence_length"] = asked["t5_sequence_length"] // SIDE
    if "num_frames" in asked:
        small["num_frames"] = 4 * round((asked["num_frames"] - 1) / 4 / FRAMES) + 1
    return pipe(**arguments | small, progress_bar_cmd=lambda steps: steps)
