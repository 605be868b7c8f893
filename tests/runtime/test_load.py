"""`diffsynth.load` with files in place of the model's own."""

import gc
import itertools
import os
import re
import threading
import weakref
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffsynth
from diffsynth import ModelConfig
from diffsynth.core.loader import component
from diffsynth.core.loader.save import save_checkpoint
from diffsynth.errors import Cancelled, Unrecognized
from diffsynth.models.config import TINY_FLUX_AUTOENCODER
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth_zimage import ZImagePipeline
from progress_parts import check_parts

NANO = files("diffsynth_zimage") / "nano"
SIZE = {"height": 64, "width": 64, "num_inference_steps": 1}
CALL = {"prompt": "a red apple", "seed": 0, "output_type": "tensor", **SIZE}


def load(**components):
    return diffsynth.load("z-image-nano", components=components, device="cpu", torch_dtype=torch.float32)


def test_progress_counts_the_bytes_of_all_components():
    seen = []
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32, on_progress=seen.append)
    check_parts(seen)
    assert {(each.stage, each.unit) for each in seen} == {("load", "bytes")}
    roles = list(dict.fromkeys(each.description for each in seen))
    assert sorted(roles) == ["dit", "text_encoder", "vae"]
    weights = {role: sum(each.nbytes for each in pipe.components[role].state_dict().values()) for role in roles}
    assert seen[-1].total == sum(weights.values())
    begins = {role: min(each.done for each in seen if each.description == role) for role in roles}
    sizes = (weights[role] for role in roles)
    assert [*begins.values(), seen[-1].done] == list(itertools.accumulate(sizes, initial=0))


@pytest.mark.parametrize("policy", ["cpu-offload", "fp8", "disk"])
def test_progress_of_weights_under_a_policy(policy):
    seen = []
    diffsynth.load("z-image-nano", device="cpu", policy=policy, on_progress=seen.append)
    check_parts(seen)
    assert (seen[-1].total == 0) == (policy == "disk"), "nothing is read of what stays on disk"


@pytest.mark.parametrize("end", ["cancel", "callback"])
def test_a_load_that_is_ended_leaves_nothing_behind(end, monkeypatch):
    """It ends when the third component begins; the first two are freed with the error, without the collector."""
    cancel, made, open_files = threading.Event(), [], len(os.listdir("/proc/self/fd"))
    materialize = component.materialize

    def recorded(*arguments, **options):
        module = materialize(*arguments, **options)
        made.extend(weakref.ref(each) for each in (module, next(module.parameters())))
        return module

    def on_progress(each):
        if len(made) == 4:
            cancel.set()
            if end == "callback":
                raise ZeroDivisionError

    monkeypatch.setattr(component, "materialize", recorded)
    given = {"device": "cpu", "on_progress": on_progress, "cancel": cancel if end == "cancel" else None}
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(Cancelled if end == "cancel" else ZeroDivisionError) as caught:
            diffsynth.load("z-image-nano", **given)
        caught.value.__traceback__ = None
        del caught
        assert len(made) == 4
        assert [each() for each in made] == [None] * 4
    finally:
        gc.enable()
    assert len(os.listdir("/proc/self/fd")) == open_files
    cancel.clear()
    assert load()(**CALL).isfinite().all()


def test_a_load_is_cancelled_before_it_reads_a_file(monkeypatch):
    cancel = threading.Event()
    cancel.set()
    monkeypatch.setattr("diffsynth.runtime.pretrained.read_config", None)
    with pytest.raises(Cancelled):
        diffsynth.load("z-image-nano", device="cpu", cancel=cancel)
    with pytest.raises(TypeError, match="cancel=1: expected a threading.Event"):
        diffsynth.load("z-image-nano", device="cpu", cancel=1)


def test_a_file_replaces_the_models_own(tmp_path):
    own = load()
    own.vae.decoder.conv_out.weight.mul_(2)
    path = tmp_path / "vae.safetensors"
    save_checkpoint(own.vae, path, architecture="flux_autoencoder", config=own.vae.config)
    pipe = load(vae=path)
    assert pipe.component_files["vae"] == [path]
    assert torch.equal(pipe(**CALL), own(**CALL))


