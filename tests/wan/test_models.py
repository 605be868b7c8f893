"""TeaCache: the models that have coefficients, and the argument of a block that they are fitted to."""

import inspect

from diffsynth_wan.dit import WanBlock
from diffsynth_wan.models import MODELS, TEA_CACHE


def test_four_models_have_coefficients_of_an_argument_that_blocks_take():
    fitted = {model.name: model.tea_cache for model in MODELS if model.tea_cache is not None}
    assert fitted == TEA_CACHE
    assert len(fitted) == 4
    for spec in fitted.values():
        kind, _, name = spec.signal.partition(":")
        assert kind == "argument"
        assert name in inspect.signature(WanBlock.forward).parameters
        assert len(spec.coefficients) == 5
