"""Lookup of models, `list` and `get`, and of plugins: `problems`, `refresh`, `register`, `unregister`. Imports no
torch.

This module only re-exports: a function named `list` would break every `list[...]` annotation in its module.
"""

from __future__ import annotations

from diffsynth._discovery import Problem
from diffsynth._models import ModelRecord, get, problems, refresh, register, unregister
from diffsynth._models import models as list

__all__ = ["ModelRecord", "Problem", "get", "list", "problems", "refresh", "register", "unregister"]
