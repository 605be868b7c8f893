"""Features: cuts of conditions, and the roles that a feature uses in a step."""

import pytest
import torch

from diffsynth.errors import InvalidPipeline
from diffsynth.runtime.feature import Condition, Feature, StepContext, frames, in_window, whole
from diffsynth.sampling.windows import Window

CLIP = torch.arange(7.0).view(1, 1, 7, 1, 1)


def test_cuts():
    window = Window(2, 5)
    assert whole(CLIP, window) is CLIP
    assert frames()(CLIP, window).flatten().tolist() == [2, 3, 4]
    assert frames()(CLIP[:, :, :1], window) is None

    class Path:
        def in_window(self, window):
            return window.start

    assert in_window(Path(), window) == 2


def test_a_condition_without_a_cut_has_a_reason():
    with pytest.raises(InvalidPipeline, match="expected a function, or the reason"):
        Condition(cut="")
    with pytest.raises(InvalidPipeline, match="batch='piled'.*expected 'stack' or 'separate'"):
        Condition(batch="piled")
    assert isinstance(Condition().cut, str)


def test_the_roles_of_a_step():
    """By default all loop roles, in calls that set one of the conditions."""
    feature = Feature("control", loop_roles=("controlnet",), conditions={"hints": Condition()})
    step = StepContext(0.5, 2, 4)
    assert step.progress == 0.5
    assert feature.roles_in(step, {"hints": object()}) == ("controlnet",)
    assert feature.roles_in(step, {"hints": None}) == feature.roles_in(step, {}) == ()
    early = Feature("control", loop_roles=("a",), roles_at=lambda step, values: ("a",) if step.progress < 0.5 else ())
    assert [early.roles_in(StepContext(0.5, index, 4), {}) for index in (1, 2)] == [("a",), ()]


def test_a_feature_names_its_plugin():
    assert Feature("blur").title == "feature 'blur'"
    assert Feature("blur", provider="soft (diffsynth-soft)").title == "feature 'blur' of plugin soft (diffsynth-soft)"
