"""The training loop."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffsynth import _discovery
from diffsynth.core.finite import LateCheck, nonfinite
from diffsynth.core.replacing import check_writable
from diffsynth.errors import Diverged, Refused, TrainingError, shortened
from diffsynth.runtime.acceleration.compiling import blocks_to_compile
from diffsynth.terminal import module_logger
from diffsynth_train import checkpoint
from diffsynth_train.components import build_components, build_pipeline, training_spec
from diffsynth_train.config import Recipe
from diffsynth_train.data.cache import UnitCache, split_units
from diffsynth_train.data.dataset import Dataset, batch_indices, step_generator, step_random
from diffsynth_train.ema import Ema
from diffsynth_train.log import LossLog, training_progress
from diffsynth_train.objectives.base import build_objective
from diffsynth_train.optim import build_optimizer, learning_rate

logger = module_logger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CACHE_BATCH = 16


def train(recipe: Recipe, *, resume: Path | None = None) -> list[Path]:
    """Train according to `recipe`, to its last step, and return a list of the paths of the final weights; empty in
    processes other than the main one.

    Args:
        recipe: settings of the run.
        resume: folder of a checkpoint of the same run. On the CPU the result is bit-equal to that of an uninterrupted
            run.

    Returns:
        the paths of the final weights, `<output>/<role>.safetensors`.

    Raises:
        TrainingError: the recipe, the manifest or the checkpoint is invalid; the output folder holds checkpoints that
            the run does not continue; or the checkpoint is at or after the last step.
        Diverged: the loss, a gradient or a weight is not finite.
        CheckpointError: the source of a component is missing or cannot be loaded.
    """
    checkpoint.check_output(Path(recipe.output.folder), resume)
    run = TrainingRun(recipe)
    start = run.resume(resume) if resume is not None else 0
    if start >= recipe.loop.steps:
        raise TrainingError(
            f"{resume} was saved after step {start}, and loop.steps = {recipe.loop.steps}: there is nothing to train. "
            f"Set loop.steps to the number of all steps, those done included"
        )
    if misfit := recipe.optimizer.misfit(recipe.loop.steps):  # no error: a short trial of a recipe for a long training
        logger.warning("[optimizer] %s", misfit)
    run.steps(start)
    return run.finish()


def _check_outputs(recipe: Recipe) -> None:
    """Raise TrainingError if a file that the run will write cannot be written."""
    trained = [role for role, section in recipe.components.items() if section.train]
    files = {
        "[output] folder": [
            f"{recipe.output.folder}/{name}" for name in ("loss.csv", *map(checkpoint.weights_file, trained))
        ]
    }
    if recipe.data.cache:
        files["[data] cache"] = [f"{recipe.data.cache}/x"]
    for where, paths in files.items():
        try:
            for path in paths:
                check_writable(Path(path))
        except ValueError as error:
            raise TrainingError(f"{where}: {error}") from None


class TrainingRun:
    """State of a training run: pipeline, data, optimizer, weight average."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.output = Path(recipe.output.folder)
        _check_outputs(recipe)
        self.accelerator = Accelerator(mixed_precision="no")
        self.device = self.accelerator.device
        torch.manual_seed(recipe.seed)
        spec = training_spec(recipe)
        self.components = build_components(recipe, spec)
        self.pipe = build_pipeline(recipe, spec, self.components, self.device)
        self.objective = build_objective(recipe, self.pipe, spec)
        trained = {role for role, component in self.components.items() if component.trained}
        units = self.objective.units()
        reads = {read.name for step in units for read in step.reads} | set(self.objective.columns)
        columns = {column: argument for column, argument in spec.data.items() if argument in reads}
        self._check_size()
        self.dataset = Dataset(recipe.data, columns)
        frozen, self.live = split_units(units, trained, self.dataset.varied)
        cache_folder = Path(recipe.data.cache) if recipe.data.cache else None
        self.cache = UnitCache(cache_folder, self.pipe, frozen, self.components)
        live_reads = {read.name for step in self.live for read in step.reads} | set(self.objective.columns)
        self.live_columns = {c: a for c, a in columns.items() if a in live_reads}
        self.cache.fill(self.dataset, _CACHE_BATCH)
        self.dataset.columns = self.live_columns
        self.parameters = [each for component in self.components.values() for each in component.trainable()]
        tables = (m.weight for c in self.components.values() for m in c.module.modules() if isinstance(m, nn.Embedding))
        self.optimizer = build_optimizer(recipe.optimizer, (each for _, each in self.parameters), tables)
        self.ema = Ema(self.parameters, recipe.ema.decay) if recipe.ema.decay else None
        self._prepare(trained)

    def resume(self, folder: Path) -> int:
        """Restore weights, optimizer, weight average and random state from a checkpoint folder; return the number of
        steps done, an int.
        """
        step, mean = checkpoint.load_state(
            folder, seed=self.recipe.seed, parameters=self.parameters, optimizer=self.optimizer, device=self.device
        )
        if (self.ema is None) != (mean is None):
            raise TrainingError(f"{folder} was saved {'without' if mean is None else 'with'} [ema], unlike the recipe")
        if self.ema is not None and mean is not None:
            self.ema.load_state_dict(mean)
        return step

    def steps(self, start: int) -> None:
        """Train from step `start`, counted from 0, to the recipe's last step; log metrics and save checkpoints
        meanwhile.

        Raises:
            Diverged: the loss or the norm of the gradients of a step is not finite.
        """
        loop, check = self.recipe.loop, LateCheck(self.device)
        log = LossLog(self.output / "loss.csv", every=loop.log_every, start=start)
        with training_progress(loop.steps, start) as progress:
            for step in range(start, loop.steps):
                metrics = self.step(step)
                self._stop_if(check.add(step, *(torch.as_tensor(metrics[name]) for name in ("loss", "grad_norm"))))
                means = log.add(step + 1, metrics)
                progress.advance(progress.task_ids[0])
                if means is not None:
                    progress.update(progress.task_ids[0], loss=f"loss {means['loss']:.4f}")
                    logger.info("step %d: %s", step + 1, ", ".join(f"{k} {v:.4g}" for k, v in means.items()))
                    _discovery.notify("training_step_done", step=step + 1, loss=means["loss"], metrics=means)
                if loop.save_every and (step + 1) % loop.save_every == 0 and step + 1 < loop.steps:
                    self._stop_if(check.finish())
                    self.save(step + 1)
        self._stop_if(check.finish())

    def step(self, step: int) -> dict[str, Tensor | float]:
        """Perform optimizer step `step`, counted from 0; return a dict metric -> tensor or float: `loss`, the
        objective's metrics, `grad_norm` (before clipping) and `learning_rate`.
        """
        recipe, rank, world = self.recipe, self.accelerator.process_index, self.accelerator.num_processes
        rate = learning_rate(recipe.optimizer, step, recipe.loop.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = len(self.dataset)
        indices = batch_indices(rows, recipe.loop.batch_size, step=step, seed=recipe.seed)[rank::world]
        micro = recipe.loop.micro_batch or len(indices)
        captions = step_random(recipe.seed, step, rank)
        generator = step_generator(recipe.seed, step, self.device, rank)
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, Tensor | float] = {}
        for begin in range(0, len(indices), micro):
            micro_batch = indices[begin : begin + micro]
            with self._precision():
                values = self._values(micro_batch, captions)
                loss, metrics = self.objective.loss(values, generator)
            share = len(micro_batch) / len(indices)
            self.accelerator.backward(loss * share)
            for name, value in {"loss": loss.detach(), **metrics}.items():
                total[name] = total.get(name, 0.0) + value * share
        norm = self._clip()
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(step)
        return total | {"grad_norm": norm, "learning_rate": rate}

    def save(self, step: int) -> None:
        """Write a checkpoint to resume from, and the trained weights (averaged if the recipe has an average) as
        safetensors files, in the main process; delete old checkpoints. Other processes do nothing.

        Raises:
            Diverged: a weight is not finite; nothing was written or deleted.
        """
        if wrong := nonfinite(dict(self.parameters), whole=True):
            raise Diverged(
                f"after step {step} {len(wrong)} weights hold NaN or infinity, {shortened(wrong, 3)}, so no checkpoint "
                f"is written. {self._what_is_left()}"
            )
        if not self.accelerator.is_main_process:
            return
        folder = checkpoint.step_folder(self.output, step)
        self._save_weights(folder, step)
        # Last, because a folder with a state counts as a checkpoint.
        checkpoint.save_state(
            folder,
            step=step,
            seed=self.recipe.seed,
            parameters=self.parameters,
            optimizer=self.optimizer,
            ema=None if self.ema is None else self.ema.state_dict(),
            device=self.device,
        )
        checkpoint.drop_old(self.output, self.recipe.loop.keep)

    def finish(self) -> list[Path]:
        """Write the last checkpoint, call `objective.finish()` and write the final weights; return a list of their
        paths, empty in processes other than the main one.

        Only the main process writes; the others return an empty list.
        """
        self.save(self.recipe.loop.steps)
        with self._averaged_weights():
            self.objective.finish(self._all_rows())
        if not self.accelerator.is_main_process:
            return []
        return self._save_weights(self.output, self.recipe.loop.steps)

    def _check_size(self) -> None:
        """Raise TrainingError for a size that the pipeline rounds: images are read at the recipe's."""
        size = (self.recipe.data.height, self.recipe.data.width)
        sizing = [step for step in self.pipe.program.units if {"height", "width"} <= set(step.writes)]
        values = self.pipe.run_units(sizing, {"height": size[0], "width": size[1]})
        if (rounded := (values["height"], values["width"])) != size:
            raise TrainingError(
                f"[data] height = {size[0]}, width = {size[1]}: {type(self.pipe).__name__} takes height = "
                f"{rounded[0]}, width = {rounded[1]}"
            )

    def _stop_if(self, step: int | None) -> None:
        """Raise Diverged that names step `step`, counted from 0, as not finite; do nothing for None."""
        if step is not None:
            raise Diverged(
                f"the loss or the gradients of step {step + 1} hold NaN or infinity, so the run stops. "
                f"{self._what_is_left()}"
            )

    def _what_is_left(self) -> str:
        try:
            last = f"The last good checkpoint is {checkpoint.last_checkpoint(self.output)}."
        except TrainingError:
            last = "No checkpoint was written before."
        return f"{last} Lower the learning rate, or set optimizer.clip, and look for damaged samples."

    def _save_weights(self, folder: Path, step: int) -> list[Path]:
        recipe = json.dumps(asdict(self.recipe), sort_keys=True)
        notes = {"diffsynth.recipe": recipe, "diffsynth.recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest()}
        dtype = _DTYPES[self.recipe.output.dtype]
        with self._averaged_weights():
            return checkpoint.save_weights(folder, self.components.values(), dtype=dtype, step=step, notes=notes)

    def _values(self, indices: list[int], captions: Any) -> dict[str, Any]:
        values = self.dataset.batch(indices, captions) | self.cache.batch(indices) | {"batch_size": len(indices)}
        moved = {k: v.to(self.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in values.items()}
        return self.pipe.run_units(self.live, moved) if self.live else moved

    def _all_rows(self) -> Iterator[Mapping[str, Any]]:
        for begin in range(0, len(self.dataset), _CACHE_BATCH):
            values = self.dataset.batch(range(begin, min(begin + _CACHE_BATCH, len(self.dataset))))
            yield {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in values.items()}

    def _prepare(self, trained: set[str]) -> None:
        loop = self.recipe.loop
        for role in sorted(trained):
            component = self.components[role]
            if loop.gradient_checkpointing:
                if not hasattr(component.module, "gradient_checkpointing"):
                    raise TrainingError(
                        f"{component.architecture.name} does not support gradient_checkpointing; turn it off"
                    )
                component.module.gradient_checkpointing = True
            if self.recipe.components[role].channels_last:
                component.module.to(memory_format=torch.channels_last)
            if self.recipe.components[role].compile:
                self._compile(role)
            if self.accelerator.num_processes > 1:
                if not self.objective.needs_forward_only:
                    raise TrainingError("this objective supports a single process only")
                self.pipe.components[role] = self.accelerator.prepare_model(component.module)

    def _compile(self, role: str) -> None:
        try:
            blocks = blocks_to_compile(self.components[role].module)
        except Refused as error:
            raise TrainingError(f"[components.{role}] compile = true: {error}") from error
        for block in blocks:
            block.compile()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.loop.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _clip(self) -> Tensor:
        parameters = [parameter for _, parameter in self.parameters]
        limit = self.recipe.optimizer.clip or float("inf")
        return nn.utils.clip_grad_norm_(parameters, limit)

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()
