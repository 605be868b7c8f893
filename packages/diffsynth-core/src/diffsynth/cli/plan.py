"""`diffsynth plan`: whether a model fits, where its weights would be, and how fast it would be. No weights, no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.output import POLICIES, fail, json_option, show_json, show_table, traceback_option

if TYPE_CHECKING:
    from diffsynth._models import ModelRecord
    from diffsynth.core.planning import ComponentPlan, MemoryPlan, StagePlan

GIB = 2**30


@click.command()
@click.argument("model")
@click.option("--vram", "vram_limit", type=float, metavar="GIB", help="Of the device; 0 keeps nothing there.")
@click.option("--ram", "ram_limit", type=float, metavar="GIB", help="Of host memory, the whole process.")
@click.option("--height", type=int, help="In pixels.")
@click.option("--width", type=int, help="In pixels.")
@click.option("--frames", "num_frames", type=int, help="Of a video.")
@click.option("--steps", "num_inference_steps", type=int, help="Denoising steps.")
@click.option("--cfg-scale", type=float, help="Other than 1 runs the network twice a step.")
@click.option("--num-images", type=int, help="At once.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Length of the prompt.")
@click.option("--device", help="cuda, cpu, ...; what is here, else cuda with assumed speeds.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Of weights and activations.")
@click.option("--policy", type=click.Choice(POLICIES), help="Where weights wait; with --vram it is dynamic.")
@json_option
@traceback_option
def plan(
    model: str,
    vram_limit: float | None,
    ram_limit: float | None,
    prompt_tokens: int,
    device: str | None,
    dtype: str | None,
    policy: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Tell what MODEL would take: memory by stage, what lives where, GB moved and seconds per step.

    From headers of its files where they are here, else from what its package says of them. Exit 1 if it does not fit.
    """
    from diffsynth import registry

    record = registry.get(model)  # a wrong name costs no import of torch
    arguments = {name: value for name, value in options.items() if value is not None}
    _check_names(record, arguments)
    from diffsynth.errors import NotEnoughMemory
    from diffsynth.runtime.planning import plan_model

    try:
        made = plan_model(
            record,
            arguments,
            device=device,
            dtype=dtype or "bfloat16",
            vram_limit=vram_limit,
            ram_limit=ram_limit,
            policy=policy,
            prompt_tokens=prompt_tokens,
        )
    except NotEnoughMemory as error:
        if as_json:
            show_json({"model": record.name, "fits": False, "reason": str(error)})
        else:
            click.echo(f"{record.name} does not fit: {error}", err=True)
        click.get_current_context().exit(1)
    if as_json:
        show_json({"model": record.name, "fits": True, "arguments": arguments, **made.to_dict()})
    else:
        _show(record, made)


def _check_names(record: ModelRecord, arguments: Mapping[str, Any]) -> None:
    """End the program on an option that the model's pipeline does not take."""
    from diffsynth.runtime.request import reject_unknown
    from diffsynth.spec import resolve

    try:
        reject_unknown(arguments, resolve(record.pipeline).call_signature(record.defaults))
    except TypeError as error:
        fail(click.get_current_context(), error)


def _show(record: ModelRecord, made: MemoryPlan) -> None:
    has_device = made.peak_vram > 0
    heads = ("STAGE", "VRAM GiB", "RAM GiB", "WEIGHTS", "GB/STEP", "STEPS", "S/STEP")
    rows = [_row(stage, has_device=has_device) for stage in made.stages]
    show_table(heads, rows)
    click.echo(f"\npeak      {_peak(made)}")
    if has_device:
        click.echo(f"smallest  --vram {-(-made.smallest_vram * 100 // GIB) / 100:.2f}")
    if made.evicted:
        click.echo(f"leaves    {', '.join(made.evicted)}: off the device between stages")
    for stage in (stage for stage in made.stages if stage.bytes_ahead):
        click.echo(f"ahead     {stage.bytes_ahead / 1e9:.1f} of {stage.bytes_once / 1e9:.1f} GB of {stage.name} come "
                   "while the last step before it computes")  # fmt: skip
    if made.storage:
        click.echo(f"stored    in {made.storage}, which changes the picture")
    if made.options:
        click.echo(f"choice    {'; '.join(map(str, made.options))}")
    if made.tiled or made.asks_for_tiles:
        whose = "because of the limit" if made.tiled else "as the call says"
        click.echo(f"tiles     the autoencoder works tile by tile (tiled=True) {whose}, which may change its pixels")
    click.echo(f"speed     {made.speeds.link / 1e9:.1f} GB/s, {made.speeds.compute / 1e12:.1f} TFLOP/s: "
               f"{'measured' if made.speeds.measured else 'not measured here'}. {made.speeds.source}")  # fmt: skip


def _peak(made: MemoryPlan) -> str:
    vram = f"{made.peak_vram / GIB:.2f} GiB VRAM, " if made.peak_vram else ""
    return f"{vram}{made.peak_ram / GIB:.2f} GiB RAM"


def _row(stage: StagePlan, *, has_device: bool) -> tuple[str, ...]:
    return (
        stage.name,
        f"{stage.vram / GIB:.2f}" if has_device else "-",
        f"{stage.ram / GIB:.2f}",
        "; ".join(_where(component) for component in stage.components) or "-",
        f"{stage.bytes_per_step / 1e9:.2f}",
        str(stage.steps),
        f"{stage.seconds_per_step:.3g}",
    )


def _where(component: ComponentPlan) -> str:
    """`dit: 12 of 34 blocks stay, the rest come from host through 2 slots`."""
    count = len(component.resident) + len(component.streamed)
    if not component.streamed:
        return f"{component.role}: whole" + ("" if component.waits == "device" else f", from {component.waits}")
    slots = f"{component.slots} slot{'s' if component.slots > 1 else ''}"
    return f"{component.role}: {len(component.resident)} of {count} blocks stay, others from {component.waits}, {slots}"
