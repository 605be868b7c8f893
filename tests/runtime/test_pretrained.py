import torch

from diffsynth.runtime.pretrained import PretrainedLoader
from diffsynth.runtime.role import Role


def test_a_pipeline_whose_roles_are_all_optional_may_get_no_file():
    """Reading ahead paired each component with the next one. With no component at all the pairs did not fit."""
    loader = PretrainedLoader({"dit": Role(architectures=("any",), optional=True)}, "Toy")
    assert loader.load([], {}, dtype=torch.float32, device="cpu") == ({}, {})
