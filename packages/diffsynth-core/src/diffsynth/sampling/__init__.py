"""Schedules, solvers, guidance, predictions and noise, as pure functions of tensors."""
