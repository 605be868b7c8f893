"""The role that each file fills, found before any tensor is read."""

from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from diffsynth import ModelConfig
from diffsynth.errors import MissingComponent, Unrecognized
from diffsynth.models.flux_autoencoder import FluxAutoencoder
from diffsynth.runtime import pretrained
from diffsynth.runtime.feature import Feature
from diffsynth.runtime.pretrained import PretrainedLoader
from diffsynth.runtime.role import Role
from diffsynth.runtime.unit import unit
from toy_unet import declare

VAE = files("diffsynth_zimage") / "nano" / "vae.safetensors"
FIRST, SECOND = Role(architectures=("flux_autoencoder",)), Role(architectures=("flux_autoencoder",), optional=True)


def load(roles, *configs):
    return PretrainedLoader(roles, "Toy").load(configs, {}, dtype=torch.float32, device="cpu")[0]


def test_a_pipeline_whose_roles_are_all_optional_may_get_no_file():
    """Reading ahead paired each component with the next one. With no component at all the pairs did not fit."""
    loader = PretrainedLoader({"dit": Role(architectures=("any",), optional=True)}, "Toy")
    assert loader.load([], {}, dtype=torch.float32, device="cpu") == ({}, {})


def test_a_config_names_the_role_that_its_file_fills():
    """Without a name, files of one architecture fill its roles in order, except those that a later config names."""
    roles = {"first": FIRST, "second": SECOND}
    assert list(load(roles, ModelConfig(VAE))) == ["first"]
    assert list(load({**roles, "first": SECOND}, ModelConfig(VAE, role="second"))) == ["second"]
    assert list(load(roles, ModelConfig(VAE), ModelConfig(VAE, role="first"))) == ["second", "first"]


def test_a_role_of_many_is_named_by_several_configs():
    roles = {"first": SECOND, "many": Role(architectures=("flux_autoencoder",), many=True)}
    found = load(roles, ModelConfig(VAE, role="many"), ModelConfig(VAE), ModelConfig(VAE, role="many"))
    assert {role: len(part) if isinstance(part, tuple) else 1 for role, part in found.items()} == {
        "many": 2,
        "first": 1,
    }


def test_a_feature_that_is_used_alone_needs_no_other_component():
    @unit("result")
    def use(second): ...

    feature = Feature("alone", roles={"second": SECOND}, units=(use,), alone=True)
    roles = {"first": FIRST, "second": SECOND}

    def loaded(config, **changed):
        loader = PretrainedLoader(roles, "Toy", features=(replace(feature, **changed),))
        return loader.load([config], {}, dtype=torch.float32, device="cpu")[0]

    found = loaded(ModelConfig(VAE, role="second"))
    assert (found["first"], type(found["second"])) == (None, FluxAutoencoder)
    with pytest.raises(MissingComponent, match="Toy needs first"):
        loaded(ModelConfig(VAE, role="second"), alone=False)
    with pytest.raises(MissingComponent, match="Toy needs first"):
        loaded(ModelConfig(VAE, role="second"), units=())


def test_a_file_of_several_roles_is_read_once(monkeypatch):
    """A model names a file of two components once for each of their roles."""
    headers, read = [], pretrained.read_config
    monkeypatch.setattr(
        pretrained, "read_config", lambda *given, **named: headers.append(given) or read(*given, **named)
    )
    found = load({"first": FIRST, "second": SECOND}, ModelConfig(VAE, role="second"), ModelConfig(VAE, role="first"))
    assert len(headers) == 1
    assert found["first"] is not found["second"]


def test_roles_that_configs_name_are_checked():
    with pytest.raises(ValueError, match="role='frist', no role of a module in Toy; did you mean 'first'"):
        load({"first": FIRST}, ModelConfig(VAE, role="frist"))
    with pytest.raises(ValueError, match="2 ModelConfigs have role='first'; expected one"):
        load({"first": FIRST}, ModelConfig(VAE, role="first"), ModelConfig(VAE, role="first"))
    with pytest.raises(Unrecognized, match="a flux_autoencoder; role first of Toy is filled already, by another file"):
        load({"first": FIRST}, ModelConfig(VAE), ModelConfig(VAE, role="first"))


class Both(FluxAutoencoder):
    """Accepted in two roles of different kinds."""


@pytest.fixture
def both(monkeypatch, tmp_path):
    """Return a file of an architecture that is accepted as two others."""
    from diffsynth.core.loader.save import save_checkpoint
    from diffsynth.models.config import TINY_FLUX_AUTOENCODER

    references = {
        "config": "diffsynth.models.config:FluxAutoencoderConfig",
        "tiny": "diffsynth.models.config:TINY_FLUX_AUTOENCODER",
    }
    declare(monkeypatch, Both, "both", accepted_as=("image_net", "video_net"), **references)
    file = tmp_path / "both.safetensors"
    save_checkpoint(Both(TINY_FLUX_AUTOENCODER), file, architecture="both", config=TINY_FLUX_AUTOENCODER)
    return file


def test_a_file_that_two_kinds_of_roles_accept_must_name_its_role(both):
    roles = {name: Role(architectures=(f"{name}_net",), optional=True) for name in ("image", "video")}
    with pytest.raises(Unrecognized, match=r"roles image and video of Toy accept alike; .*role='image'"):
        load(roles, ModelConfig(both))
    assert list(load(roles, ModelConfig(both, role="video"))) == ["video"]
    alike = {name: Role(architectures=("image_net",), optional=True) for name in ("image", "second")}
    assert list(load(alike, ModelConfig(both), ModelConfig(both))) == ["image", "second"]
    own = {"image": roles["image"], "mine": Role(architectures=("both",))}
    assert list(load(own, ModelConfig(both))) == ["mine"]
