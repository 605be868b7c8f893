"""Roles of one component and of many: the architectures that they accept, and what a component must have."""

import contextlib
import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffsynth import ModelConfig
from diffsynth.core.vram import Policy, wrap
from diffsynth.errors import CorruptFile, InvalidPipeline, MissingComponent
from diffsynth.runtime.role import (
    Agreement,
    Processor,
    Role,
    check_agreements,
    check_components,
    fields_read,
    fill_roles,
    grouped,
    load_processor,
    member_roles,
    members,
    role_of,
)
from diffsynth.spec import ArchitectureSpec
from diffsynth.testing.tiny_processors import byte_tokenizer
from diffsynth_zimage import ZImagePipeline
from tiny_z_image import tiny_z_image
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


class TestCheckComponents:
    """Components that a caller hands over: each can be called, and computes in the dtype of the others."""

    def check(self, dtype=torch.float32, **components):
        check_components(ZImagePipeline.roles, components, dtype=dtype, pipeline_name="P")

    @pytest.fixture(scope="class")
    def pipe(self):
        return tiny_z_image(with_autoencoder=True)

    def test_the_components_of_a_pipeline(self, pipe):
        self.check(**pipe.components)

    def test_another_dtype(self, pipe):
        own = copy.deepcopy(pipe.text_encoder).to(torch.bfloat16)
        message = (
            r"role 'text_encoder' of P: its weights are torch.bfloat16, and the pipeline computes in torch.float32"
        )
        with pytest.raises(InvalidPipeline, match=message):
            self.check(text_encoder=own)
        with pytest.raises(
            InvalidPipeline, match=r"torch_dtype=torch.bfloat16, or the module as module.to\(torch.float32"
        ):
            ZImagePipeline({**pipe.components, "text_encoder": own}, device="cpu", torch_dtype=torch.float32)
        self.check(dtype=torch.bfloat16, text_encoder=own)
        wrap(own.requires_grad_(False), Policy.preset("cpu-offload", "cpu", torch.float32))
        self.check(text_encoder=own)

    def test_a_module_of_another_kind(self, pipe):
        with pytest.raises(InvalidPipeline, match="role 'dit' of P got a qwen3_text_encoder; it takes z_image_dit"):
            self.check(dit=pipe.text_encoder)
        with pytest.raises(InvalidPipeline, match=r"got a Linear, which cannot be called as a .* lacks such a forward"):
            self.check(dit=nn.Linear(2, 2))
        with pytest.raises(InvalidPipeline, match=r"got a Linear, .*lacks encode\(\) and decode\(\)"):
            self.check(vae=nn.Linear(2, 2))

    def test_a_module_of_the_callers_own(self, pipe):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = pipe.dit

            def forward(self, *arguments, **named):
                return self.inner(*arguments, **named)

        self.check(dit=Own())

    @pytest.mark.parametrize("value", ["vae.safetensors", Path("vae.safetensors"), ModelConfig("x"), {}, 3])
    @pytest.mark.parametrize("role", ["vae", "tokenizer"])
    def test_a_file_in_place_of_a_component(self, value, role):
        with pytest.raises(TypeError, match=f"role {role!r} of P got .*; expected the loaded component"):
            self.check(**{role: value})


class TestLoadProcessor:
    """Folders of others: their code is not run, and what is damaged in them is said by name."""

    ROLE = Processor(source="owner/model:tokenizer/")

    def test_a_folder_with_code_of_its_own(self, tmp_path, monkeypatch):
        byte_tokenizer().save_pretrained(tmp_path)
        own = {"auto_map": {"AutoTokenizer": ["code.Own", None]}, "tokenizer_class": "Own"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
        (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
        monkeypatch.setattr("builtins.input", lambda *text: "y")
        with contextlib.suppress(CorruptFile):  # a transformers that needs no code for it may load it
            load_processor("tokenizer", self.ROLE, tmp_path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 10**5, "\x1b]0;owned\x07"])
    def test_files_that_do_not_parse(self, tmp_path, name, content):
        byte_tokenizer().save_pretrained(tmp_path)
        (tmp_path / name).write_text(content)
        with pytest.raises(
            CorruptFile, match=r"cannot be loaded as tokenizer with transformers:AutoTokenizer"
        ) as caught:
            load_processor("tokenizer", self.ROLE, tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\x1b" not in str(caught.value)

    def test_a_chat_template_is_not_run(self, tmp_path):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
        tokenizer.save_pretrained(tmp_path)
        assert load_processor("tokenizer", self.ROLE, tmp_path)("an apple")["input_ids"]


def config(**fields):
    return SimpleNamespace(**fields)


WIDTH = Agreement("width of the caption", ("encoder.width", "dit.caption_width", "net.width"), none=0)


@pytest.mark.parametrize(
    "configs",
    [
        {"encoder": config(width=8), "dit": config(caption_width=8)},
        {"encoder": config(width=8), "dit": None},
        {"encoder": config(width=8), "dit": config()},
        {"encoder": config(width=8), "dit": config(caption_width=0)},
        {"encoder": config(width=8), "net[0]": config(width=8), "net[1]": config(width=8)},
    ],
)
def test_components_that_fit_each_other(configs):
    check_agreements([WIDTH], configs, pipeline_name="Toy")


def test_components_that_do_not_fit_each_other():
    message = "Toy: width of the caption: encoder.width is 8 and dit.caption_width is 9; these two components do"
    with pytest.raises(InvalidPipeline, match=message):
        check_agreements([WIDTH], {"encoder": config(width=8), "dit": config(caption_width=9)}, pipeline_name="Toy")
    with pytest.raises(InvalidPipeline, match=r"net\[1\].width is 7"):
        check_agreements([WIDTH], {"encoder": config(width=8), "net[1]": config(width=7)}, pipeline_name="Toy")
