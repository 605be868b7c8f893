"""Recognition over the architectures that core registers: the FLUX autoencoder and Qwen3."""

from dataclasses import replace

import pytest
import torch

from diffsynth import _discovery
from diffsynth._spec_checks import check_spec
from diffsynth.core.loader.component import open_component
from diffsynth.core.loader.header import Header, TensorInfo, read, signature
from diffsynth.core.loader.layouts import layout_of, nested_layout_of
from diffsynth.core.loader.recognize import recognize
from diffsynth.errors import NotRunnable, Unrecognized
from diffsynth.spec import ArchitectureSpec, CheckpointSpec

CATALOG = _discovery.catalog()
ARCHITECTURES = {declared.spec.name: declared.spec for declared in CATALOG.architectures}
CHECKPOINTS = [declared.spec for declared in CATALOG.checkpoints]
PUBLISHED = [checkpoint for checkpoint in CHECKPOINTS if checkpoint.layout and not checkpoint.loras_only]


def header_of(shapes, metadata=None, nested=None):
    return Header({key: TensorInfo("BF16", shape) for key, shape in shapes.items()}, metadata or {}, nested=nested)


def find(shapes, **options):
    (found,) = recognize(header_of(shapes), ARCHITECTURES, CHECKPOINTS, **options)
    return found


OWN_NAMES = [
    checkpoint
    for checkpoint in PUBLISHED
    if not checkpoint.rules and any("{n}" in name for name in ARCHITECTURES[checkpoint.architecture].required)
]


@pytest.mark.parametrize("checkpoint", OWN_NAMES, ids=lambda checkpoint: checkpoint.name)
def test_a_missing_block_is_not_overlooked(checkpoint):
    required = next(p for p in ARCHITECTURES[checkpoint.architecture].required if "{n}" in p)
    shapes = dict(layout_of(checkpoint))
    del shapes[required.format(n=0)]
    with pytest.raises(Unrecognized, match=f"it lacks {required.format(n=0)}"):
        find(shapes)


def find_of(checkpoint, shapes, **options):
    """Return the component of a checkpoint's architecture in a file, which may hold several components."""
    nested = nested_layout_of(checkpoint) if shapes == layout_of(checkpoint) else shapes
    header = header_of(shapes, nested=nested if nested != shapes else None)
    found = recognize(header, ARCHITECTURES, CHECKPOINTS, **options)
    return next(one for one in found if one.architecture.name == checkpoint.architecture)


@pytest.mark.parametrize("checkpoint", PUBLISHED, ids=lambda checkpoint: checkpoint.name)
class TestPublished:
    def test_by_signature(self, checkpoint):
        shapes = layout_of(checkpoint)
        assert signature(nested_layout_of(checkpoint)) == checkpoint.signature
        found = find_of(checkpoint, shapes, tiers=("signature",))
        assert (found.architecture.name, found.tier) == (checkpoint.architecture, "signature")

    def test_by_structure_with_the_same_config(self, checkpoint):
        shapes = layout_of(checkpoint)
        found = find_of(checkpoint, shapes, tiers=("structure",))
        assert (found.architecture.name, found.tier, found.extra) == (checkpoint.architecture, "structure", ())
        assert found.config == find_of(checkpoint, shapes, tiers=("signature",)).config

    def test_under_a_wrapper_prefix(self, checkpoint):
        shapes = {f"model.diffusion_model.{key}": shape for key, shape in layout_of(checkpoint).items()}
        found = find_of(checkpoint, shapes)
        assert (found.architecture.name, found.prefix) == (checkpoint.architecture, "model.diffusion_model.")

    def test_with_keys_that_nobody_knows(self, checkpoint):
        shapes = dict(layout_of(checkpoint)) | {"surprise.weight": (3,)}
        if checkpoint.architecture == "wan_motion_controller":
            # Three layers are too little to be told by if there may be more.
            with pytest.raises(Unrecognized, match="surprise"):
                find(shapes)
            return
        found = find_of(checkpoint, shapes)
        assert found.tier == "structure"
        assert "surprise.weight" in found.extra


def test_our_own_files_are_recognised_by_their_metadata():
    notes = {"diffsynth.architecture": "flux_autoencoder", "diffsynth.config": '{"latent_channels": 4}'}
    own = {name.replace("{n}", "0"): (1,) for name in ARCHITECTURES["flux_autoencoder"].required}
    (found,) = recognize(header_of(own, notes), ARCHITECTURES, CHECKPOINTS)
    assert (found.tier, found.config.latent_channels) == ("metadata", 4)
    with pytest.raises(Unrecognized, match="its metadata says that it is a flux_autoencoder, but it lacks encoder"):
        recognize(header_of({"x": (1,)}, notes), ARCHITECTURES, CHECKPOINTS)


