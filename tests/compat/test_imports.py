"""Every import of older scripts and manuals: it works, or its error says what takes its place."""

import importlib
import re
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[1] / "data" / "imports.tsv"
"""Module, name, and how many of the older system's example scripts and English pages import it."""

ROWS = [
    tuple(line.split("\t")[:2]) for line in TABLE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
]

ABSENT = {
    "diffsynth.configs": {"MODEL_CONFIGS"},
    "diffsynth.core": {"OffloadTrainingManager"},
    "diffsynth.core.quant": {
        *("BackendConfig", "QUANT_BACKENDS", "QUANT_METHODS", "QuantBackend"),
        *("backends", "check_backend_contract", "check_differentiable", "describe_quant_method"),
        *("register_quant_backend", "register_quant_method"),
    },
    "diffsynth.diffusion": {
        *("*", "DiffusionTrainingModule", "FlowMatchSFTLoss", "FlowMatchScheduler", "ModelLogger"),
        "launch_training_task",
    },
    "diffsynth.diffusion.base_pipeline": {"BasePipeline", "PipelineUnit"},
    "diffsynth.diffusion.template": {"TemplatePipeline", "load_template_model"},
    "diffsynth.metrics": {
        *("AestheticMetric", "FIDMetric", "PickScoreMetric", "QwenImageBenchMetric", "UnifiedRewardEditMetric"),
    },
    "diffsynth.models.flux2_vae": {"Flux2VAE"},
    "diffsynth.models.general_modules": {"TimestepEmbeddings"},
    "diffsynth.models.model_loader": {"ModelPool"},
    "diffsynth.models.qwen_image_controlnet": {"QwenImageBlockWiseControlNet"},
    "diffsynth.models.qwen_image_dit": {"QwenImageDiT", "RMSNorm"},
    "diffsynth.models.qwen_image_text_encoder": {"QwenImageTextEncoder"},
    "diffsynth.models.z_image_text_encoder": {"ZImageTextEncoder"},
    "diffsynth.pipelines.flux2_image": {"model_fn_flux2"},
    "diffsynth.pipelines.qwen_image": {"FlowMatchScheduler"},
    "diffsynth.pipelines.wan_video": {"WanVideoUnit_S2V"},
    "diffsynth.utils.data.audio": {"save_audio"},
    "diffsynth.utils.data.audio_video": {"read_video_audio", "write_video_audio"},
    "diffsynth.utils.quant.serialization": {"save_quantized_model"},
    "diffsynth.utils.ses": {"ses_search"},
    "diffsynth.utils.state_dict_converters.qwen_image_text_encoder": {"QwenImageTextEncoderStateDictConverter"},
}
"""Module -> its names that raise; all others work. A name that arrives is removed here."""


@pytest.mark.parametrize(("module", "name"), ROWS)
def test_an_import_of_older_scripts(module, name):
    code = f"import {module}" if name == "-" else f"from {module} import {name}"
    if name not in ABSENT.get(module, ()):
        exec(code, {})
        return
    with pytest.raises(ImportError) as caught:
        exec(code, {})
    assert re.search(r"yet: it comes with .+, in a later version|here: use .+", str(caught.value))
    assert name in str(caught.value)
    assert module in str(caught.value)


def test_every_absent_name_is_in_the_table():
    assert {(module, name) for module, names in ABSENT.items() for name in names} <= set(ROWS)


@pytest.mark.parametrize("module", [module for module in ABSENT if module != "diffsynth.pipelines.wan_video"])
def test_what_is_absent_is_not_listed(module):
    door = importlib.import_module(module)
    assert not ABSENT[module] & set(dir(door))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = door.Nothing
