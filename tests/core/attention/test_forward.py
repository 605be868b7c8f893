"""`attention_forward` is `attention()` in any axis order; nothing that it is given is dropped."""

import pytest
import torch
from einops import rearrange

from diffsynth.compat import attention as named
from diffsynth.core.attention import attention
from diffsynth.core.attention.forward import attention_forward
from diffsynth.errors import Refused


@pytest.fixture
def qkv():
    return tuple(torch.randn(2, length, 6, 13) for length in (37, 63, 63))


@pytest.mark.parametrize("out_pattern", ["b s n d", "b n s d", "b s (n d)", "s b (d n)"])
@pytest.mark.parametrize("pattern", ["b s n d", "b n s d", "b s (n d)"])
def test_any_axis_order(qkv, pattern, out_pattern):
    given = [rearrange(tensor, f"b s n d -> {pattern}") for tensor in qkv]
    found = attention_forward(*given, *[pattern] * 3, out_pattern, dims={"n": 6} if "(" in pattern else None)
    torch.testing.assert_close(found, rearrange(attention(*qkv), f"b s n d -> {out_pattern}"))


def test_patterns_of_its_own_for_each(qkv):
    q, k, v = qkv
    given = (rearrange(q, "b s n d -> b s (n d)"), k, rearrange(v, "b s n d -> b n s d"))
    patterns = {"q_pattern": "b s (n d)", "k_pattern": "b s n d", "out_pattern": "b s n d"}
    torch.testing.assert_close(attention_forward(*given, **patterns, dims={"n": 6}), attention(q, k, v))


def test_default_is_heads_before_tokens(qkv):
    heads_first = [tensor.transpose(1, 2) for tensor in qkv]
    torch.testing.assert_close(attention_forward(*heads_first), attention(*qkv).transpose(1, 2))


def test_settings_arrive(qkv):
    patterns = ["b s n d"] * 4
    for theirs, ours in [
        ({"scale": 0.3}, {"scale": 0.3}),
        ({"is_causal": True}, {"causal": True}),
        ({"window_size": (-1, -1)}, {}),
        ({"compatibility_mode": True}, {"backend": "sdpa"}),
    ]:
        found = attention_forward(*qkv, *patterns, **theirs)
        torch.testing.assert_close(found, attention(*qkv, **ours))


def test_compatibility_mode_is_torch_whatever_the_environment_says(qkv, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_ATTENTION_IMPLEMENTATION", "no_such_backend")
    attention_forward(*qkv, *["b s n d"] * 4, compatibility_mode=True)
    with pytest.raises(ValueError, match="no_such_backend"):
        attention_forward(*qkv, *["b s n d"] * 4)


@pytest.mark.parametrize("shape", [(37, 63), (6, 1, 63), (2, 1, 37, 63)])
def test_masks_broadcast_from_the_right(qkv, shape):
    mask = torch.rand(shape) < 0.7
    mask[..., 0] = True
    full = mask.broadcast_to(2, 6, 37, 63)
    found = attention_forward(*qkv, *["b s n d"] * 4, attn_mask=mask)
    torch.testing.assert_close(found, attention(*qkv, mask=full))
    assert not torch.allclose(found, attention(*qkv))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"window_size": 4}, {"window": (4, 4)}),
        ({"window_size": (5, 2)}, {"window": (5, 2)}),
        ({"window_size": (5, 5), "is_causal": True}, {"window": (5, 0), "causal": True}),
        ({"window_size": -1, "is_causal": True}, {"causal": True}),
        ({"attn_mask": 3 * torch.rand(37, 63)}, {"score_bias": 1}),
    ],
)
def test_windows_and_biases(qkv, theirs, ours):
    if "score_bias" in ours:
        ours = {"score_bias": theirs["attn_mask"][None, None]}
    found = attention_forward(*qkv, *["b s n d"] * 4, **theirs)
    torch.testing.assert_close(found, attention(*qkv, **ours))
    assert not torch.allclose(found, attention(*qkv))


def test_flex_and_changed_scores(qkv):
    patterns = ["b s n d"] * 4
    mask = torch.rand(37, 63) < 0.7
    found = attention_forward(*qkv, *patterns, use_flex=True, attn_mask=mask)
    torch.testing.assert_close(found, attention(*qkv, mask=mask[None, None]))

    def slope(score, b, n, q, k):
        return score + 0.1 * n * (k - q)

    bias = 0.1 * torch.arange(6)[:, None, None] * (torch.arange(63)[None, :] - torch.arange(37)[:, None])
    found = attention_forward(*qkv, *patterns, score_mod=slope, scale=0.2)
    torch.testing.assert_close(found, attention(*qkv, score_bias=bias[None], scale=0.2))
    with pytest.raises(ValueError, match="compatibility_mode=True"):
        attention_forward(*qkv, *patterns, score_mod=slope, compatibility_mode=True)
    with pytest.raises(Refused, match="score_mod: flex refuses this call: on the CPU it has no gradients"):
        attention_forward(qkv[0].requires_grad_(), *qkv[1:], *patterns, score_mod=slope)


def test_functions_by_name(qkv):
    equal = tuple(tensor.transpose(1, 2) for tensor in (qkv[1], qkv[1], qkv[2]))
    found = named.torch_sdpa_sliding_window(*equal, 4, scale=0.3)
    torch.testing.assert_close(found.transpose(1, 2), attention(*qkv[1:2], *qkv[1:], scale=0.3, window=(4, 4)))
    for function in ("flash_attention_2", "flash_attention_3", "flash_attention_4", "sage_attention"):
        with pytest.raises(Refused, match=f"'{function}' refuses this call: tensors are on cpu"):
            getattr(named, function)(*equal)
    with pytest.raises(Refused, match="'xformers' refuses this call: tensors are on cpu"):
        named.xformers_attention(*equal)
    torch.testing.assert_close(named.flex_attention(*equal, scale=0.3), attention_forward(*equal, scale=0.3))


@pytest.mark.parametrize("name", ["q_pattern", "k_pattern", "v_pattern", "out_pattern"])
def test_a_pattern_of_other_axes(qkv, name):
    patterns = dict.fromkeys(("q_pattern", "k_pattern", "v_pattern", "out_pattern"), "b s n d")
    with pytest.raises(ValueError, match=f"{name}='b h s d': expected the axes b, s, n and d"):
        attention_forward(*qkv, **{**patterns, name: "b h s d"})


def test_tensors_that_do_not_fit_their_pattern(qkv):
    joined = [rearrange(tensor, "b s n d -> b s (n d)") for tensor in qkv]
    for dims in (None, {"n": 7}):
        with pytest.raises(ValueError, match=r"shape \(2, 37, 78\) as 'b s \(n d\)', dims="):
            attention_forward(*joined, *["b s (n d)"] * 4, dims=dims)
