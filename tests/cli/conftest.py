import pytest
from click.testing import CliRunner

from diffsynth.cli.group import program
from image_pipeline import catalog, use


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Install the model `toy-1`; return a function that changes the installed declarations."""
    monkeypatch.chdir(tmp_path)

    def install(**facts):
        use(monkeypatch, catalog(**facts))

    install()
    return install


@pytest.fixture
def run(installed):
    def invoke(*arguments):
        return CliRunner().invoke(program, [str(argument) for argument in arguments])

    return invoke
