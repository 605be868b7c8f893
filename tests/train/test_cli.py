import json

from click.testing import CliRunner

from diffsynth_train.cli import train


def toml(value):
    """Return a value as TOML: strings, numbers, lists and inline tables, as recipes need them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def test_train_and_resume(autoencoder_recipe, workspace):
    path = workspace / "recipe.toml"
    path.write_text("\n".join(f"{key} = {toml(value)}" for key, value in autoencoder_recipe.items()), encoding="utf-8")
    first = CliRunner().invoke(train, [str(path), "--set", "loop.steps=1"])
    assert first.exit_code == 0, first.output
    assert str(workspace / "autoencoder" / "vae.safetensors") in first.output
    second = CliRunner().invoke(train, [str(path), "--resume", "last", "--set", "loop.steps=2"])
    assert second.exit_code == 0, second.output
    rows = (workspace / "autoencoder" / "loss.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2"]


def test_errors_are_sentences(workspace):
    result = CliRunner().invoke(train, [str(workspace / "none.toml")])
    assert result.exit_code == 1
    assert "TrainingError: recipe" in result.output
    assert "Traceback" not in result.output
