"""`diffsynth plan`: compute memory, weight placement and time of a call. Needs neither weights nor a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from diffsynth.cli.arguments import call_arguments, component_option, given_components, set_option, shown_arguments
from diffsynth.cli.completion import ModelName
from diffsynth.cli.output import POLICIES, echo, json_option, show_json, show_table, traceback_option

if TYPE_CHECKING:
    from diffsynth.core.planning import ComponentPlan, MemoryPlan, StagePlan
    from diffsynth.registry import ModelRecord

GIB = 2**30


@click.command()
@click.argument("model", type=ModelName())
@click.option(
    "--vram", "vram_limit", type=float, metavar="GIB", help="Limit of device memory in GiB; 0 keeps no block resident."
)
@click.option("--ram", "ram_limit", type=float, metavar="GIB", help="Limit of host memory of the process in GiB.")
@click.option("--height", type=int, help="Height in pixels.")
@click.option("--width", type=int, help="Width in pixels.")
@click.option("--frames", "num_frames", type=int, help="Number of frames of a video.")
@click.option("--steps", "num_inference_steps", type=int, help="Number of denoising steps, at least 1.")
@click.option("--cfg-scale", type=float, help="Scale of classifier-free guidance; 1 is off.")
@click.option("--num-images", type=int, help="Number of results per call, at least 1.")
@set_option
@component_option
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Length of the prompt in tokens."
)
@click.option("--device", help="Device: cuda, cpu, ...; by default the one present, else cuda with assumed speeds.")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Dtype of weights and activations."
)
@click.option(
    "--policy", type=click.Choice(POLICIES), help="Where weights are stored between uses; dynamic with --vram."
)
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
    settings: tuple[str, ...],
    files: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Print the plan of a call of MODEL: memory by stage, weight placement, GB moved and seconds per step.

    Sizes come from the headers of its files if they are present, else from its package. Exit 1 if it does not fit.
    """
    from diffsynth import registry

    record = registry.get(model)  # before importing torch, so that a wrong name fails at once
    arguments = call_arguments(record, {name: value for name, value in options.items() if value is not None}, settings)
    components = given_components(record, files)
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
            **({"components": components} if components else {}),
        )
    except NotEnoughMemory as error:
        if as_json:
            show_json({"model": record.name, "fits": False, "reason": str(error)})
        else:
            echo(f"{record.name} does not fit: {error}", err=True)
        click.get_current_context().exit(1)
    if as_json:
        shown = shown_arguments(arguments, settings)
        show_json({"model": record.name, "fits": True, "arguments": shown, **made.to_dict()})
    else:
        _show(record, made)


def _show(record: ModelRecord, made: MemoryPlan) -> None:
    has_device = made.peak_vram > 0
    heads = ("STAGE", "VRAM GiB", "RAM GiB", "WEIGHTS", "GB/STEP", "STEPS", "S/STEP")
    rows = [_row(stage, has_device=has_device) for stage in made.stages]
    show_table(heads, rows)
    echo(f"\npeak      {_peak(made)}")
    if has_device:
        echo(f"smallest  --vram {-(-made.smallest_vram * 100 // GIB) / 100:.2f}")
    if made.evicted:
        echo(f"evicted   {', '.join(made.evicted)}: off the device between stages")
    for stage in (stage for stage in made.stages if stage.bytes_ahead):
        ahead, total = stage.bytes_ahead / 1e9, stage.bytes_once / 1e9
        echo(f"prefetch  {ahead:.1f} of {total:.1f} GB of {stage.name} are copied during the last step before it")
    if made.storage:
        echo(f"stored    in {made.storage}, which changes results")
    if made.options:
        echo(f"choice    {'; '.join(map(str, made.options))}")
    for name, value in made.switches.items():
        echo(f"sets      {name}={value!r} because of the limit, which may change the result")
    echo(f"speed     {made.speeds.link / 1e9:.1f} GB/s, {made.speeds.compute / 1e12:.1f} TFLOP/s: "
               f"{'measured' if made.speeds.measured else 'not measured here'}. {made.speeds.source}")  # fmt: skip


def _peak(made: MemoryPlan) -> str:
    vram = f"{made.peak_vram / GIB:.2f} GiB VRAM, " if made.peak_vram else ""
    return f"{vram}{made.peak_ram / GIB:.2f} GiB RAM"


def _row(stage: StagePlan, *, has_device: bool) -> tuple[str, ...]:
    return (
        stage.name,
        f"{stage.vram / GIB:.2f}" if has_device else "-",
        f"{stage.ram / GIB:.2f}",
        "; ".join(_placement(component) for component in stage.components) or "-",
        f"{stage.bytes_per_step / 1e9:.2f}",
        str(stage.steps),
        f"{stage.seconds_per_step:.3g}",
    )


def _placement(component: ComponentPlan) -> str:
    """Return where a component's weights are, as text: `"dit: 12 of 34 blocks resident, others from host, 2 slots"`, or
    `"dit: whole, from host"` if no block is streamed.
    """
    count = len(component.resident) + len(component.streamed)
    if not component.streamed:
        source = "" if component.offloaded_to == "device" else f", from {component.offloaded_to}"
        return f"{component.role}: whole{source}"
    blocks = f"{len(component.resident)} of {count} blocks resident"
    slots = f"{component.slots} slot{'s' if component.slots > 1 else ''}"
    return f"{component.role}: {blocks}, others from {component.offloaded_to}, {slots}"
