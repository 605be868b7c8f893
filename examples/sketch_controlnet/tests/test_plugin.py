"""Test of the plugin; the page Conformance of diffsynth's manual lists what it checks."""

from diffsynth.testing import conformance

test_plugin = conformance("diffsynth-sketch")
