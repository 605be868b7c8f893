"""Test of the questions: the commands of the answers run, on tiny models of the same names, and show what is quoted."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from diffsynth.cli.group import program
from diffsynth.core.lora import save_lora
from diffsynth.diagnosis import machine
from diffsynth.testing import tiny_hub
from documented import blocks, sections

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
LORA = {
    "layers.0.attention.to_q.lora_A.weight": torch.ones(4, 256),
    "layers.0.attention.to_q.lora_B.weight": torch.ones(256, 4),
}
SMALL = {"--height": "32", "--width": "32", "--steps": "1", "--dtype": "float32", "--device": "cpu"}
NO_CHECKPOINT = 3
"""Exit code of `recognize` for a file that is no whole checkpoint of a network, such as a LoRA."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_hub(folder, ["z-image-turbo"])
    return folder


def run(line: str) -> str:
    """Run a line of a shell block in this process, a call with a small size, and return what it prints."""
    name, *arguments = shlex.split(line)
    assert name == "diffsynth", line
    if arguments[0] == "generate":
        arguments += [word for name, value in SMALL.items() if name not in arguments for word in (name, value)]
    result = CliRunner().invoke(program, arguments, catch_exceptions=False)
    expected = NO_CHECKPOINT if arguments[0] == "recognize" and arguments[1] != "finetune.safetensors" else 0
    assert result.exit_code == expected, f"{line}: {result.output}"
    return result.output


def test_the_answers_run(hub, monkeypatch, tmp_path):
    """All but `doctor`, which tests/cli/test_doctor.py runs, on a machine with every kind of fault."""
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(hub))
    monkeypatch.setenv("DIFFSYNTH_SKIP_DOWNLOAD", "true")
    monkeypatch.chdir(tmp_path)
    shards = sorted((hub / "Tongyi-MAI/Z-Image-Turbo/transformer").glob("*.safetensors"))
    weights = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    save_file(weights, "finetune.safetensors")
    save_file(dict(sorted(weights.items())[:-20]), "model.safetensors")
    save_lora(LORA, "style.safetensors")
    output, ran = "", 0
    for _, language, text in blocks(PAGE):
        if language == "sh":
            lines = [line for line in text.splitlines() if line != "diffsynth doctor"]
            output = "\n".join(map(run, lines))
            ran += len(lines)
        elif language == "python":
            exec(text, {"__name__": "block"})
        else:
            shown = " ".join(output.split())
            assert all(" ".join(line.split()) in shown for line in text.splitlines()), f"{text}is not in\n{output}"
    assert ran >= 12
    assert Path("style-comfyui.safetensors").is_file()


def test_the_messages_of_doctor_are_quoted():
    source = inspect.getsource(machine)
    for message in ("this torch is CPU-only", "this torch is built for", "and finds no device"):
        assert message in PAGE
        assert message in source


def test_most_answers_have_a_command_or_a_page():
    """A question is a third-level heading; an answer without a block links to the page that has it."""
    questions = [part for text in sections(PAGE).values() for part in text.split("### ")[1:]]
    assert len(questions) >= 25
    without = [part.splitlines()[0] for part in questions if "```" not in part and "](" not in part and "`" not in part]
    assert without == ["Does it send anything anywhere?"]
