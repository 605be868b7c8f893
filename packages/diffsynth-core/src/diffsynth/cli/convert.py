"""`diffsynth convert`: write any checkpoint that the loader reads as one safetensors file, which can be streamed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.output import UserError, echo, traceback_option

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
    help="Path of the new .safetensors file; it must not exist.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Convert floating-point tensors to this dtype; each keeps its own by default.",
)
@click.option("--own-names", is_flag=True, help="Recognise the checkpoint and rename its keys to our networks' names.")
@traceback_option
def convert(files: tuple[Path, ...], out: Path, dtype: str | None, own_names: bool) -> None:
    """Write a checkpoint (a pickle, shards, another program's layout) as one safetensors file.

    FILE may also be a shard index, or a folder that holds one checkpoint; several FILEs are read as one checkpoint. One
    tensor at a time is in memory.
    """
    _check_out(out)
    from diffsynth.core.loader.checkpoint import read_files
    from diffsynth.core.loader.files import checkpoint_at

    tensors = read_files(dict.fromkeys(part for file in files for part in checkpoint_at(file)))
    source, notes = _with_own_keys(tensors, dtype) if own_names else _with_published_keys(tensors, dtype)
    _check_room(out, source.size())
    from diffsynth.core.loader.save import save_source

    save_source(source, out, **notes)
    echo(str(out))


def _check_out(out: Path) -> None:
    from diffsynth.core.replacing import check_writable

    if out.suffix != ".safetensors":
        raise UserError(f"OUT is {str(out)!r}: expected a name that ends in .safetensors")
    if not out.parent.is_dir():
        raise UserError(f"OUT is {str(out)!r}: there is no folder {str(out.parent)!r}")
    check_writable(out)
    if out.exists():
        raise UserError(f"{out} exists already; remove it, or name another file")


def _check_room(out: Path, size: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if size > free:
        raise UserError(f"{out} would take {size / 2**30:.1f} GiB, and there are {free / 2**30:.1f} GiB free")


def _with_published_keys(tensors: Header, dtype: str | None) -> tuple[ComponentSource, dict[str, Any]]:
    """Return (`ComponentSource` of all tensors under their published keys, the floating-point ones as `dtype` if it is
    not None; dict `{"metadata": {...}}`), arguments of `save_source()`.
    """
    import torch

    from diffsynth.core.loader import convert as rules
    from diffsynth.core.loader.header import SAVE_KEY
    from diffsynth.core.loader.reader.source import ComponentSource, stored_dtype

    targets = rules.plan((), tensors.shapes).targets
    dtypes = {key: stored_dtype(tensors, key) for key in targets}
    if dtype is not None:
        wanted = getattr(torch, dtype)
        dtypes = {key: wanted if stored.is_floating_point else stored for key, stored in dtypes.items()}
    metadata = {name: text for name, text in tensors.metadata.items() if name != SAVE_KEY}
    return ComponentSource(tensors, targets, dtypes), {"metadata": metadata}


def _with_own_keys(tensors: Header, dtype: str | None) -> tuple[ComponentSource, dict[str, Any]]:
    """Return (`ComponentSource` of the only component in `tensors`, keys as in our network, all tensors as `dtype`;
    dict with "architecture", "config" and "base"), arguments of `save_source()`; raise UserError if `dtype` is None.
    """
    if dtype is None:
        raise UserError("--own-names needs a --dtype: key rules fuse and scale tensors, so all tensors get one dtype")
    import torch

    from diffsynth import _discovery
    from diffsynth.core.loader import component, recognize
    from diffsynth.core.loader.header import signature

    found = recognize.recognize(tensors, *_discovery.catalog().layouts())
    if len(found) > 1:
        names = ", ".join(each.architecture.name for each in found)
        raise UserError(f"{tensors.where} holds {names}; --own-names takes one component only, so convert without it")
    _, source = component.open_component(found[0], tensors, dtype=getattr(torch, dtype))
    base = signature(tensors.nested if tensors.nested is not None else tensors.shapes)
    return source, {"architecture": found[0].architecture.name, "config": found[0].config, "base": base}
