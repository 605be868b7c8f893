"""No plugin hurts another, or the program: whatever one does, the others are listed, and it is named."""

import json
import sys

import pytest
from click.testing import CliRunner

from diffsynth import registry
from diffsynth.cli.group import program
from fake_plugins import good


def listed():
    """Return the names of the models that `diffsynth list --json` prints."""
    result = CliRunner().invoke(program, ["list", "--json"])
    assert result.exit_code == 0, result.output
    return [record["name"] for record in json.loads(result.stdout)]


@pytest.mark.parametrize("name", ["core", "Core", "CORE", "\uff43ore"])
def test_nobody_takes_the_name_of_core(site, name):
    site.install("good", good("fake_good", "fine"))
    site.install(name, good("fake_thief", "stolen"), package="fake_thief")
    catalog = site.discover()
    assert [plugin.name for plugin in catalog.plugins] == ["core", "good"]
    (problem,) = catalog.problems
    assert (problem.plugin, problem.distribution) == (name, "fake-thief")
    assert problem.error == (
        f"the name 'core' is that of diffsynth-core; rename the entry point {name!r} of fake-thief, "
        "or run: pip uninstall fake-thief"
    )


@pytest.mark.parametrize("name", ["our_own", "our-own", "Our.Own"])
def test_a_name_is_that_of_the_distribution_called_so(site, name):
    """A plugin of another distribution with the name of one of our families made the family vanish."""
    site.install("our_own", good("diffsynth_our_own", "family"), package="diffsynth_our_own")
    site.install(name, good("fake_thief", "stolen"), package="fake_thief")
    catalog = site.discover()
    assert [one.spec.name for one in catalog.models] == ["family"]
    (problem,) = catalog.problems
    assert (problem.plugin, problem.distribution) == (name, "fake-thief")
    assert "the name 'our-own' is that of diffsynth-our-own; rename the entry point" in problem.error
    del sys.modules["diffsynth_our_own"], sys.modules["diffsynth_our_own.plugin"]


def test_an_entry_point_to_the_module_of_another_plugin(site):
    """The second one to load unregistered the module, and the first lost its observers."""
    site.install("alpha", "", target="fake_good.plugin")
    site.install("beta", "", target="diffsynth.models.plugin")
    site.install("good", good("fake_good", "fine"))
    site.install("other", good("fake_other", "other"))
    catalog = site.discover()
    assert [plugin.name for plugin in catalog.plugins] == ["core", "other"]
    assert {problem.plugin: problem.error for problem in catalog.problems} == {
        "alpha": "fake-alpha 1.0 and fake-good 1.0 declare a plugin of this module; uninstall all but one",
        "beta": "the module 'diffsynth.models.plugin' is that of diffsynth-core; rename the entry point 'beta' of "
        "fake-beta, or run: pip uninstall fake-beta",
        "good": "fake-alpha 1.0 and fake-good 1.0 declare a plugin of this module; uninstall all but one",
    }


@pytest.mark.parametrize("name", ["", "a b", "a\x1b[2Jb"])
def test_names_that_cannot_be_used(site, monkeypatch, name):
    site.install("good", good("fake_good", "fine"))
    site.install(name, good("fake_bad", "bad"), package="fake_bad")
    monkeypatch.delenv("DIFFSYNTH_PLUGINS")
    site.discover()
    (problem,) = registry.problems()
    assert (problem.plugin, problem.distribution) == (name, "fake-bad")
    assert "expected a name of letters, digits, '_', '-' and '.'" in problem.error
    assert {"fine", "z-image-turbo"} <= set(listed())


def test_a_damaged_distribution_hides_no_other(site):
    """One undecodable `entry_points.txt` of any installed package made `list()` raise."""
    site.install("good", good("fake_good", "fine"))
    site.install("damaged", good("fake_damaged", "damaged"))
    (site.folder / "fake_damaged-1.0.dist-info" / "METADATA").write_bytes(b"\xff")
    other = site.folder / "fake_other-3.1.dist-info"
    other.mkdir()
    (other / "entry_points.txt").write_bytes(b"[console_scripts]\na = \xff")
    site.discover()
    assert listed() == ["fine"]
    states = {problem.distribution: (problem.plugin, problem.version, problem.state) for problem in registry.problems()}
    assert states == {
        "fake-damaged": ("damaged", "1.0", "broken"),
        "fake-other": ("fake-other", "3.1", "warning"),
    }
    assert all("Run: pip install --force-reinstall --no-deps fake-" in each.error for each in registry.problems())
