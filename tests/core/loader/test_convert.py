import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.core.loader.component import apply_rule
from diffsynth.core.loader.convert import (
    Apply,
    Check,
    Constant,
    Dequantize,
    Drop,
    Fuse,
    Permute,
    Rename,
    ReorderChunks,
    Reshape,
    Split,
    Tie,
    check,
    invert,
    plan,
)
from diffsynth.errors import KeyMismatch


def run(rules, tensors):
    """Return the tensors that a plan makes, as loading does."""
    made = plan(rules, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    out = {}
    for key, target in made.targets.items():
        out[key] = apply_rule(target.rule, tuple(tensors[source] for source in target.sources), target.index)
        assert tuple(out[key].shape) == target.shape, key
    return out


RULES = (
    Rename("blocks.{n}.attn1.to_q.{*}", "blocks.{n}.self_attn.q.{*}"),
    Split("blocks.{n}.kv", ("blocks.{n}.k", "blocks.{n}.v"), dim=0),
    Fuse(("blocks.{n}.gate", "blocks.{n}.up"), "blocks.{n}.gate_up", dim=1),
    Reshape("conv", "linear", (4, 6)),
    Permute("hwio", "oihw", (3, 2, 0, 1)),
    ReorderChunks("mod", "modulation", (2, 0, 1)),
)


def tensors():
    torch.manual_seed(0)
    return {
        "blocks.0.attn1.to_q.weight": torch.randn(2, 2),
        "blocks.11.attn1.to_q.lora.bias": torch.randn(2),
        "blocks.0.kv": torch.randn(6, 2),
        "blocks.0.gate": torch.randn(2, 3),
        "blocks.0.up": torch.randn(2, 5),
        "conv": torch.randn(4, 6, 1, 1),
        "hwio": torch.randn(2, 3, 4, 5),
        "mod": torch.randn(6, 2),
        "untouched": torch.randn(1),
    }


def test_every_op():
    source = tensors()
    made = run(RULES, source)
    assert set(made) == {
        "blocks.0.self_attn.q.weight",
        "blocks.11.self_attn.q.lora.bias",
        "blocks.0.k",
        "blocks.0.v",
        "blocks.0.gate_up",
        "linear",
        "oihw",
        "modulation",
        "untouched",
    }
    assert torch.equal(made["blocks.0.v"], source["blocks.0.kv"][3:])
    assert torch.equal(made["blocks.0.gate_up"], torch.cat([source["blocks.0.gate"], source["blocks.0.up"]], dim=1))
    assert torch.equal(made["oihw"][1, 2, 0, 1], source["hwio"][0, 1, 2, 1])
    assert torch.equal(made["modulation"], source["mod"][[4, 5, 0, 1, 2, 3]])


def test_inverses_give_the_file_back():
    source = tensors()
    shapes = {key: tuple(tensor.shape) for key, tensor in source.items()}
    back = run(invert(RULES, shapes), run(RULES, source))
    assert set(back) == set(source)
    assert all(torch.equal(back[key], source[key]) for key in source)


def test_ops_without_an_inverse():
    weight, scale = torch.tensor([[2.0, 4.0]]), torch.tensor(0.5)
    made = run(
        (
            Drop("lm_head"),
            Tie("embed", "head"),
            Dequantize("w", "w_scale", "weight"),
            Constant("zeros", (3,)),
            Apply(torch.add, ("a", "b"), "sum", lambda a, b: a),
        ),
        {
            "lm_head": torch.ones(1),
            "embed": torch.ones(2),
            "w": weight,
            "w_scale": scale,
            "a": torch.ones(2),
            "b": torch.ones(2),
        },
    )
    assert set(made) == {"embed", "head", "weight", "zeros", "sum"}
    assert torch.equal(made["weight"], weight / 2)
    assert torch.equal(made["sum"], torch.full((2,), 2.0))
    with pytest.raises(ValueError, match="Dequantize cannot be undone"):
        invert((Dequantize("w", "w_scale", "weight"),), {"w": (1, 2), "w_scale": ()})


def test_a_tie_is_undone_while_both_are_equal():
    rules, source = (Tie("embed", "head"),), {"embed": torch.ones(2)}
    back = invert(rules, {"embed": (2,)})
    assert torch.equal(run(back, run(rules, source))["embed"], source["embed"])
    with pytest.raises(ValueError, match="no longer equal"):
        run(back, {"embed": torch.ones(2), "head": torch.zeros(2)})


def test_a_check_changes_nothing_and_may_refuse():
    def positive(weight):
        if not (weight > 0).all():
            raise ValueError("not positive")

    rules, source = (Check("w.{n}", positive),), {"w.0": torch.ones(2)}
    assert run(rules, source)["w.0"] is source["w.0"]
    assert run(invert(rules, {"w.0": (2,)}), source)["w.0"] is source["w.0"]
    with pytest.raises(ValueError, match="not positive"):
        run(rules, {"w.0": torch.zeros(2)})


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(0, 1))
def test_split_and_fuse_undo_each_other(sizes, dim):
    shape = [3, 3]
    shape[dim] = sum(sizes)
    source = {"x": torch.arange(float(torch.Size(shape).numel())).reshape(shape)}
    parts = tuple(f"part{i}" for i in range(len(sizes)))
    rules = (Split("x", parts, dim, tuple(sizes)),)
    assert torch.equal(run(invert(rules, {"x": tuple(shape)}), run(rules, source))["x"], source["x"])


