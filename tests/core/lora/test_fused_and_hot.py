"""Hot and fused LoRAs give the outputs of peft: alone, stacked, streamed, compiled, and after removal."""

import copy

import pytest
import torch
from torch import nn

import lora_networks as small
from diffsynth.core.lora import add_hot, clear_hot, fit, fuse, is_hot, parse
from diffsynth.core.vram import Policy, managed, wrap
from diffsynth.runtime.acceleration.compiling import compile_forward

CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def lora(seed=1, alpha=None, names=small.TARGETS):
    return fit(parse(small.state_dict(made=small.factors(names=names, seed=seed), alpha=alpha)), small.network())


def by_peft(loras, alpha):
    """Return the output of peft's LoraModel with the same matrices, one adapter for each LoRA."""
    from peft import LoraConfig, LoraModel

    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=list(small.TARGETS))
    model = LoraModel(small.network(), {str(seed): config for seed in loras}, next(iter(map(str, loras))))
    for seed in loras[1:]:
        model.inject_adapter(model.model, str(seed))
    for seed in loras:
        for name, (down, up) in small.factors(seed=seed).items():
            layer = model.model.get_submodule(name)
            layer.lora_A[str(seed)].weight.data.copy_(down)
            layer.lora_B[str(seed)].weight.data.copy_(up)
    model.set_adapter([str(seed) for seed in loras])
    with torch.no_grad():
        return model(small.INPUTS)


@pytest.mark.parametrize(("seeds", "alpha"), [((1,), 3), ((1,), 7), ((1, 2), 5)])
def test_peft_gives_the_same(seeds, alpha):
    expected = by_peft(seeds, alpha)
    hot, cold = small.network(), small.network()
    assert not torch.allclose(hot(small.INPUTS), expected, **CLOSE)
    for seed in seeds:
        add_hot(hot, lora(seed, alpha))
        fuse(cold, lora(seed, alpha))
    torch.testing.assert_close(hot(small.INPUTS), expected, **CLOSE)
    torch.testing.assert_close(cold(small.INPUTS), expected, **CLOSE)


def test_strength():
    expected = small.changed(small.factors(), strength=0.25)(small.INPUTS)
    hot = small.network()
    add_hot(hot, lora(), 0.25)
    torch.testing.assert_close(hot(small.INPUTS), expected, **CLOSE)


def test_clearing_leaves_nothing_behind():
    module = small.network()
    before, classes = module(small.INPUTS), [type(part) for part in module.modules()]
    weights = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    add_hot(module, lora(1))
    add_hot(module, lora(2))
    assert is_hot(module)
    assert isinstance(module.blocks[0].attn.to_q, nn.Linear)
    assert module.state_dict().keys() == weights.keys()
    assert clear_hot(module) == len(small.TARGETS)
    assert not is_hot(module)
    assert [type(part) for part in module.modules()] == classes
    assert torch.equal(module(small.INPUTS), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in module.state_dict().items())
    assert dict(module.named_buffers()) == {}
    assert clear_hot(module) == 0


def test_a_fused_weight_is_rounded_once():
    module, made = small.network(torch.bfloat16), small.factors()
    fuse(module, lora(), 0.3)
    for name, (down, up) in made.items():
        exact = small.network(torch.bfloat16).get_submodule(name).weight.float() + (0.3 * up) @ down
        assert torch.equal(module.get_submodule(name).weight, exact.bfloat16())


@pytest.mark.parametrize("preset", ["cpu-offload", "disk", "fp8"])
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_beside_weights_that_stream(preset, wrapped_first, tmp_path):
    """Layers outside the repeated blocks are blocks of their own, whose forward the engine wraps."""
    names = (*small.TARGETS, "embed", "proj_out")
    expected_of = small.network()
    add_hot(expected_of, lora(names=names))
    module = small.network()

    def put_under_policy():
        source = None
        if preset == "disk":
            source = on_disk(module, tmp_path)
        policy = Policy.preset(preset, "cpu", torch.float32)
        wrap(module, policy, source=source, smallest=0, repeated=("blocks",)).configure(resident=(), slots=1)

    if wrapped_first:
        put_under_policy()
    add_hot(module, lora(names=names))
    if not wrapped_first:
        put_under_policy()
    if preset == "fp8":
        for part in expected_of.parameters():
            part.copy_(part.to(torch.float8_e4m3fn).float())
    expected, plain = expected_of(small.INPUTS), small.network()
    assert managed(module).footprint().rest > 0
    for _ in range(2):
        assert torch.equal(module(small.INPUTS), expected)
    clear_hot(module)
    if preset == "fp8":
        for part in plain.parameters():
            part.copy_(part.to(torch.float8_e4m3fn).float())
    assert torch.equal(module(small.INPUTS), plain(small.INPUTS))


