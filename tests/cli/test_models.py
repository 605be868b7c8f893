import json

import click
import pytest
from PIL import Image, PngImagePlugin

from diffsynth import provenance
from diffsynth._discovery import Declared, Problem
from diffsynth.cli import group
from diffsynth.runtime.writers import write
from diffsynth.spec import CommandSpec, resolve

BROKEN = Problem("flux", "diffsynth-flux", "0.3.1", "No module named 'x'", "Traceback: at line 1\n")


@click.command()
@click.argument("word")
def shout(word):
    click.echo(word.upper())


def command(plugin, reference="test_models_helper:missing", name="shout", text=""):
    return Declared(CommandSpec(name=name, command=reference, help=text), plugin, f"diffsynth-{plugin}", "1.0")


@pytest.fixture
def shouting(monkeypatch):
    monkeypatch.setattr(group, "resolve", lambda reference: shout if reference == "a:shout" else resolve(reference))


def test_list(run):
    result = run("list")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].split()[:3] == ["toy-1", "text-to-image", "absent"]
    assert "toy-1" in run("list", "TOY").stdout
    assert "toy-1" in run("list", "owner/*").stdout


def test_list_of_nothing_that_matches(run):
    result = run("list", "flux")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "No installed model matches '*flux*'" in result.stderr


def test_list_as_json(run):
    (record,) = json.loads(run("list", "--json").stdout)
    assert (record["name"], record["hub_id"], record["plugin"]) == ("toy-1", "Owner/Toy-1", "toy")
    assert json.loads(run("list", "--json", "flux").stdout) == []


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_nothing_installed_says_what_to_install(installed, run, arguments):
    installed(models=(), plugins=())
    result = run(*arguments)
    assert result.exit_code == 0
    assert "No models are installed" in result.stdout
    assert "pip install" in result.stdout


def test_without_a_command_it_helps(run):
    result = run()
    assert result.exit_code == 0
    assert "recognize" in result.stdout
    assert "No models" not in result.stdout


def test_plugins(run):
    result = run("plugins")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].split() == ["toy", "diffsynth-toy", "1.2", "ok", "1", "models"]


def test_a_broken_plugin_makes_exit_code_1(installed, run):
    installed(problems=(BROKEN,))
    result = run("plugins")
    assert result.exit_code == 1
    assert "broken" in result.stdout
    assert "flux (diffsynth-flux 0.3.1): No module named 'x'" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback: at line 1" in run("plugins", "--traceback").stderr
    as_json = run("plugins", "--json")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["problems"][0]["plugin"] == "flux"
    assert json.loads(as_json.stdout)["plugins"][0]["name"] == "toy"


def test_info_of_a_model(run):
    result = run("info", "Owner/TOY-1")
    assert result.exit_code == 0
    assert "Owner/Toy-1:dit.safetensors" in result.stdout
    assert json.loads(run("info", "toy-1", "--json").stdout)["components"] == {"dit": "Owner/Toy-1:dit.safetensors"}


def test_info_of_an_unknown_model(installed, run):
    installed(problems=(BROKEN,))
    result = run("info", "toy-2")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: UnknownModel: 'toy-2' is not installed; did you mean 'toy-1'?  1 plugin is")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" in run("info", "toy-2", "--traceback").stderr
    assert "Traceback" in run("--traceback", "info", "toy-2").stderr


def test_info_of_an_image(run, tmp_path):
    provenance.save_png(Image.new("L", (8, 8)), tmp_path / "a.png", {"prompt": "äpple", "weights": {"dit": {"f": "1"}}})
    result = run("info", "a.png")
    assert result.exit_code == 0
    assert "äpple" in result.stdout
    assert json.loads(run("info", "a.png", "--json").stdout)["prompt"] == "äpple"


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.gif", "a/"])
def test_info_of_every_format(run, name):
    frames, made_by = [Image.new("RGB", (16, 16))] * 2, {"prompt": "äpple"}
    write(
        frames if name in ("a.gif", "a/") else frames[0], name, record=made_by, **({"fps": 8} if ".g" in name else {})
    )
    assert json.loads(run("info", name, "--json").stdout) == made_by
    assert "no such" in run("info", f"b{name}").stderr


def test_a_record_cannot_command_the_terminal(run, tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("diffsynth", json.dumps({"model": "\x1b]0;owned\x07x", "arguments": {"prompt": "a\x9b31mb"}}))
    Image.new("RGB", (8, 8)).save(tmp_path / "e.png", pnginfo=text)
    result = run("info", tmp_path / "e.png")
    assert result.exit_code == 0
    assert r"\x1b]0;owned\x07x" in result.output
    assert "\x1b" not in result.output
    assert "\x9b" not in result.output


def test_info_of_an_image_without_a_record(run, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert run("info", "a.png").exit_code == 2
    assert "no such file" in run("info", "b.png").stderr


def test_an_unknown_command_has_the_nearest_spelling(run):
    result = run("genrate")
    assert result.exit_code == 2
    assert "there is no command 'genrate'; did you mean 'generate'?" in result.stderr


def test_commands_of_plugins_join(installed, run, shouting):
    installed(commands=(command("a", "a:shout", text="Say it loud."),))
    assert run("shout", "hey").stdout == "HEY\n"
    assert run("a:shout", "hey").stdout == "HEY\n"
    assert "Say it loud." in run("--help").stdout


def test_a_broken_command_is_reported_when_it_is_called(installed, run):
    installed(commands=(command("a", text="Say it loud."),))
    assert run("--help").exit_code == 0
    result = run("shout", "hey")
    assert result.exit_code == 2
    assert "command 'shout' of plugin a (diffsynth-a 1.0) cannot be loaded: ModuleNotFoundError" in result.stderr


def test_two_commands_of_one_name_need_the_plugin(installed, run, shouting):
    installed(commands=(command("a", "a:shout"), command("b")))
    result = run("shout", "hey")
    assert result.exit_code == 2
    assert "a:shout or b:shout" in result.stderr
    assert run("a:shout", "hey").stdout == "HEY\n"


def test_a_plugin_cannot_take_a_name_of_ours(installed, run, shouting):
    installed(commands=(command("a", "a:shout", name="list"),))
    assert "toy-1" in run("list").stdout
    assert run("a:list", "hey").stdout == "HEY\n"
