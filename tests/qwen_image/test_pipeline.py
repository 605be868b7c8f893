"""QwenImagePipeline: calls that are refused."""

from __future__ import annotations

import pytest

from qwen_image_oracles import tiny_pipelines


def test_calls_that_do_not_fit_are_refused() -> None:
    pipe, _ = tiny_pipelines()
    with pytest.raises(ValueError, match="sigmas has 2 noise levels and num_inference_steps is 30; pass num_infer"):
        pipe.check(prompt="a", sigmas=[1.0, 0.5])
    pipe.check(prompt="a", sigmas=[1.0, 0.5], num_inference_steps=2)
