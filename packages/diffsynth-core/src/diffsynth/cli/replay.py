"""`diffsynth replay`: generate a file again from the record in it, say what differs, and compare."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.arguments import GivenLoRA, call_arguments, config_of_file, input_texts, set_option
from diffsynth.cli.call import Call, run
from diffsynth.cli.comparison import compare_files
from diffsynth.cli.output import UserError, echo, traceback_option
from diffsynth.cli.outputs import find_outputs, image_grid
from diffsynth.errors import shortened

if TYPE_CHECKING:
    from diffsynth.registry import ModelRecord


@click.command()
@click.argument("file", metavar="FILE", type=click.Path(exists=True))
@click.option("-o", "--output", metavar="OUT", help="File to write; by default FILE with -replay before its suffix.")
@click.option("--device", help="Device to compute on; by default that of the record, if it is here.")
@set_option
@click.option("--anyway", is_flag=True, help="Generate also if weights or inputs are not those of the record.")
@traceback_option
@click.pass_context
def replay(
    ctx: click.Context, file: str, output: str | None, device: str | None, settings: tuple[str, ...], anyway: bool
) -> None:
    """Generate FILE again from the record in it, to OUT, and compare both; exit 1 if they differ.

    What differs from the record is printed before: versions, device, weights, LoRAs and inputs. --set NAME=VALUE gives
    an argument that the record cannot hold, or changes one. FILE may be a folder of frames.
    """
    from diffsynth import provenance, registry

    made_by = provenance.read(file)
    if not made_by.get("model"):
        raise UserError(f"{file}: the record names no model, because its pipeline was not loaded by a model's name")
    record = registry.get(str(made_by["model"]))
    written = made_by.get("written") or {}
    outputs = find_outputs(record, output or _beside(file), _settings_for(output, file, written))
    refused = [*_differing_inputs(made_by, Path(file), settings)]
    texts = _texts(made_by, record, Path(file), settings)
    arguments = call_arguments(record, {}, texts)
    components = {role: config_of_file(text) for role, text in (made_by.get("components") or {}).items()}
    loras = _loras(made_by, Path(file))
    refused += [*_differing_weights(made_by, record, components), *_differing_loras(made_by, loras)]
    for role, methods in (made_by.get("quantization") or {}).items():
        refused.append(f"{role} was quantized by {', '.join(methods)}, and is loaded as it is")
    loading = _loading(made_by, device)
    for difference in [*_differing_versions(made_by), *_differing_device(made_by, loading), *refused]:
        echo(f"differs: {difference}", err=True)
    if refused and not anyway:
        raise UserError(f"{file} cannot be made as it was: {shortened(refused, 3)}. To generate nevertheless: --anyway")
    call = Call(record.exact_name, record, arguments, components, loras, loading, input_texts(arguments, texts))
    results, whole = run(call, outputs)
    path = outputs.write_one(*_chosen(made_by, results, whole))
    equal, text = compare_files(Path(file), path)
    echo(text)
    ctx.exit(0 if equal else 1)


def _beside(file: str) -> str:
    path = Path(file)
    if path.is_dir():
        return f"{path.with_name(f'{path.name}-replay')}/"
    return str(path.with_name(f"{path.stem}-replay{path.suffix}"))


def _settings_for(output: str | None, file: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the writer in a record, of those that OUT's format may have."""
    same = output is None or Path(output).suffix.lower() == Path(file).suffix.lower()
    return {name: written[name] for name in ("fps", "quality", "sample_rate") if same and name in written}


def _texts(made_by: Mapping[str, Any], record: ModelRecord, file: Path, settings: Sequence[str]) -> list[str]:
    """Return the texts NAME=VALUE of the arguments of the whole call in a record; those of `settings` have precedence.

    Raises:
        UserError: an argument that the record cannot hold, and that `settings` do not give.
    """
    from diffsynth.provenance import recorded_arguments
    from diffsynth.runtime.schema import model_schema

    given = {text.partition("=")[0] for text in settings}
    known = model_schema(record.exact_name)["properties"]
    lost = [name for name in made_by.get("not_recorded") or () if name in known and name not in given]
    if lost:
        raise UserError(f"{file}: the record cannot hold {shortened(lost)}; give --set {lost[0]}=VALUE")
    values = {**recorded_arguments(made_by), **(made_by.get("call") or {})}
    texts = {name: json.dumps(value) for name, value in values.items() if value is not None}
    for name, entry in (made_by.get("inputs") or {}).items():
        texts[name] = _moved(str(entry["value"]), entry["files"], file)
    return [*(f"{name}={text}" for name, text in texts.items() if name not in given), *settings]


def _moved(text: str, files: Mapping[str, Any], file: Path) -> str:
    """Return the text of an input, with the paths of files that are not there replaced by those beside FILE."""
    for path in files:
        found = _found(path, file)
        if found is not None and str(found) != path:
            text = str(found) if text == path else text.replace(json.dumps(path), json.dumps(str(found)))
    return text


def _found(path: str, file: Path) -> Path | None:
    """Return where a file of a record is: at its path, at that path from the folder of FILE, or in that folder; None if
    it is at none of them.
    """
    places = (Path(path), file.parent / path, file.parent / Path(path).name)
    return next((place for place in places if place.exists()), None)