def on_disk(module, folder):
    from safetensors.torch import save_file

    from diffsynth.core.vram import DiskMap

    save_file({key: tensor.contiguous() for key, tensor in module.state_dict().items()}, folder / "a.safetensors")
    return DiskMap(folder / "a.safetensors").source_of(module)


def test_matrices_leave_the_device_with_their_component():
    module = small.network()
    held = wrap(module, Policy.preset("cpu-offload", "cpu"), smallest=0)
    bare = held.footprint()
    add_hot(module, lora())
    size = sum(tensor.numel() for pair in small.factors().values() for tensor in pair) * 4
    assert held.footprint().rest - bare.rest == size


def test_fusing_into_weights_that_wait_in_host_memory():
    module, expected = small.network(), small.network()
    held = wrap(module, Policy.preset("cpu-offload", "cpu"), smallest=0)
    held.configure(resident=(), slots=1)
    module(small.INPUTS)
    fuse(module, lora())
    fuse(expected, lora())
    assert torch.equal(module(small.INPUTS), expected(small.INPUTS))


def test_weights_that_cannot_be_fused_say_why_and_stay(tmp_path):
    module = small.network()
    wrap(module, Policy.preset("disk", "cpu"), source=on_disk(module, tmp_path), smallest=0)
    with pytest.raises(ValueError, match="on disk.*Use hotload=True"):
        fuse(module, lora())
    coarse = small.network()
    wrap(coarse, Policy.preset("fp8", "cpu", torch.float32), smallest=0)
    with pytest.raises(ValueError, match=r"torch.float8_e4m3fn, too coarse"):
        fuse(coarse, lora())


def test_the_same_lora_is_fused_once():
    """DiffSynth-Studio fused a LoRA of one branch again at every step: weight 1, 2, 3."""
    module = small.network()
    fuse(module, lora(), 0.5)
    weights = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"in these weights already, with alpha=0.5"):
        fuse(module, lora())
    assert all(torch.equal(tensor, weights[key]) for key, tensor in module.state_dict().items())
    fuse(module, lora(2))
    with pytest.raises(ValueError, match=r"in these weights already, with alpha=1"):
        add_hot(module, lora(2))


def test_the_same_lora_is_hot_once():
    module = small.network()
    add_hot(module, lora(), 0.5)
    once = module(small.INPUTS)
    for add in (add_hot, fuse):
        with pytest.raises(
            ValueError, match=r"beside these weights already, with alpha=0.5.*call clear_lora\(\) first"
        ):
            add(module, lora())
    assert torch.equal(module(small.INPUTS), once)
    clear_hot(module)
    add_hot(module, lora(), 0.5)
    assert torch.equal(module(small.INPUTS), once)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)


def test_a_layer_that_is_read_past_its_forward():
    made = {"attention.out_proj": (torch.ones(2, 8), torch.ones(8, 2))}
    found = fit(parse(small.state_dict(made=made)), Outer())
    with pytest.raises(ValueError, match="inside a MultiheadAttention, which reads its weight without calling it"):
        add_hot(Outer(), found)
    module = Outer()
    fuse(module, found)
    assert not torch.equal(module.attention.out_proj.weight, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="inside a Attention"):
        add_hot(small.network(), lora(), atomic=(small.Attention,))


def test_compiled_blocks_notice():
    """torch 2.11 has no guard on the classes of the layers in a graph."""
    module, expected = small.network(), small.network()
    for block in module.blocks:
        compile_forward(block, backend="eager")
    plain = module(small.INPUTS)
    add_hot(module, lora())
    add_hot(expected, lora())
    assert torch.equal(module(small.INPUTS), expected(small.INPUTS))
    clear_hot(module)
    assert torch.equal(module(small.INPUTS), plain)


def test_a_layer_compiled_by_itself():
    module = small.network()
    compile_forward(module.embed, backend="eager")
    with pytest.raises(ValueError, match="embed is compiled by itself"):
        add_hot(module, lora(names=("embed",)))
