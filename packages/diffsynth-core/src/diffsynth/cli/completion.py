"""Completion in a shell: names of models and files. Imports no torch; `docs/cli.md` says how to turn it on."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem


class ModelName(click.ParamType):
    """The type of an argument that names a model, as a text; the shell completes the names of installed models.

    Args:
        files: whether the argument may also be a file.
    """

    name = "model"

    def __init__(self, *, files: bool = False) -> None:
        self.files = files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return a list of the completions of an incomplete name, case ignored; the shell completes files itself."""
        from diffsynth import registry

        names = [record for record in registry.list() if record.name.lower().startswith(incomplete.lower())]
        found = [CompletionItem(record.name, help=record.task) for record in names]
        return found or ([CompletionItem(incomplete, type="file")] if self.files else [])


def complete_file(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Return the completion of an option whose text begins with a path, for `shell_complete` of click."""
    return [CompletionItem(incomplete, type="file")]
