import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffsynth import _discovery
from diffsynth.core.loader import header
from diffsynth.errors import Diverged, TrainingError
from diffsynth_train import checkpoint, loop
from diffsynth_train.checkpoint import last_checkpoint
from diffsynth_train.config import Recipe, parse_section


def parsed(recipe, **changes):
    for path, value in changes.items():
        section, key = path.split("__")
        recipe[section][key] = value
    return parse_section(Recipe, recipe, where="")


def test_autoencoder_is_trained_and_its_latents_get_unit_scale(autoencoder_recipe, workspace):
    recipe = parsed(autoencoder_recipe, loop__steps=30, objective__crop=0)
    (path,) = loop.train(recipe)
    with (workspace / "autoencoder" / "loss.csv").open() as file:
        losses = [float(row["mse"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = json.loads(metadata["diffsynth.config"])
    assert metadata["diffsynth.architecture"] == "flux_autoencoder"
    assert config["scaling_factor"] not in (1.0, 0.3611)
    assert json.loads(metadata["diffsynth.recipe"])["loop"]["steps"] == 30

    run = loop.TrainingRun(parsed({**autoencoder_recipe, "components": {"vae": {"source": str(path), "train": True}}}))
    with torch.no_grad():
        latents = run.pipe.vae.encode(run.dataset.batch(range(5))["input_image"])
    assert latents.mean().item() == pytest.approx(0, abs=1e-3)
    assert latents.std().item() == pytest.approx(1, abs=1e-3)

    parts = run.components.values()
    (again,) = checkpoint.save_weights(workspace / "again", parts, dtype=torch.float32, step=0, notes={})
    began_as = header.read([again]).metadata["diffsynth.base"]
    assert began_as == header.signature(header.read([path]).shapes)
    assert "diffsynth.base" not in metadata  # it was trained from scratch


def test_resume_is_bit_exact(flow_recipe, workspace):
    """Six steps without a stop, and three steps, a resume and three more, give bit-equal weights."""
    whole = {path.name: load_file(path) for path in loop.train(parsed(flow_recipe))}
    halfway = workspace / "flow" / "step-0000003"
    resumed_recipe = parsed(flow_recipe, output__folder=str(workspace / "resumed"))
    resumed = {path.name: load_file(path) for path in loop.train(resumed_recipe, resume=halfway)}
    assert set(whole) == {"dit.safetensors", "text_encoder.safetensors"}
    for name, tensors in whole.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, resumed[name][key]), f"{name}: {key}"


def test_autocast_and_muon_train_network_and_text_encoder(flow_recipe):
    run = loop.TrainingRun(
        parsed(flow_recipe, loop__precision="bf16", optimizer__name="muon", optimizer__learning_rate=3e-2)
    )
    losses = [float(run.step(step)["loss"]) for step in range(24)]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert {parameter.dtype for _, parameter in run.parameters} == {torch.float32}


def test_channels_last_changes_the_layout_and_not_the_loss(autoencoder_recipe):
    autoencoder_recipe["optimizer"] = {"name": "muon"}
    plain = loop.TrainingRun(parsed(autoencoder_recipe))
    autoencoder_recipe["components"]["vae"]["channels_last"] = True
    innermost = loop.TrainingRun(parsed(autoencoder_recipe))
    assert innermost.components["vae"].module.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    for step in range(2):
        assert float(innermost.step(step)["loss"]) == pytest.approx(float(plain.step(step)["loss"]), rel=1e-4)


def test_compile_takes_the_blocks_that_the_architecture_declares(autoencoder_recipe, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    autoencoder_recipe["components"]["vae"]["compile"] = True
    vae = loop.TrainingRun(parsed(autoencoder_recipe)).components["vae"].module
    assert compiled == [*vae.encoder.down_blocks, *vae.decoder.up_blocks]
    catalog = _discovery.catalog()
    declared = [
        replace(one, spec=replace(one.spec, compiled_blocks=())) if one.spec.name == "flux_autoencoder" else one
        for one in catalog.architectures
    ]
    monkeypatch.setattr(_discovery, "catalog", lambda: replace(catalog, architectures=tuple(declared)))
    with pytest.raises(
        TrainingError, match=r"\[components.vae\] compile = true: .*flux_autoencoder declares no blocks"
    ):
        loop.TrainingRun(parsed(autoencoder_recipe))


def test_another_seed_gives_other_weights(flow_recipe, workspace):
    flow_recipe["loop"]["steps"] = 3
    first = load_file(loop.train(parsed(flow_recipe))[0])
    second = load_file(loop.train(parsed({**flow_recipe, "seed": 1}, output__folder=str(workspace / "second")))[0])
    assert any(not torch.equal(tensor, second[key]) for key, tensor in first.items())


def test_frozen_units_are_cached_and_read_back(flow_recipe, workspace):
    run = loop.TrainingRun(parsed(flow_recipe))
    assert [unit.name for unit in run.live] == ["encode_prompt"]
    files = {path: path.stat().st_mtime_ns for path in (workspace / "cache").glob("*.safetensors")}
    assert len(files) == 5
    again = loop.TrainingRun(parsed(flow_recipe))
    assert {path: path.stat().st_mtime_ns for path in (workspace / "cache").glob("*.safetensors")} == files
    torch.testing.assert_close(run.cache.batch([3])["input_latents"], again.cache.batch([3])["input_latents"])


def test_gradients_reach_both_components_and_spare_the_frozen_one(flow_recipe):
    run = loop.TrainingRun(parsed(flow_recipe))
    for step in range(
        4
    ):  # output layer and gates are initialised to zero: the gradient reaches one more layer in each step
        run.step(step)
    for role in ("dit", "text_encoder"):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in run.components[role].module.parameters())
    assert all(p.grad is None for p in run.components["vae"].module.parameters())


def test_micro_batches_add_up(autoencoder_recipe):
    """A step with and without micro-batches gives equal gradients if nothing is random."""
    norms = []
    for micro in (0, 1):
        autoencoder_recipe["objective"] = {"name": "reconstruction", "sample": False}
        norms.append(loop.TrainingRun(parsed(autoencoder_recipe, loop__micro_batch=micro)).step(0)["grad_norm"])
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-4)


def test_old_checkpoints_are_deleted(flow_recipe, workspace):
    loop.train(parsed(flow_recipe, loop__save_every=1, loop__keep=2))
    kept = sorted(path.name for path in (workspace / "flow").glob("step-*"))
    assert kept == ["step-0000005", "step-0000006"]
    assert last_checkpoint(workspace / "flow").name == "step-0000006"


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(flow_recipe, workspace):
    """The first step is fine and saved; then a weight becomes NaN, and the second step is the last."""
    run = loop.TrainingRun(parsed(flow_recipe, loop__save_every=1))
    step = run.step

    def diverging(number):
        if number == 1:
            with torch.no_grad():
                run.parameters[0][1].fill_(float("nan"))
        return step(number)

    run.step = diverging
    with pytest.raises(Diverged, match=r"gradients of step 2 hold NaN.*The last good checkpoint is .*step-0000001"):
        run.steps(0)
    with pytest.raises(Diverged, match=r"weights hold NaN or infinity.*so no checkpoint is written"):
        run.save(2)
    assert [path.name for path in (workspace / "flow").glob("step-*")] == ["step-0000001"]
    for file in (workspace / "flow").rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["components"]["dit"].update(architecture="z_image_dti"), "did you mean 'z_image_dit'"),
        (lambda r: r["components"].update(dti=r["components"].pop("dit")), "no such role; did you mean 'dit'"),
        (lambda r: r["components"]["dit"]["config"].update(dmi=3), r"\[components.dit.config\]: unknown key 'dmi'"),
        (lambda r: r["components"]["dit"].update(freeze=["nothing.*"]), "matches no parameter"),
        (lambda r: [part.update(train=False) for part in r["components"].values()], "no component is trained"),
        (lambda r: r["objective"].update(name="flow_mach"), "did you mean 'flow_match'"),
        (lambda r: r["objective"].update(tabel=3), r"unknown key 'tabel' in \[objective\]"),
        (lambda r: r.update(pipeline="diffsynth_zimage.pipeline:ZImagePipelin"), "no plugin declares training for"),
        (lambda r: r["processors"].update(tokenizer="/nowhere"), "is not a folder"),
        (
            lambda r: r["data"].update(height=30),
            "height = 30, width = 32: ZImagePipeline takes height = 32, width = 32",
        ),
    ],
)
def test_unfit_recipes(flow_recipe, change, message):
    change(flow_recipe)
    with pytest.raises(TrainingError, match=message):
        loop.TrainingRun(parsed(flow_recipe))


