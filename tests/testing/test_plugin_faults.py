"""Tests of `diffsynth plugins --check`: each kind of fault is found, by the name of the plugin and of the check."""

from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner

from diffsynth import _discovery
from diffsynth.cli.group import program
from diffsynth.testing.plugin_faults import check_plugin, plugin_names
from made_plugin import NAME
from plugin_faults import FAULTS, TOGETHER


def run(*options):
    _discovery.refresh()
    return CliRunner().invoke(program, ["plugins", "--check", *options], catch_exceptions=False)


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_each_fault_is_found_by_name(plugin, names):
    for path, old, new, _, _ in map(FAULTS.get, names):
        plugin.edit(path, old, new)
    _discovery.refresh()
    (report,) = check_plugin(NAME)
    assert {fault.check for fault in report.faults} == {FAULTS[name][3] for name in names}, report.faults
    for *_, check, error in map(FAULTS.get, names):
        assert any(re.search(error, fault.error) for fault in report.faults if fault.check == check), report.faults
    for fault in report.faults:
        assert (fault.plugin, fault.distribution, fault.version) == (NAME, f"diffsynth-{NAME}", "0.1.0")
        assert fault.next_action.endswith(f"Without the plugin: pip uninstall diffsynth-{NAME}")
        assert "\n" not in str(fault)


def test_every_fault_is_tried():
    assert sorted(name for names in TOGETHER for name in names) == sorted(FAULTS)


def test_a_correct_plugin_passes(plugin):
    result = run(NAME)
    assert (result.exit_code, result.stderr) == (0, f"checking {NAME} ...\n")
    header, row = result.stdout.splitlines()
    assert header.split() == ["PLUGIN", "DISTRIBUTION", "VERSION", "STATE", "CHECKS", "SECONDS"]
    assert row.split()[:4] == [NAME, f"diffsynth-{NAME}", "0.1.0", "ok"]


def test_a_fault_in_the_table_and_in_json(plugin):
    plugin.edit("more.py", "import click", 'import click\nprint("hello")')
    plugin.edit("more.py", "torch.linspace(1, 0,", "torch.linspace(0, 1,")
    result = run(NAME)
    assert result.exit_code == 1
    assert "broken" in result.stdout
    assert f"{NAME} (diffsynth-{NAME} 0.1.0): training of" in result.stderr
    result = run("--json", f"diffsynth-{NAME}")
    assert result.exit_code == 1
    (report,) = json.loads(result.stdout)["plugins"]
    assert (report["plugin"], len(report["faults"])) == (NAME, 1)
    assert report["faults"][0]["error"].endswith("expected 9 levels in [0, 1] that descend strictly")


def test_what_depends_on_a_fault_is_skipped_and_not_a_fault(plugin):
    plugin.edit("attention.py", "return None", "return 'no such device'")
    plugin.edit("pipeline.py", "sigma, *, letters", "sigma, *, words, letters")
    _discovery.refresh()
    (report,) = check_plugin(NAME)
    assert len(report.faults) == 1
    reasons = report.skipped
    assert reasons["attention made equals naive with a plain call"].startswith("made refuses here: float32: no such")
    assert reasons[f"model {NAME}-1 fits its pipeline"].startswith("cannot be judged while 'units of")


def test_a_traceback_on_request(plugin):
    plugin.edit("dit.py", "        self.config = config\n", "        self.config = config\n        1 / 0\n")
    assert "Traceback" not in run(NAME).stderr
    assert "Traceback" in run(NAME, "--traceback").stderr


def test_all_plugins_are_checked_without_a_name(plugin):
    _discovery.refresh()
    assert plugin_names() == ["core", NAME]


def test_a_name_that_is_not_there(plugin):
    result = run("zzz-mad")
    assert result.exit_code == 2
    assert "there is no plugin 'zzz-mad'; did you mean 'zzz-made'?" in result.stderr
    assert "is named together with --check" in CliRunner().invoke(program, ["plugins", NAME]).stderr
