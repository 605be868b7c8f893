"""Roles of one component and of many: the architectures that they accept, and what a component must have."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffsynth.errors import InvalidPipeline, MissingComponent
from diffsynth.runtime.role import Role, fields_read, fill_roles, grouped, member_roles, members, role_of
from diffsynth.spec import ArchitectureSpec
from toy_pipeline import ToyPipeline
from toy_unet import declare

ROLES = {"dit": Role(architectures=("net",)), "controlnet": Role(architectures=("control",), optional=True, many=True)}


@pytest.mark.parametrize(("given", "held"), [("a", ("a",)), (["a", "b"], ("a", "b")), ((), None), (None, None)])
def test_a_role_of_many_holds_a_tuple(given, held):
    assert fill_roles(ROLES, {"dit": "net", "controlnet": given}, pipeline_name="P") == {
        "dit": "net",
        "controlnet": held,
    }


def test_members_are_components_of_their_own():
    components = {"dit": "net", "controlnet": ("a", "b"), "vae": None}
    flat = {"dit": "net", "controlnet[0]": "a", "controlnet[1]": "b", "vae": None}
    assert members(components) == flat
    assert grouped(flat) == components
    assert member_roles(["vae", "controlnet", "controlnet[1]"], components) == (
        "vae", "controlnet[0]", "controlnet[1]", "controlnet[1]"
    )  # fmt: skip
    assert role_of("controlnet[1]") == "controlnet"
    assert role_of("dit") == "dit"


def test_a_role_is_missing_or_unknown():
    with pytest.raises(MissingComponent, match="P needs dit"):
        fill_roles(ROLES, {}, pipeline_name="P")
    with pytest.raises(TypeError, match="no role 'controlnets'; did you mean 'controlnet'"):
        fill_roles(ROLES, {"dit": 1, "controlnets": 2}, pipeline_name="P")


FIELDS = dict.fromkeys(("module", "config", "infer_config", "tiny", "tiny_inputs"), "none:none")


def spec(name, *accepted_as):
    return ArchitectureSpec(name=name, required=(), accepted_as=accepted_as, **FIELDS)


def test_a_role_accepts_architectures_by_their_name_or_by_anothers():
    role = Role(architectures=("flux_autoencoder", "other"))
    assert role.accepts(spec("other"))
    assert role.accepts(spec("tiny", "flux_autoencoder"))
    assert not role.accepts(spec("tiny", "wan_autoencoder"))
    assert not role.accepts(spec("tiny"))


def test_fields_that_facts_read_of_a_role():
    facts = {"factor": "vae.factor", "again": "vae.factor", "channels": "dit.in_channels"}
    assert fields_read("vae", facts) == ("factor",)
    assert fields_read("text_encoder", facts) == ()


class Halves(nn.Module):
    """A decoder alone, whose config lacks a field."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(channels=1)

    def decode(self, latents):
        return latents


class WithAutoencoder(ToyPipeline):
    """Reads a fact of its autoencoder."""

    roles = ToyPipeline.roles | {
        "vae": Role(architectures=("toy_autoencoder",), methods=("encode", "decode"), optional=True)
    }
    facts = {"factor": "vae.factor"}


def pair():
    return nn.Identity(), Halves()


def build(vae):
    return WithAutoencoder({"dit": nn.Identity(), "vae": vae}, device="cpu", torch_dtype=torch.float32)


def test_a_component_that_lacks_what_the_pipeline_needs_is_refused_when_it_is_built(monkeypatch):
    declare(monkeypatch, Halves, "half_autoencoder", accepted_as=("toy_autoencoder",))
    message = (
        r"role 'vae' of WithAutoencoder: half_autoencoder \(Halves\) lacks encode\(\) and config.factor; the pipeline "
        r"needs encode\(\), decode\(\), config.factor"
    )
    with pytest.raises(InvalidPipeline, match=message):
        build(Halves())
    with pytest.raises(InvalidPipeline, match=r"role 'vae\[1\]' of P: half_autoencoder"):
        fill_roles({"vae": Role(architectures=(), methods=("encode",), many=True)}, {"vae": pair()}, pipeline_name="P")
    whole = Halves()
    whole.encode, whole.config.factor = whole.decode, 8
    assert build(whole).vae is whole


def test_a_module_of_no_declared_architecture_is_the_callers_own():
    own = nn.Identity()
    assert build(own).vae is own
