"""Names and arguments of DiffSynth-Studio that exist only so that its users' scripts run; built on our own parts."""
