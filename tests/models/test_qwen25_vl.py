"""Qwen25VLTextEncoder equals transformers' Qwen2_5_VLModel, with texts and with images, under the published names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

import parity
from diffsynth import _discovery
from diffsynth.core.loader import component, convert, header, recognize
from diffsynth.core.loader.layouts import layout_of
from diffsynth.models.checkpoints import CHECKPOINTS, QWEN25_VL_TEXT_ENCODER
from diffsynth.models.config import TINY_QWEN25_VL_TEXT_ENCODER as CONFIG
from diffsynth.models.config import Qwen25VLTextEncoderConfig, infer_qwen25_vl_text_encoder_config
from diffsynth.models.qwen25_vl import Qwen25VLTextEncoder, text_and_image_positions, window_order

IMAGE_TOKEN = 119
GRIDS = ((4, 6), (22, 4))
"""The second image has windows at the edge that are smaller than the others."""


def oracle_config() -> Qwen2_5_VLConfig:
    text = {
        "hidden_size": CONFIG.hidden_size,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "intermediate_size": CONFIG.intermediate_size,
        "vocab_size": CONFIG.vocab_size,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": CONFIG.vision_layers,
        "hidden_size": CONFIG.vision_hidden_size,
        "num_heads": CONFIG.vision_heads,
        "intermediate_size": CONFIG.vision_intermediate_size,
        "out_hidden_size": CONFIG.hidden_size,
        "fullatt_block_indexes": list(CONFIG.full_attention_layers),
    }
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN, attn_implementation="eager"
    )


def build_pair() -> tuple[Qwen25VLTextEncoder, Qwen2_5_VLModel]:
    oracle = Qwen2_5_VLModel(oracle_config()).eval()
    weights = parity.draw_weights(parity.shapes_of(oracle))
    oracle.load_state_dict(weights)
    with torch.device("meta"):
        ours = Qwen25VLTextEncoder(CONFIG).eval()
    ours.load_state_dict(
        {name.replace("language_model.", "model.", 1): weight for name, weight in weights.items()}, assign=True
    )
    return ours, oracle


def draw_inputs() -> dict[str, torch.Tensor]:
    """Return two texts, with one image each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(IMAGE_TOKEN, (2, 30), generator=generator)
    ids[0, 4:10] = IMAGE_TOKEN
    ids[1, 2:24] = IMAGE_TOKEN
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(30) < torch.tensor([[17], [30]])).long(),
        "patches": torch.randn(24 + 88, CONFIG.patch_dim, generator=generator),
    }


