"""Tests of `diffsynth new-plugin`; tests/packaging runs the package's own test on its wheel."""

from pathlib import Path

import pytest

from diffsynth.cli.new_plugin import render
from diffsynth.core.loader import header

EXAMPLE = Path(__file__).parents[2] / "examples" / "third_party_plugin"


def test_it_writes_what_it_renders(run, tmp_path):
    result = run("new-plugin", "my-model")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "diffsynth-my-model"
    written = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert written == render("my-model")
    assert "pip install -e 'diffsynth-my-model[test]'" in result.output


def test_names_are_made_from_the_name():
    files = render("my-model")
    assert b'my-model = "diffsynth_my_model.plugin"' in files["pyproject.toml"]
    assert b'conformance("diffsynth-my-model")' in files["tests/test_plugin.py"]
    assert b"class MyModelPipeline(Pipeline)" in files["src/diffsynth_my_model/pipeline.py"]
    for path, content in files.items():
        assert b"$" not in content or path.endswith(".safetensors"), path
        assert b"toy" not in content.lower(), path
        if path.endswith(".py"):
            compile(content, path, "exec")


def test_the_weights_name_the_architecture(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(render("my-model")["src/diffsynth_my_model/dit.safetensors"])
    found, example = header.read([tmp_path / "a.safetensors"]), header.read(example_weights())
    assert found.metadata == example.metadata | {"diffsynth.architecture": "my_model_dit"}
    assert found.shapes == example.shapes


def example_weights() -> list[Path]:
    return [EXAMPLE / "src" / "diffsynth_toy" / "dit.safetensors"]


def test_the_example_is_what_it_writes_for_toy_and_a_little_more():
    for path, content in render("toy").items():
        if path.endswith(".safetensors"):
            shown, rendered = (EXAMPLE / path).read_bytes(), content
            # Headers may differ in order and padding; the tensors are equal.
            assert shown[-len(shown) // 2 :] == rendered[-len(shown) // 2 :]
            continue
        remaining = iter((EXAMPLE / path).read_text(encoding="utf-8").splitlines())
        for line in content.decode("utf-8").splitlines():
            assert any(_holds(there, line) for there in remaining), f"{path} of the example lacks {line!r}"


def _holds(there: str, wanted: str) -> bool:
    """Return whether a line is equal, or an import of at least the same names."""
    module, imports, names = wanted.partition(" import ")
    found = there.removeprefix(f"{module} import ").split(", ")
    return there == wanted or bool(imports and there.startswith(f"{module} ") and set(names.split(", ")) <= set(found))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My-Model", "expected lower-case letters and digits"),
        ("my_model", "expected lower-case letters and digits"),
        ("my--model", "expected lower-case letters and digits"),
        ("-x", "No such option"),
        ("../x", "expected lower-case letters and digits"),
        ("", "expected lower-case letters and digits"),
        ("diffsynth-my-model", "expected the name alone, 'my-model'"),
        ("toy", "is the plugin of diffsynth-toy, which is installed"),
    ],
)
def test_a_name_that_cannot_be(run, tmp_path, name, message):
    result = run("new-plugin", name)
    assert result.exit_code == 2
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_it_overwrites_nothing(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    result = run("new-plugin", "my-model", "--output", "there")
    assert result.exit_code == 2
    assert "not empty; nothing was written" in result.output
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert run("new-plugin", "my-model", "--output", "empty").exit_code == 0
