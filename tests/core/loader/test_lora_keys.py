"""Keys of LoRA files: the kind and the shape of each change, in every spelling."""

import pytest

from diffsynth.core.loader.lora_keys import lora_keys, lora_share

KINDS = {
    "peft": ({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2)}, [("a", "weight", "LoRA", (6, 4), 2)]),
    "adapter": ({"a.lora_A.x.weight": (2, 4), "a.lora_B.x.weight": (6, 2)}, [("a", "weight", "LoRA", (6, 4), 2)]),
    "no weight": ({"a.lora_A": (2, 4), "a.lora_B": (6, 2)}, [("a", "weight", "LoRA", (6, 4), 2)]),
    "adapter, no weight": ({"a.lora_A.x": (2, 4), "a.lora_B.x": (6, 2)}, [("a", "weight", "LoRA", (6, 4), 2)]),
    "processor": (
        {"a.processor.to_q_lora.down.weight": (2, 4), "a.processor.to_q_lora.up.weight": (6, 2)},
        [("a.processor.to_q_lora", "weight", "LoRA", (6, 4), 2)],
    ),
    "linear layer": (
        {"a.lora_linear_layer.down.weight": (2, 4), "a.lora_linear_layer.up.weight": (6, 2)},
        [("a", "weight", "LoRA", (6, 4), 2)],
    ),
    "one pixel": (
        {"a.lora_down.weight": (2, 4, 1, 1), "a.lora_up.weight": (6, 2, 1, 1)},
        [("a", "weight", "LoRA", (6, 4), 2)],
    ),
    "convolution": (
        {"a.lora_down.weight": (2, 4, 3, 3), "a.lora_up.weight": (6, 2, 1, 1)},
        [("a", "weight", "LoRA", (6, 4, 3, 3), 2)],
    ),
    "three factors": (
        {"a.lora_down.weight": (2, 4, 1, 1), "a.lora_mid.weight": (3, 2, 3, 3), "a.lora_up.weight": (6, 3, 1, 1)},
        [("a", "weight", "LoRA", (6, 4, 3, 3), 2)],
    ),
    "bias": (
        {"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2), "a.lora_B.bias": (6,)},
        [("a", "weight", "LoRA", (6, 4), 2), ("a", "bias", "difference", (6,), 2)],
    ),
    "lightx2v": (
        {"a.diff": (6,), "a.diff_b": (6,), "a.diff_m": (1, 6, 4)},
        [("a", "weight", "difference", (6,), 0), ("a", "bias", "difference", (6,), 0),
         ("a", "modulation", "difference", (1, 6, 4), 0)],
    ),
    "LoKr": ({"a.lokr_w1": (2, 2), "a.lokr_w2_a": (3, 1), "a.lokr_w2_b": (1, 2)}, [("a", "weight", "LoKr", (6, 4), 1)]),
    "LoKr with a core": (
        {"a.lokr_w1": (2, 2), "a.lokr_t2": (1, 1, 3, 3), "a.lokr_w2_a": (1, 3), "a.lokr_w2_b": (1, 2)},
        [("a", "weight", "LoKr", (6, 4, 3, 3), 1)],
    ),
    "LoHa": (
        {f"a.hada_w{n}_{side}": (6, 2) if side == "a" else (2, 4) for n in (1, 2) for side in "ab"},
        [("a", "weight", "LoHa", (6, 4), 2)],
    ),
    "new value of a norm": (
        {"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2), "a.norm.query_norm.scale": (4,)},
        [("a", "weight", "LoRA", (6, 4), 2), ("a.norm.query_norm", "weight", "new value", (4,), 0)],
    ),
    "embedding": (
        {"a.lora_embedding_A": (2, 9), "a.lora_embedding_B": (4, 2)},
        [("a", "weight", "LoRA of an embedding", (9, 4), 2)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    keys, expected = KINDS[name]
    found = lora_keys(keys)
    assert [(each.module, each.part, each.kind, each.shape, each.rank) for each in found.changes] == expected
    assert (found.broken, found.others, found.modules) == ({}, {}, len({each.module for each in found.changes}))
    assert lora_share(keys, found)


def test_new_values():
    """A checkpoint has weights of norms, too, and is no LoRA; a matrix is no norm."""
    (change,) = lora_keys({"a.set_weight": (6, 4)}).changes
    assert (change.module, change.kind, change.keys) == ("a", "new value", {"new value": "a.set_weight"})
    checkpoint = {"a.norm.weight": (4,), "a.to_q.weight": (4, 4), "b.norm1.weight": (4,)}
    assert not lora_share(checkpoint, lora_keys(checkpoint))
    assert lora_keys({"norm.weight": (4, 4)}).others == {"norm.weight": "no part of a LoRA"}
    both = {"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2), "a.set_weight": (6, 4)}
    assert lora_keys(both).broken == {"a": "a is changed as LoRA and by a new value; expected one"}


@pytest.mark.parametrize("alpha", ["a.alpha", "a.lora_alpha", "a.lora.alpha", "a.network_alpha"])
def test_alphas(alpha):
    (change,) = lora_keys({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2), alpha: ()}).changes
    assert change.keys["alpha"] == alpha
    assert lora_keys({alpha: (2, 2)}).others == {alpha: "no part of a LoRA"}


@pytest.mark.parametrize(("shape", "by_inputs"), [((6,), False), ((6, 1), False), ((1, 4), True), ((4,), True)])
def test_magnitudes(shape, by_inputs):
    (change,) = lora_keys({"a.lora_A.weight": (2, 4), "a.lora_B.weight": (6, 2), "a.dora_scale": shape}).changes
    assert change.is_dora
    assert change.by_inputs is by_inputs


def test_each_damage_is_named():
    found = lora_keys({"a.lora_A.weight": (2, 4), "b.lokr_w1": (2, 2), "c.oft_blocks": (2, 2, 2), "d": (1,)})
    assert found.broken.keys() == {"a", "b"}
    assert found.complaint() == (
        "it has the down matrix of a alone; expected down and up (lora_A and lora_B), the LoKr of b lacks lokr_w2_a, "
        "lokr_w2_b; it has lokr_w1; c.oft_blocks: OFT, which rotates the weights; d: no part of a LoRA"
    )
