"""`diffsynth convert`: one safetensors file of whatever the loader reads, so that it can be streamed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.output import UserError, traceback_option

if TYPE_CHECKING:
    from diffsynth.core.loader.header import Header
    from diffsynth.core.loader.reader.source import ComponentSource


@click.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="A .safetensors file that is not there yet.",
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of floating tensors.")
@click.option("--own-names", is_flag=True, help="Recognise it, and give it the names of our networks.")
@traceback_option
def convert(files: tuple[Path, ...], out: Path, dtype: str | None, own_names: bool) -> None:
    """Make one safetensors file of a checkpoint: a pickle, shards, another program's layout.

    FILE may also be an index of shards, or a folder that holds one checkpoint; several are parts of one. Memory needed:
    one tensor.
    """
    _check_out(out)
    from diffsynth.core.loader import header
    from diffsynth.core.loader.files import checkpoint_at

    held = header.read(dict.fromkeys(part for file in files for part in checkpoint_at(file)))
    source, notes = _in_own_names(held, dtype) if own_names else _as_it_is(held, dtype)
    _check_room(out, source.size())
    from diffsynth.core.loader.save import save_source

    save_source(source, out, **notes)
    click.echo(str(out))


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"OUT is {str(out)!r}: expected a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise UserError(f"OUT is {str(out)!r}: there is no folder {str(out.parent)!r}")
    if out.exists():
        raise UserError(f"{out} is there already; remove it, or name another file")


def _check_room(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise UserError(f"{out} would take {size / 2**30:.1f} GiB, and there are {free / 2**30:.1f} GiB free")


def _as_it_is(held: Header, dtype: str | None) -> tuple[ComponentSource, dict[str, Any]]:
    """Every tensor under its own name, and the metadata that still holds."""
    import torch

    from diffsynth.core.loader import convert as rules
    from diffsynth.core.loader.header import SAVE_KEY
    from diffsynth.core.loader.reader.source import ComponentSource, stored_dtype

    targets = rules.plan((), held.shapes).targets
    dtypes = {key: stored_dtype(held, key) for key in targets}
    if dtype is not None:
        wanted = getattr(torch, dtype)
        dtypes = {key: wanted if stored.is_floating_point else stored for key, stored in dtypes.items()}
    metadata = {name: text for name, text in held.metadata.items() if name != SAVE_KEY}
    return ComponentSource(held, targets, dtypes), {"metadata": metadata}


def _in_own_names(held: Header, dtype: str | None) -> tuple[ComponentSource, dict[str, Any]]:
    """The one component that the files hold."""
    if dtype is None:
        raise UserError("--own-names needs a --dtype: layouts join and scale tensors, so all get the same")
    import torch

    from diffsynth import _discovery
    from diffsynth.core.loader import component, recognize
    from diffsynth.core.loader.header import signature

    found = recognize.recognize(held, *_discovery.catalog().layouts())
    if len(found) > 1:
        names = ", ".join(each.architecture.name for each in found)
        raise UserError(f"{held.where} holds {names}; --own-names is for one component, so convert without it")
    _, source = component.open_component(found[0], held, dtype=getattr(torch, dtype))
    base = signature(held.nested if held.nested is not None else held.shapes)
    return source, {"architecture": found[0].architecture.name, "config": found[0].config, "base": base}
