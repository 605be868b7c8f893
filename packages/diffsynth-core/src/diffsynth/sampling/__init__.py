"""Sampling as pure functions of tensors: schedules, solvers, guidance, noise."""