def _differing_inputs(made_by: Mapping[str, Any], file: Path, settings: Sequence[str]) -> Iterator[str]:
    """Yield what differs in the files of inputs that `settings` do not replace.

    Raises:
        UserError: a file is missing.
    """
    from diffsynth.provenance import content_of

    given = {text.partition("=")[0] for text in settings}
    for name, entry in (made_by.get("inputs") or {}).items():
        for path, identity in entry["files"].items() if name not in given else ():
            found = _found(path, file)
            if found is None:
                raise UserError(f"{file}: the input {name} was {path}, which is not there; give --set {name}=PATH")
            if content_of(found) != identity:
                yield f"the content of {found} ({name}) is another one"


def _loras(made_by: Mapping[str, Any], file: Path) -> list[GivenLoRA]:
    """Return a list of the LoRAs of a record.

    Raises:
        UserError: a LoRA was no file, or its file is missing.
    """
    from diffsynth.core.loader.config import ModelConfig

    found = []
    for lora in made_by.get("loras") or ():
        paths = [_found(path, file) for path in lora.get("paths") or ()]
        if not paths or None in paths:
            names = shortened(lora.get("paths") or lora.get("files") or ["a LoRA in memory"])
            raise UserError(f"{file}: its LoRA {names} is not there; put it beside {file}, under its name")
        options = {"hotload": lora["hot"], "call_defaults": lora.get("call_defaults") or {}}
        config = ModelConfig(path=[path for path in paths if path is not None])
        found.append(GivenLoRA(config, lora["alpha"], lora["role"], options))
    return found


def _differing_loras(made_by: Mapping[str, Any], loras: Sequence[GivenLoRA]) -> Iterator[str]:
    from diffsynth.provenance import identities

    for lora, there in zip(made_by.get("loras") or (), loras, strict=True):
        paths = there.config.path
        here = identities(map(Path, paths if isinstance(paths, list) else [paths]))  # type: ignore[arg-type]
        yield from _differing_files(f"LoRA of {lora['role']}", lora["files"], here)


def _differing_weights(made_by: Mapping[str, Any], record: ModelRecord, components: Mapping[str, Any]) -> Iterator[str]:
    """Yield what differs in the files of the model; those that are missing are downloaded."""
    from diffsynth import _discovery
    from diffsynth.core.loader import files
    from diffsynth.core.loader.config import ModelConfig
    from diffsynth.provenance import identities

    sources = {**record.components, **record.processors}
    configs = {role: ModelConfig.from_source(source) for role, source in sources.items()} | dict(components)
    for role, there in (made_by.get("weights") or {}).items():
        if role not in configs:
            yield f"{role} was {shortened(there)}, which {record.name} does not have"
            continue
        paths = files.find(configs[role], resolve=lambda source: _discovery.first("resolve_source", source=source))
        yield from _differing_files(role, there, identities(paths))


def _differing_files(what: str, there: Mapping[str, str], here: Mapping[str, str]) -> Iterator[str]:
    """Yield what differs in the files of a component: identities by their names, or of one file by its content."""
    if sorted(there.values()) == sorted(here.values()):
        return
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            yield f"{what}: {name} is {here.get(name, 'not there')}, and was {there.get(name, 'not there')}"


def _loading(made_by: Mapping[str, Any], device: str | None) -> dict[str, Any]:
    """Return the options of loading of a record: its device if that is here, dtype, policy and limit."""
    from diffsynth.core.device import check_device, default_device

    if device is None:
        try:
            device = str(check_device(str(made_by.get("device", ""))))
        except (ValueError, TypeError, RuntimeError):
            device = str(default_device())
    dtype = {"dtype": made_by["dtype"]} if made_by.get("dtype") else {}
    return {"device": device, **dtype, **(made_by.get("loading") or {})}


def _differing_versions(made_by: Mapping[str, Any]) -> Iterator[str]:
    for name, version in {**(made_by.get("versions") or {}), **(made_by.get("plugins") or {})}.items():
        try:
            here = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            here = "not installed"
        if here != version:
            yield f"{name} is {here}, and was {version}"


def _differing_device(made_by: Mapping[str, Any], loading: Mapping[str, Any]) -> Iterator[str]:
    from diffsynth.core.device import card_name

    if made_by.get("device") and str(made_by["device"]) != loading["device"]:
        yield f"the device is {loading['device']}, and was {made_by['device']}"
    hardware = card_name(loading["device"])
    if made_by.get("hardware") not in (None, hardware):
        yield f"the hardware is {hardware}, and was {made_by['hardware']}"


def _chosen(
    made_by: Mapping[str, Any], results: Sequence[tuple[Any, Mapping[str, Any]]], whole: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """Return (output, record) of the result, and of a list of images the one, that FILE has."""
    if grid := made_by.get("grid"):
        outputs = [output for output, _ in results]
        images = [each for output in outputs for each in (output if isinstance(output, list | tuple) else [output])]
        return image_grid(images, *grid), {**whole, "grid": grid}
    output, record = results[made_by.get("result", 1) - 1]
    if (number := made_by.get("image")) is not None:
        return output[number - 1], {**record, "image": number}
    return output, record