def run_oracle(oracle: Qwen2_5_VLModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return oracle(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=inputs["patches"],
        image_grid_thw=torch.tensor([(1, *grid) for grid in GRIDS]),
        mm_token_type_ids=(inputs["input_ids"] == IMAGE_TOKEN).int(),
    ).last_hidden_state


def run_ours(ours: Qwen25VLTextEncoder, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return ours(**inputs, grids=GRIDS, image_mask=inputs["input_ids"] == IMAGE_TOKEN)


@torch.no_grad()
def test_texts_equal_transformers() -> None:
    ours, oracle = build_pair()
    ids, mask = (draw_inputs()[name] for name in ("input_ids", "attention_mask"))
    ids = ids.clamp(max=IMAGE_TOKEN - 1)
    truth = oracle(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert parity.relative_error(ours(ids, mask)[mask.bool()], truth) <= parity.TOLERANCE


@torch.no_grad()
def test_texts_with_images_equal_transformers() -> None:
    ours, oracle = build_pair()
    inputs = draw_inputs()
    mask = inputs["attention_mask"].bool()
    truth = run_oracle(oracle, inputs)[mask]
    assert parity.relative_error(run_ours(ours, inputs)[mask], truth) <= parity.TOLERANCE
    assert parity.relative_error(ours(inputs["input_ids"], mask)[mask], truth) > 1e-2


@torch.no_grad()
def test_positions_are_those_of_transformers() -> None:
    _, oracle = build_pair()
    ids = draw_inputs()["input_ids"]
    truth, _ = oracle.get_rope_index(
        ids, (ids == IMAGE_TOKEN).int(), image_grid_thw=torch.tensor([(1, *grid) for grid in GRIDS])
    )
    assert torch.equal(text_and_image_positions(ids == IMAGE_TOKEN, GRIDS, merge_size=2), truth)


def test_every_parameter_matters() -> None:
    _, oracle = build_pair()
    inputs = draw_inputs()
    mask = inputs["attention_mask"].bool()
    assert parity.neutral_parameters(oracle, lambda: run_oracle(oracle, inputs)[mask]) == []


@torch.no_grad()
def test_bf16_is_as_good_as_the_oracles() -> None:
    ours, oracle = build_pair()
    inputs = draw_inputs()
    mask = inputs["attention_mask"].bool()
    truth = run_oracle(oracle, inputs)[mask]
    ours, oracle = ours.bfloat16(), oracle.bfloat16()
    theirs = parity.relative_error(run_oracle(oracle, inputs)[mask], truth)
    assert parity.relative_error(run_ours(ours, inputs)[mask], truth) <= 1.5 * theirs


def test_windows_at_the_edge_are_smaller() -> None:
    order, lengths = window_order((10, 6), merge_size=2, window=2)
    assert lengths.tolist() == [4, 2, 4, 2, 2, 1]
    assert order.tolist() == [0, 1, 3, 4, 2, 5, 6, 7, 9, 10, 8, 11, 12, 13, 14]


def test_images_that_do_not_fit_are_refused() -> None:
    ours, _ = build_pair()
    inputs = draw_inputs()
    mask = inputs["input_ids"] == IMAGE_TOKEN
    with pytest.raises(ValueError, match=r"28 tokens of images; expected 6 for grids=\(\(4, 6\),\)"):
        ours(**inputs, grids=GRIDS[:1], image_mask=mask)
    with pytest.raises(ValueError, match="20 patches; expected 24"):
        ours.encode_images(inputs["patches"][:20], GRIDS[:1])
    with pytest.raises(ValueError, match="patches are given without image_mask"):
        ours(**inputs, grids=GRIDS)


def test_shapes_tell_the_config() -> None:
    with torch.device("meta"):
        shapes = parity.shapes_of(Qwen25VLTextEncoder(CONFIG))
    assert infer_qwen25_vl_text_encoder_config(shapes) == CONFIG
    with pytest.raises(ValueError, match="which Qwen2.5-VL does not have"):
        infer_qwen25_vl_text_encoder_config(shapes | {"model.layers.0.self_attn.q_norm.weight": (16,)})
    with pytest.raises(ValueError, match="a width of 72 with keys of 32 channels"):
        infer_qwen25_vl_text_encoder_config(shapes | {"model.embed_tokens.weight": (120, 72)})
    with pytest.raises(ValueError, match="head_dim=24 must be a multiple of 16"):
        replace(CONFIG, head_dim=24)


@pytest.mark.parametrize("nested", [False, True])
def test_the_published_layout_loads_strictly(nested: bool) -> None:
    (spec,) = (each for each in CHECKPOINTS if each.name == "qwen2.5_vl_text_encoder")
    shapes = layout_of(spec)
    if nested:  # as newer versions of transformers save it
        names = {"model": "model.language_model", "visual": "model.visual", "lm_head": "lm_head"}
        shapes = {names[(part := key.split(".")[0])] + key[len(part) :]: shape for key, shape in shapes.items()}
    tensors = header.Header({key: header.TensorInfo("BF16", tuple(shape)) for key, shape in shapes.items()})
    for tier in ("structure",) if nested else ("signature", "structure"):
        (found,) = recognize.recognize(tensors, *_discovery.catalog().layouts(), tiers=(tier,))
        assert (found.architecture, found.config) == (QWEN25_VL_TEXT_ENCODER, Qwen25VLTextEncoderConfig())
        network = component.build(found.architecture, found.config)
        plan = convert.plan(found.rules, tensors.shapes)
        assert convert.check(plan, parity.shapes_of(network), where="layout") == []
        assert list(network.buffers()) == []
