"""Pipelines: roles, units, the denoising loop, memory plans of calls, and loading a model by name."""
