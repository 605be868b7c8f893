"""The whole test of a plugin; what it checks stands in diffsynth's manual, under Conformance."""

from diffsynth.testing import conformance

test_plugin = conformance("diffsynth-toy")