def test_metadata_of_an_uninstalled_family():
    with pytest.raises(Unrecognized, match="saved as a flux9_dit, which no installed plugin declares"):
        recognize(header_of({"x": (1,)}, {"diffsynth.architecture": "flux9_dit"}), ARCHITECTURES, CHECKPOINTS)


def test_metadata_whose_config_does_not_fit():
    notes = {"diffsynth.architecture": "flux_autoencoder", "diffsynth.config": '{"latent_chanels": 4}'}
    with pytest.raises(Unrecognized, match="latent_chanels"):
        recognize(header_of({"x": (1,)}, notes), ARCHITECTURES, CHECKPOINTS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["blocks.0.q.lora_A.weight", "blocks.0.q.lora_B.weight"], "is a LoRA"),
        (["optimizer.state.0.exp_avg"], "is an optimizer state"),
        (["nothing.like.it"], "no installed architecture has keys like 'nothing.like.it'"),
    ],
)
def test_a_miss_says_what_the_file_is(keys, message):
    with pytest.raises(Unrecognized, match=message):
        find(dict.fromkeys(keys, (1,)))


def test_a_miss_names_the_nearest():
    shapes = dict(layout_of(PUBLISHED[0]))
    shapes.pop(next(iter(shapes)))
    few = dict(list(shapes.items())[: len(shapes) // 2])
    with pytest.raises(
        Unrecognized, match=r"nearest is .*shares \d+ of its \d+ keys; .*\d+ missing \(.* and \d+ more\)"
    ):
        find(few)


def test_an_empty_file(tmp_path):
    from safetensors.torch import save_file

    save_file({}, tmp_path / "x.safetensors")
    with pytest.raises(Unrecognized, match="holds no tensors"):
        recognize(read([tmp_path / "x.safetensors"]), ARCHITECTURES, CHECKPOINTS)


def spec(name, *required, not_runnable=""):
    return ArchitectureSpec(
        name=name,
        module="" if not_runnable else "toy:Net",
        config="",
        infer_config="",
        required=required,
        tiny="",
        tiny_inputs="",
        not_runnable=not_runnable,
    )


NAMED_SHAPES = {"a.weight": (4, 4), "b.weight": (4, 4), "extra.weight": (2, 2)}


@pytest.mark.parametrize("tier", ["signature", "structure"])
def test_a_file_that_cannot_be_run_yet_is_named(tier):
    """It has more keys than a network that runs, which would leave out the rest; a runnable one for all of them, as a
    plugin may declare, takes its place.
    """
    known = [spec("named", *NAMED_SHAPES, not_runnable="an example"), spec("small", "a.weight", "b.weight")]
    layouts = [CheckpointSpec(name="named", architecture="named", signature=signature(NAMED_SHAPES)),
               CheckpointSpec(name="small", architecture="small")]  # fmt: skip
    header = header_of(NAMED_SHAPES)
    (found,) = recognize(header, {each.name: each for each in known}, layouts, tiers=[tier])
    assert (found.architecture.name, found.config, found.extra) == ("named", None, ())
    with pytest.raises(NotRunnable, match=r"x: recognised, not yet runnable: an example \(named\)"):
        found.require_runnable("x")
    with pytest.raises(NotRunnable, match="not yet runnable: an example"):
        open_component(found, header, dtype=torch.float32)
    whole = CheckpointSpec(name="whole", architecture="whole", signature=signature(NAMED_SHAPES))
    known.append(spec("whole", *NAMED_SHAPES))
    for order in ([*layouts, whole], [whole, *layouts]):
        (found,) = recognize(header, {each.name: each for each in known}, order, tiers=[tier])
        assert found.architecture.name == "whole"
        found.require_runnable("x")


def test_a_spec_has_a_module_or_says_what_its_files_are():
    check_spec(spec("a"))
    check_spec(spec("a", not_runnable="an example"))
    for wrong in (replace(spec("a"), module=""), replace(spec("a"), not_runnable="an example")):
        with pytest.raises(ValueError, match="'a': expected a module, or not_runnable"):
            check_spec(wrong)
