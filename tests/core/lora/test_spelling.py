"""LoRAs in the spellings of other programs: their keys, and layers of another layout, which are read back the same."""

import pytest
import torch

import lora_networks as small
from diffsynth.core.lora import LoRA, LoRALayer, fit, parse
from diffsynth.core.lora.spelling import SPELLINGS, in_layout, spelled, spelling_of
from diffsynth.errors import KeyMismatch
from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

OWN = {key: tuple(tensor.shape) for key, tensor in small.Turned().state_dict().items()}


def layers(names, module=None, alpha=None):
    made = small.factors(module or small.Turned(), names)
    return LoRA({name: LoRALayer(down, up, alpha) for name, (down, up) in made.items()})


KEYS = {
    "comfyui": {"diffusion_model.blocks.1.attn.to_q.lora_down.weight", "diffusion_model.blocks.1.attn.to_q.alpha",
                "diffusion_model.blocks.1.attn.to_q.lora_up.weight"},
    "diffusers": {"transformer.blocks.1.attn.to_q.lora_A.weight", "transformer.blocks.1.attn.to_q.lora_B.weight"},
    "kohya": {"lora_unet_blocks_1_attn_to_q.lora_down.weight", "lora_unet_blocks_1_attn_to_q.lora_up.weight",
              "lora_unet_blocks_1_attn_to_q.alpha"},
    "peft": {"base_model.model.blocks.1.attn.to_q.lora_A.weight", "base_model.model.blocks.1.attn.to_q.lora_B.weight"},
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_usual_spellings(spelling, alpha):
    """Without a key for alpha the factor is in matrix B."""
    module, name = small.network(), "blocks.1.attn.to_q"
    own = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    lora = layers([name], module, alpha)
    keys = spelled(lora, spelling, own)
    assert keys.keys() == KEYS[spelling.name]
    found = fit(parse(keys), module).layers[name]
    torch.testing.assert_close(found.scaled_up() @ found.down, lora.layers[name].scaled_up() @ lora.layers[name].down)


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_layers_of_another_layout_are_read_back_the_same(alpha, monkeypatch):
    """Split, joined and reordered weights; the sizes of the parts of a joined one are those of the published layout."""
    published = {f"{name}.weight": shape for name, shape in small.FILE.items()}
    monkeypatch.setattr("diffsynth.core.lora.spelling.layout_of", lambda checkpoint: published)
    monkeypatch.setattr("diffsynth.core.loader.lora_match.layout_of", lambda checkpoint: published)
    lora = layers(["q", "v", "qkv", "wide", "left", "shift_scale", "plain"], alpha=alpha)
    file = in_layout(lora, small.CHECKPOINTS[0], OWN)
    assert file.layers.keys() == small.FILE.keys()
    assert all(layer.shape == small.FILE[name] for name, layer in file.layers.items())
    found = fit(file, small.Turned(), small.CHECKPOINTS, architecture="turned").layers
    for name, layer in found.items():
        expected = lora.layers.get(name)
        change = layer.scaled_up() @ layer.down
        torch.testing.assert_close(change, change * 0 if expected is None else expected.scaled_up() @ expected.down)


def test_parts_of_a_block_diagonal_keep_their_rank(monkeypatch):
    published = {f"{name}.weight": shape for name, shape in small.FILE.items()}
    monkeypatch.setattr("diffsynth.core.lora.spelling.layout_of", lambda checkpoint: published)
    three = {f"to_{part}": LoRALayer(torch.randn(2, 6), torch.randn(4, 2), 3.0) for part in "qkv"}
    joined = fit(LoRA(three), small.Turned(), small.CHECKPOINTS, architecture="turned")
    again = in_layout(joined, small.CHECKPOINTS[0], OWN).layers
    assert {name: layer.rank for name, layer in again.items()} == {"to_q": 2, "to_k": 2, "to_v": 2}
    for name, layer in three.items():
        torch.testing.assert_close(again[name].scaled_up() @ again[name].down, layer.scaled_up() @ layer.down)


def architecture(*spellings):
    return ArchitectureSpec(
        name="turned", module="", config="", infer_config="", required=(), tiny="", tiny_inputs="",
        lora_spellings=spellings,
    )  # fmt: skip


def test_an_architecture_adds_spellings_and_replaces_usual_ones():
    own = LoRASpelling(name="kohya", layout="turned", prefix="net_")
    assert spelling_of("kohya", architecture(own)) is own
    assert spelling_of("kohya", architecture()) == LoRASpelling.kohya("lora_unet_")
    with pytest.raises(ValueError, match=r"spelling='koyha': LoRAs of turned are written as comfyui.*'kohya'"):
        spelling_of("koyha", architecture())


def test_layers_that_a_program_does_not_know_are_refused():
    """A layer whose change is zero, as a part of a fused weight may be, is left out."""
    spelling = LoRASpelling(name="small", layers=("q", "plain*"))
    lora = layers(["q", "k", "plain"])
    with pytest.raises(KeyMismatch, match="changes k, which files of small do not have"):
        spelled(lora, spelling, OWN)
    zero = LoRALayer(torch.zeros(1, 6), torch.zeros(4, 1))
    assert len(spelled(LoRA({**lora.layers, "k": zero}), spelling, OWN)) == 4


def test_what_cannot_be_written():
    with pytest.raises(KeyMismatch, match="expected a plain LoRA"):
        spelled(parse({"q.diff": torch.zeros(4, 6)}), SPELLINGS[0], OWN)
    with pytest.raises(ValueError, match="names the layout 'absent', which is not declared"):
        spelled(layers(["q"]), LoRASpelling(name="x", layout="absent"), OWN, small.CHECKPOINTS)
    with pytest.raises(ValueError, match="cannot be told"):
        spelled(layers(["q"]), LoRASpelling(name="x", layout="turned"), OWN, [CheckpointSpec(
            name="turned", architecture="turned", rules="lora_networks:RULES")])  # fmt: skip