@pytest.mark.parametrize(("section", "name"), [("output", "loss.csv"), ("output", "dit.safetensors"), ("data", "x")])
def test_outputs_that_cannot_be_written_are_found_before_the_training(flow_recipe, workspace, section, name):
    """The folder in the place of the weights was found after the training."""
    folder = workspace / "taken"
    flow_recipe[section].update({"output": {"folder": str(folder)}, "data": {"cache": str(folder)}}[section])
    if section == "data":
        folder.touch()
    else:
        (folder / name).mkdir(parents=True)
    with pytest.raises(TrainingError, match=rf"^\[{section}\] .*cannot be written"):
        loop.TrainingRun(parsed(flow_recipe))


def test_a_warmup_longer_than_the_training_is_said(flow_recipe, caplog):
    """A warm-up of 100 steps in a training of 4 ended at 4 % of the learning rate, without a word."""
    loop.train(parsed(flow_recipe, loop__steps=1, optimizer__warmup_steps=100))
    assert "warmup_steps = 100 (schedule = " in caplog.text
    assert "do not fit into loop.steps = 1" in caplog.text


def test_unfit_resumes(flow_recipe, workspace):
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        last_checkpoint(workspace)
    loop.train(parsed(flow_recipe, loop__steps=1))
    other = loop.TrainingRun(parsed({**flow_recipe, "seed": 9}))
    with pytest.raises(TrainingError, match="seed 0, the recipe has 9"):
        other.resume(Path(last_checkpoint(workspace / "flow")))