def test_a_path_a_source_or_a_config_names_the_file(monkeypatch):
    """Each file is given with its role; those of the other roles are the model's own."""
    given = []

    def from_pretrained(cls, *, model_configs, **options):
        given.append({config.role: config for config in model_configs})
        raise NotImplementedError

    monkeypatch.setattr(ZImagePipeline, "from_pretrained", classmethod(from_pretrained))
    source = "package://diffsynth_zimage/nano/vae.safetensors"
    for file in ("a/vae.safetensors", Path("a/vae.safetensors"), source, ModelConfig(model_id="a/b")):
        with pytest.raises(NotImplementedError):
            load(vae=file)
    others = {role: ModelConfig.from_source(source.replace("vae", role), role=role) for role in ("dit", "text_encoder")}
    assert given == [
        {**others, "vae": ModelConfig("a/vae.safetensors", role="vae")},
        {**others, "vae": ModelConfig(Path("a/vae.safetensors"), role="vae")},
        {**others, "vae": ModelConfig.from_source(source, role="vae")},
        {**others, "vae": ModelConfig(model_id="a/b", role="vae")},
    ]


@pytest.mark.parametrize("role", ["vea", "tokenizer", "vae[0]"])
def test_a_role_that_holds_no_module_is_named(role):
    with pytest.raises(
        TypeError, match=f"components has {re.escape(repr(role))}, no role of a module in ZImagePipeline"
    ):
        load(**{role: NANO / "vae.safetensors"})
    with pytest.raises(TypeError, match="did you mean 'vae'"):
        load(vea=NANO / "vae.safetensors")


def test_a_file_of_another_role_is_refused():
    message = "dit.safetensors: this is a z_image_dit; role vae of ZImagePipeline takes one flux_autoencoder; give the"
    with pytest.raises(Unrecognized, match=f"{message} file to role dit"):
        load(vae=NANO / "dit.safetensors")


def test_of_a_file_with_several_components_the_one_for_the_role_is_taken(tmp_path):
    """Its other component would be a second text encoder beside the model's own."""
    vae = FluxAutoencoder(replace(TINY_FLUX_AUTOENCODER, latent_channels=32))
    whole = {f"vae.{key}": tensor for key, tensor in vae.state_dict().items()}
    whole |= {f"text_encoder.{key}": tensor for key, tensor in load_file(NANO / "text_encoder.safetensors").items()}
    file = tmp_path / "whole.safetensors"
    save_file(whole, file)
    pipe = load(vae=file)
    assert pipe.component_files["vae"] == [file]
    assert [path.name for path in pipe.component_files["text_encoder"]] == ["text_encoder.safetensors"]
    assert torch.equal(pipe.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (["vae.safetensors"], r"components=\['vae.safetensors'\]: expected a dict role -> file"),
        ({"vae": 3}, r"components\['vae'\] is 3; expected a path, a ModelConfig"),
        ({"vae": []}, r"components\['vae'\] is \[\]"),
        ({"vae": torch.nn.Identity()}, r"components\['vae'\] is Identity\(\).*A loaded module goes to from_components"),
        ({"vae": [ModelConfig("a"), ModelConfig("b")]}, r"components\['vae'\] is \[ModelConfig"),
    ],
)
def test_what_is_no_file_is_refused(components, message):
    with pytest.raises(TypeError, match=message):
        diffsynth.load("z-image-nano", components=components, device="cpu")


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (ModelConfig("a"), "model_configs=ModelConfig.*: expected a list of ModelConfigs"),
        (["a.safetensors"], r"model_configs\[0\] is 'a.safetensors'; expected a ModelConfig; ModelConfig\('a.saf"),
        ([None], r"model_configs\[0\] is None; expected a ModelConfig"),
    ],
)
def test_what_is_no_config_is_refused(configs, message):
    with pytest.raises(TypeError, match=message):
        ZImagePipeline.from_pretrained(device="cpu", model_configs=configs)


def test_another_dtype_of_computation_than_the_pipelines_is_refused():
    """It once ended in the middle of the call: "mat1 and mat2 must have the same dtype"."""
    keys = {"offload_device": "cpu", "offload_dtype": torch.bfloat16}
    keys |= {"computation_device": "cpu", "computation_dtype": torch.bfloat16}
    with pytest.raises(
        ValueError, match="vae: computation_dtype=torch.bfloat16, and the pipeline computes in torch.fl"
    ):
        load(vae=ModelConfig(str(NANO / "vae.safetensors"), **keys))
