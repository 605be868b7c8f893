"""Machinery that another codebase could use on its own; it knows nothing of registry or pipelines."""