def test_half_a_rule_is_an_error():
    with pytest.raises(KeyMismatch, match=r"needs 'blocks.3.up', which is not there"):
        plan(RULES, {"blocks.3.gate": (2, 2)})


def test_a_shape_that_does_not_fit():
    with pytest.raises(KeyMismatch, match="does not reshape"):
        plan(RULES, {"conv": (5, 5)})


def test_one_key_made_twice():
    with pytest.raises(KeyMismatch, match="'linear' would be made twice"):
        plan(RULES, {"conv": (4, 6), "linear": (4, 6)})


def test_check_names_missing_unknown_and_wrong():
    made = plan((), {"a": (1,), "b": (2,), "c": (3,)})
    with pytest.raises(
        KeyMismatch, match=r"1 missing \(d\); 1 wrong shape \(b is \(2,\), expected \(5,\)\); 2 unknown"
    ):
        check(made, {"b": (5,), "d": (1,)}, where="x.safetensors")
    assert check(made, {"a": (1,), "b": (2,)}, where="x", unused="report") == ["c"]


def test_constants_are_left_out_again():
    rules = (Constant("zeros", (3,)), Constant("ones", (2,), 1.0), Rename("a", "b"))
    back = run(invert(rules, {"a": (1,)}), run(rules, {"a": torch.full((1,), 4.0)}))
    assert back == {"a": torch.full((1,), 4.0)}


@pytest.mark.parametrize(
    "rule",
    [
        lambda: Split("x", ("a", "b"), -1),
        lambda: Fuse(("a", "b"), "x", -1),
        lambda: ReorderChunks("x", "y", (1, 0), -1),
    ],
)
def test_axes_are_counted_from_the_front(rule):
    with pytest.raises(ValueError, match="counted from the front"):
        rule()


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (torch.tensor(2.0), torch.full((4, 6), 2.0)),
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 6)),
        (torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 6)),
        # Blocks of 2 by 3.
        (
            torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            torch.tensor([[1.0, 2.0], [3.0, 4.0]])[[0, 0, 1, 1]][:, [0, 0, 0, 1, 1, 1]],
        ),
    ],
)
def test_a_scale_may_be_of_the_tensor_a_row_or_a_block(scale, expected):
    weight = torch.ones(4, 6, dtype=torch.float8_e4m3fn)
    made = run((Dequantize("w", "s", "weight"),), {"w": weight, "s": scale})["weight"]
    assert torch.equal(made, expected)


def test_blocks_that_do_not_divide_the_weight_are_refused():
    with pytest.raises(KeyMismatch, match=r"scale of shape \(3,\) does not fit a weight of shape \(4, 6\)"):
        plan((Dequantize("w", "s", "weight"),), {"w": (4, 6), "s": (3,)})