def test_a_run_that_is_not_continued_is_kept(flow_recipe, workspace):
    """A second run in the folder of a longer one: its first checkpoints counted as the oldest and were deleted."""
    loop.train(parsed(flow_recipe, loop__steps=4, loop__save_every=2))
    newest = workspace / "flow" / "step-0000004"
    with pytest.raises(TrainingError, match="holds checkpoints of another run, up to step-0000004"):
        loop.train(parsed(flow_recipe, loop__steps=3))
    with pytest.raises(TrainingError, match="holds later checkpoints, up to step-0000004"):
        loop.train(parsed(flow_recipe), resume=workspace / "flow" / "step-0000002")
    with pytest.raises(TrainingError, match="saved after step 4, and loop.steps = 4: there is nothing to train"):
        loop.train(parsed(flow_recipe, loop__steps=4), resume=newest)
    assert loop.train(parsed(flow_recipe, loop__steps=5), resume=newest)


def test_captions_of_any_length_are_cached(flow_recipe, workspace):
    """Rows that were encoded with others are padded to other lengths; a batch of both could not be stacked."""
    with (workspace / "metadata.csv").open("a", encoding="utf-8") as file:
        file.writelines(f"{number % 5}.png,{'long ' * number}\n" for number in range(16))
    flow_recipe["components"]["text_encoder"]["train"] = False
    del flow_recipe["data"]["captions"]
    run = loop.TrainingRun(parsed(flow_recipe, loop__batch_size=8))
    rows = run.cache.batch([0, 20, 3])
    assert rows["prompt_embeds"].shape[:2] == rows["prompt_mask"].shape
    alone = run.cache.batch([0])
    length = int(alone["prompt_mask"].sum())
    assert rows["prompt_mask"].sum(1)[0] == length < rows["prompt_mask"].sum(1)[1]
    assert torch.equal(rows["prompt_embeds"][0, :length], alone["prompt_embeds"][0, :length])
    assert all(torch.isfinite(run.step(step)["loss"]) for step in range(3))
