"""A LoRA in another layout changes our weights as it would change the file's; one of another model is refused."""

import pytest
import torch
from torch import nn

import lora_networks as small
from diffsynth import _discovery
from diffsynth.core.loader import convert
from diffsynth.core.loader.reader.ops import apply_rule
from diffsynth.core.lora import fit, parse
from diffsynth.errors import KeyMismatch


def of_the_file(names, alpha=None):
    dice = torch.Generator().manual_seed(0)
    made = {
        name: (torch.randn(2, small.FILE[name][1], generator=dice), torch.randn(small.FILE[name][0], 2, generator=dice))
        for name in names
    }
    return made, parse(small.state_dict("lora_unet_[].lora_{down,up}.weight", made, alpha, "lora_unet_[].alpha"))


def fitted(lora):
    return fit(lora, small.Turned(), small.CHECKPOINTS, architecture="turned").layers


@pytest.mark.parametrize("alpha", [None, 1.0, {name: 1.0 + number for number, name in enumerate(small.FILE)}])
def test_the_change_of_a_weight_follows_the_rule_of_the_weight(alpha):
    """Rules are linear, so the expected change is the rule applied to `B @ A`."""
    made, lora = of_the_file(small.FILE, alpha)
    scales = {name: layer.scale for name, layer in lora.layers.items()}
    changes = {name: scales[f"lora_unet_{name}"] * (up @ down) for name, (down, up) in made.items()}
    expected = convert.plan(small.RULES, {f"{name}.weight": shape for name, shape in small.FILE.items()}).targets
    found = fitted(lora)
    assert {f"{name}.weight" for name in found} == expected.keys()
    for key, target in expected.items():
        sources = tuple(changes[source.removesuffix(".weight")] for source in target.sources)
        layer = found[key.removesuffix(".weight")]
        torch.testing.assert_close(layer.scaled_up() @ layer.down, apply_rule(target.rule, sources, target.index))


def test_ranks_of_a_fused_weight_add_up():
    _, lora = of_the_file(("to_q", "to_k", "to_v"))
    assert fitted(lora)["qkv"].rank == 6


def test_parts_of_a_fused_weight_that_a_lora_leaves_alone(monkeypatch):
    """Parts whose sizes the layout tells are unchanged; without sizes it is an error."""
    made, lora = of_the_file(("to_k",))
    with pytest.raises(KeyMismatch, match="needs 'to_q.weight', which is not there"):
        fitted(lora)
    published = {f"{name}.weight": shape for name, shape in small.FILE.items()}
    monkeypatch.setattr("diffsynth.core.loader.lora_match.layout_of", lambda checkpoint: published)
    layer = fitted(lora)["qkv"]
    expected = torch.zeros(12, 6)
    expected[4:8] = made["to_k"][1] @ made["to_k"][0]
    torch.testing.assert_close(layer.up @ layer.down, expected)


def pair(name, value=1.0):
    outputs, inputs = small.FILE.get(name, (4, 6))
    return small.state_dict(made={name: (torch.full((1, inputs), value), torch.ones(outputs, 1))})


def test_names_of_two_layouts_in_one_file(caplog):
    """Some published files hold one LoRA for two programs: it is added once. Different changes are ambiguous."""
    with caplog.at_level("INFO", "diffsynth"):
        assert torch.equal(fitted(parse(pair("plain") | pair("simple")))["plain"].down, torch.ones(1, 6))
    assert "has 1 changes under two names, equal; each is added once" in caplog.text
    with pytest.raises(
        KeyMismatch, match=r"'plain.weight' would be made twice, with different values: from plain and f"
    ):
        fitted(parse(pair("plain") | pair("simple", 2.0)))


def test_fused_and_split_keys_in_one_file():
    """Equal ones are the same LoRA for two programs; different ones are parts that add up."""
    layers = fitted(parse(pair("fused") | pair("q", 2.0) | pair("k")))
    for name, strength in (("q", 3.0), ("k", 1.0), ("v", 1.0)):
        torch.testing.assert_close(layers[name].scaled_up() @ layers[name].down, torch.full((4, 6), strength))
    whole = {"qkv.lora_A.weight": torch.ones(1, 6), "qkv.lora_B.weight": torch.ones(12, 1)}
    layer = fitted(parse(whole | pair("to_q") | pair("to_k") | pair("to_v")))["qkv"]
    torch.testing.assert_close(layer.scaled_up() @ layer.down, torch.ones(12, 6))
    layer = fitted(parse(whole | pair("to_q", 2.0) | pair("to_k") | pair("to_v")))["qkv"]
    torch.testing.assert_close(
        layer.scaled_up() @ layer.down, torch.tensor([3.0, 2.0, 2.0]).repeat_interleave(4)[:, None].expand(12, 6)
    )


REFUSED = {
    "another size": ({"blocks.0.attn.to_q": (16, 8)}, r"0 of its 1 layers fit; blocks.0.attn.to_q.weight is \(8, 8\)"),
    "unknown": ({"blocks.0.attn.to_w": (8, 8)}, "it does not have blocks.0.attn.to_w; did you mean 'blocks.0.attn.to_"),
    "deeper": ({"blocks.0.attn.to_q": (8, 8), "blocks.2.attn.to_q": (8, 8)}, "1 of its 2 layers fit"),
    "not a module with weights": ({"blocks.0.attn": (8, 8)}, "its blocks.0.attn is a Attention without this parameter"),
    "twice": (
        {"embed": (8, 5), "transformer.embed": (8, 5)},
        "'embed.weight' would be made twice, with different values: from embed and from transformer.embed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit(name):
    shapes, message = REFUSED[name]
    made = {each: (torch.full((2, i), len(each)), torch.ones(o, 2)) for each, (o, i) in shapes.items()}
    keys = small.state_dict(made={each: (down.float(), up) for each, (down, up) in made.items()})
    with pytest.raises(KeyMismatch, match=message) as caught:
        fit(parse(keys, "style.safetensors"), small.network())
    assert "style.safetensors does not fit Network, and nothing was changed" in str(caught.value)


def test_a_lora_of_another_model_is_named():
    checkpoints = _discovery.catalog().layouts()[1]
    made = {f"layers.{n}.attention.to_q": (torch.ones(2, 3840), torch.ones(3840, 2)) for n in range(3)}
    with pytest.raises(KeyMismatch, match=r"It is a LoRA for Z-Image-Turbo or Z-Image \(z_image_dit\)"):
        fit(parse(small.state_dict(made=made)), nn.Sequential(nn.Linear(2, 2)), checkpoints)
