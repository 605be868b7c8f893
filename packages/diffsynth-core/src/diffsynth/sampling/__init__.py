"""Schedules, solvers, guidance and noise, as pure functions of tensors."""
