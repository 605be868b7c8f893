"""Copies of pipelines, and pickled ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import diffsynth
from diffsynth.runtime.cascade import Cascade, CascadeStage

CALL = {"height": 32, "width": 32, "num_inference_steps": 1, "seed": 0, "cfg_scale": 1.0, "output_type": "tensor"}


@pytest.fixture(scope="module")
def pipe():
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_with_its_weights_is_independent(pipe, duplicate):
    expected, made = pipe("a red apple", **CALL), duplicate(pipe)
    assert (made.model_name, made.dtype, made.device) == (pipe.model_name, pipe.dtype, pipe.device)
    assert str(made.__signature__) == str(pipe.__signature__)
    assert made.component_files == pipe.component_files
    assert torch.equal(made("a red apple", **CALL), expected)
    for parameter in made.dit.parameters():
        parameter.zero_()
    assert torch.equal(pipe("a red apple", **CALL), expected)


def test_a_shallow_copy_shares_the_components(pipe):
    made = copy.copy(pipe)
    assert made is not pipe
    assert made.components == pipe.components
    assert torch.equal(made("a red apple", **CALL), pipe("a red apple", **CALL))


def test_a_pipeline_under_a_policy_says_what_to_do_instead():
    pipe = diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32, policy="disk")
    for duplicate in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"dit.* is under a memory policy.*ZImagePipeline\.from_components"):
            duplicate(pipe)
    with pytest.raises(TypeError, match="is wrapped, and a copy, also a pickled one"):
        pickle.dumps(pipe.dit)
    assert copy.copy(pipe).dit is pipe.dit


def test_a_cascade_can_be_copied(pipe):
    cascade = Cascade(CascadeStage("base", pipe, arguments=CALL))
    made = pickle.loads(pickle.dumps(copy.deepcopy(cascade)))
    assert torch.equal(made("a red apple"), cascade("a red apple"))
