"""Names and arguments of DiffSynth-Studio that exist only so that its users' scripts run, built on our own modules.

Only door modules import this package: tests/contracts/test_compat.py lists them.
"""
