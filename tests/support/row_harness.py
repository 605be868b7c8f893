"""Runs users' scripts where there is no GPU and no network. All that it replaces stands here, and nothing else is:

device ("cuda" becomes "cpu"), precision where asked, size, number of frames and of steps,
`modelscope.dataset_snapshot_download`, `torch.cuda.mem_get_info`.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import modelscope
import pytest
import torch
from PIL import Image

from diffsynth import Pipeline
from diffsynth.core.data.media_writer import save_video

SIDE = 16
"""Sides of pictures become this many times smaller."""

STEPS = 6
"""So does the number of steps, rounded up, unless a harness says otherwise: 8 become 2, 50 become 9."""

FRAMES = 10
"""And the number of frames behind the first, to multiples of 4: 81 become 9, 49 become 5, 121 become 13."""

CLIP_FRAMES = 14
"""Of a video in a data set."""

MEMORY = 80 * 2**30


@dataclass(frozen=True)
class Call:
    """One call of a pipeline in a script: its arguments as the script gives them but for the device, and its result."""

    pipe: Pipeline
    arguments: dict[str, Any]
    output: Any
    steps: int = STEPS

    def again(self, **changed: Any) -> Any:
        """The result with some arguments changed; those set to `...` are left out."""
        arguments = self.arguments | changed
        given = {name: value for name, value in arguments.items() if value is not ...}
        return _small(self.pipe, given, steps=self.steps)

    def is_default(self, name: str) -> bool:
        """Whether the pipeline would take this value anyway."""
        return self.pipe.__signature__.parameters[name].default == self.arguments[name]


@dataclass
class Harness:
    """A place for scripts to run in, and a record of what they called.

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
        """Run a script to its end; what it raises passes."""
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(modelscope, "dataset_snapshot_download", pictures_of_a_data_set)
        self.monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
        tree = ast.fix_missing_locations(_Replace(self.precise).visit(ast.parse(script)))
        before = len(self.calls)
        exec(compile(tree, "script", "exec"), {"__name__": "__main__", _CALL: self._call})
        return self.calls[before:]

    def _call(self, pipe: Pipeline, **arguments: Any) -> Any:
        output = _small(pipe, arguments, steps=self.steps)
        self.calls.append(Call(pipe, arguments, output, self.steps))
        return output


def pictures_of_a_data_set(dataset_id: str, local_dir: str, allow_file_pattern: str | list[str], **unread: Any) -> str:
    """In place of the hub's: a picture or a video under every name that the script asks for."""
    names = [allow_file_pattern] if isinstance(allow_file_pattern, str) else allow_file_pattern
    for number, name in enumerate(names):
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.linear_gradient("L").rotate(90 * number).resize((64, 64)).convert("RGB")
        if path.suffix == ".mp4":
            save_video([picture.rotate(9 * turn) for turn in range(CLIP_FRAMES)], path)
        else:
            picture.save(path)
    return local_dir


_CALL = "_call_of_the_harness"


class _Replace(ast.NodeTransformer):
    """The device, the precision, and who makes the call of `pipe`."""

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
    """Call with smaller sides, fewer frames and fewer steps than the arguments say, or than the defaults would be."""
    defaults = {name: parameter.default for name, parameter in pipe.__signature__.parameters.items()}
    asked = defaults | arguments
    small = {name: asked[name] // SIDE for name in ("height", "width") if name in asked}
    small["num_inference_steps"] = -(-asked["num_inference_steps"] // steps)
    if "num_frames" in asked:
        small["num_frames"] = 4 * round((asked["num_frames"] - 1) / 4 / FRAMES) + 1
    return pipe(**arguments | small, progress_bar_cmd=lambda steps: steps)
