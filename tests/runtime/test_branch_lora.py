"""LoRAs of one branch of guidance equal both branches computed by hand, one with the LoRA loaded."""

from __future__ import annotations

import threading
from itertools import pairwise

import pytest
import torch

import lora_networks as small
from diffsynth import provenance
from diffsynth.core import forward_chain
from diffsynth.core.forward_chain import ForwardLayer
from diffsynth.core.lora import save_lora
from diffsynth.core.vram import Policy, wrap
from diffsynth.errors import KeyMismatch, NoFiles
from diffsynth.runtime.unit import Phase, unit
from limited import keep_limit
from tiny_z_image import SMALL, tiny_z_image

LAYERS = [f"layers.{n}.attention.to_q" for n in range(6)] + ["layers.0.feed_forward.w2"]
CALL = {**SMALL, "negative_prompt": "b", "num_inference_steps": 3, "cfg_scale": 3.0}


def style(module, seed=1):
    return small.state_dict("diffusion_model.{}.lora_{A,B}.weight", small.factors(module, LAYERS, seed=seed))


def by_hand(pipe, loras, request):
    """Return the latents of `CALL`, with the LoRA of each branch loaded before its evaluation and removed after it."""
    values = pipe.run_units(pipe.program.units, request)
    latents, sigmas = values["latents"].float(), values["sigmas"].tolist()
    for sigma, sigma_next in pairwise(sigmas):
        velocities = {}
        for branch, prompt in (("cond", request["prompt"]), ("uncond", request["negative_prompt"])):
            given = pipe.run_units(pipe.condition_units(), {**request, "prompt": prompt})
            conditions = {name: given[name] for name in pipe.condition_rules if name in given}
            if branch in loras:
                pipe.load_lora(pipe.dit, state_dict=loras[branch], hotload=True, verbose=0)
            velocities[branch] = pipe.velocity(latents, torch.tensor([sigma]), **pipe.velocity_arguments(conditions))
            pipe.clear_lora()
        v = velocities["uncond"] + request["cfg_scale"] * (velocities["cond"] - velocities["uncond"])
        latents = latents + (sigma_next - sigma) * v
    return latents


@pytest.mark.parametrize("branches", [("cond",), ("uncond",), ("cond", "uncond")])
@torch.no_grad()
def test_equals_both_branches_by_hand(branches):
    pipe = tiny_z_image()
    loras = {branch: style(pipe.dit, seed) for seed, branch in enumerate(branches)}
    names = {"cond": "positive_only_lora", "uncond": "negative_only_lora"}
    got = pipe("a", **CALL, **{names[branch]: lora for branch, lora in loras.items()})
    plain = pipe("a", **CALL)
    request = {**CALL, "prompt": ["a"], "negative_prompt": ["b"], "seeds": [CALL["seed"]]}
    torch.testing.assert_close(got, by_hand(pipe, loras, request), rtol=1e-5, atol=1e-5)
    assert float((got - plain).abs().max()) > 1e-3
    assert torch.equal(plain, pipe("a", **CALL)), "nothing stays in the network"


def test_without_guidance_it_is_a_hot_lora(tmp_path):
    """To the bit, from tensors and from the file that holds them."""
    pipe, call = tiny_z_image(), {**SMALL, "num_inference_steps": 2}
    lora = style(pipe.dit)
    file = save_lora(lora, tmp_path / "style.safetensors")
    got = [pipe("a", **call, positive_only_lora=each) for each in (lora, file, str(file))]
    record = provenance.record(pipe, {"prompt": "a", "positive_only_lora": str(file)})
    assert record["arguments"]["positive_only_lora"] == str(file)
    pipe.load_lora(pipe.dit, file, hotload=True)
    assert all(torch.equal(each, pipe("a", **call)) for each in got)


def test_beside_a_lora_of_all_branches():
    pipe, call = tiny_z_image(), {**SMALL, "num_inference_steps": 2}
    both = [style(pipe.dit, seed) for seed in (1, 2)]
    pipe.load_lora(pipe.dit, state_dict=both[0], hotload=True)
    got = pipe("a", **call, positive_only_lora=both[1])
    assert len(pipe.loras) == 1
    pipe.load_lora(pipe.dit, state_dict=both[1], hotload=True)
    torch.testing.assert_close(got, pipe("a", **call), rtol=1e-5, atol=1e-5)


def test_under_a_policy_it_changes_no_bit():
    pipe, wrapped = tiny_z_image(), tiny_z_image()
    wrapped.dit.requires_grad_(False)
    wrap(wrapped.dit, Policy.preset("cpu-offload", "cpu"), smallest=0).configure(resident=(), slots=1)
    lora = style(pipe.dit)
    assert torch.equal(*(each("a", **CALL, positive_only_lora=lora) for each in (pipe, wrapped)))


def test_a_plan_counts_its_rank():
    pipe = tiny_z_image()
    for role in ("dit", "text_encoder"):
        wrap(pipe.components[role].requires_grad_(False), Policy.preset("cpu-offload", "cpu"))
    plans = keep_limit(pipe, 8)
    for lora in (None, style(pipe.dit), style(pipe.dit, seed=2)):
        pipe("a", **CALL, positive_only_lora=lora)
    assert len(plans) == 2


def test_calls_in_threads_keep_their_own():
    pipe, call = tiny_z_image(), {**SMALL, "num_inference_steps": 2}
    loras = [None, style(pipe.dit, 1), style(pipe.dit, 2)]
    expected = [pipe("a", **call, positive_only_lora=lora) for lora in loras]
    found = [None] * 3

    def run(index):
        found[index] = pipe("a", **call, positive_only_lora=loras[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_negative_lora_without_guidance_has_no_effect():
    pipe = tiny_z_image()
    reasons = pipe.arguments_without_effect(**SMALL, prompt="a", negative_only_lora=style(pipe.dit))
    assert reasons == {"negative_only_lora": "guidance is off (cfg_scale=1.0)"}


def test_what_is_refused(tmp_path):
    """Before anything is encoded."""
    pipe = tiny_z_image()
    pipe.text_encoder.forward = None
    elsewhere = small.state_dict(
        "text_encoder.{}.lora_{A,B}.weight", small.factors(pipe.text_encoder, ["model.layers.0.self_attn.q_proj"])
    )
    cases = [
        (3, ValueError, "positive_only_lora=3: expected"),
        ("absent.safetensors", NoFiles, "absent.safetensors"),
        ({"blocks.0.x.lora_A.weight": torch.ones(2, 3)}, KeyMismatch, "lora_A"),
        (elsewhere, KeyMismatch, "changes text_encoder, which the branches of guidance do not call"),
    ]
    for value, kind, message in cases:
        with pytest.raises((kind, TypeError), match=message):
            pipe("a", **SMALL, positive_only_lora=value)
    forward_chain.install(pipe.dit.layers[0], ForwardLayer.COMPILED, lambda forward: forward)
    with pytest.raises(ValueError, match="has compiled parts"):
        pipe("a", **SMALL, positive_only_lora=style(pipe.dit))


def test_merged_branches_are_refused():
    class Merging(type(tiny_z_image())):
        units = (*type(tiny_z_image()).units, merge)

    pipe = tiny_z_image()
    merging = Merging.from_components(device="cpu", torch_dtype=torch.float32, **pipe.components)
    with pytest.raises(ValueError, match="need the branches of guidance one by one"):
        merging("a", **CALL, positive_only_lora=style(pipe.dit))


@unit("merges_branches", phase=Phase.LATENTS)
def merge(*, batch_size: int) -> bool:
    return True
