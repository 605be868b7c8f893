"""Which models are installed: `list`, `get`, `problems`, `refresh`. No torch.

Re-exports only: a function named `list` in a module would break every `list[...]` annotation there.
"""

from __future__ import annotations

from diffsynth._discovery import Problem
from diffsynth._models import ModelRecord, get, problems, refresh
from diffsynth._models import models as list

__all__ = ["ModelRecord", "Problem", "get", "list", "problems", "refresh"]
