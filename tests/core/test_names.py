"""`diffsynth.core`: what it offers, what it does not yet, and that looking costs nothing."""

import subprocess
import sys

import pytest

from diffsynth import core

DOCUMENTED = """
attention_forward UnifiedDataset gradient_checkpoint_forward load_state_dict load_state_dict_from_safetensors
load_state_dict_from_bin load_metadata_from_safetensors load_keys_dict hash_state_dict_keys hash_model_file
load_model ModelConfig skip_model_initialization IS_CUDA_AVAILABLE IS_NPU_AVAILABLE get_device_type
get_available_device_type get_device_name parse_device_type parse_nccl_backend get_nccl_backend synchronize
empty_cache get_torch_device get_device_id enable_high_precision_for_bf16 FrameSamplerByRateMixin
ToInt ToFloat ToStr ToList ToAbsolutePath LoadImage LoadVideo LoadGIF LoadAudio LoadAudioWithTorchaudio
LoadPureAudioWithTorchaudio LoadTorchPickle ImageCropAndResize SequencialProcess RouteByExtensionName
RouteByType DataProcessingOperatorRaw DataProcessingOperator DataProcessingPipeline
AutoTorchModule AutoWrappedModule AutoWrappedNonRecurseModule AutoWrappedLinear DiskMap enable_vram_management
enable_vram_management_recursively fill_vram_config load_model_with_disk_offload
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_loads_no_torch():
    run("import diffsynth.core, sys; dir(diffsynth.core); assert 'torch' not in sys.modules")


def test_a_light_name_loads_no_torch():
    run("from diffsynth.core import ModelConfig; import sys; assert 'torch' not in sys.modules")


def test_devices_are_not_probed_at_import():
    code = (
        "import torch; torch.cuda.is_available = lambda: asked.append(1) or True; asked = []; import diffsynth.core\n"
    )
    code += "from diffsynth.core import get_device_type, load_model, UnifiedDataset; assert not asked\n"
    run(code + "assert diffsynth.core.IS_CUDA_AVAILABLE and asked")


def test_the_documented_names_are_there():
    assert set(DOCUMENTED.split()) <= set(core.__all__) <= set(dir(core))
    names: dict = {}
    exec("from diffsynth.core import *", names)
    assert set(core.__all__) <= set(names)


def test_one_object_by_every_way():
    import diffsynth
    from diffsynth.core.attention import attention_forward
    from diffsynth.core.data.operators import LoadImage
    from diffsynth.core.gradient import gradient_checkpoint_forward
    from diffsynth.core.loader import hash_model_file, load_model

    assert core.ModelConfig is diffsynth.ModelConfig
    assert (attention_forward, hash_model_file) == (core.attention_forward, core.hash_model_file)
    assert load_model is core.load_model
    assert core.LoadImage is LoadImage
    assert core.gradient_checkpoint_forward is gradient_checkpoint_forward


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("AutoWrappedQuantizedModule", "more of quantization"),
        ("QuantBackend", "more of quantization"),
        ("OffloadTrainingManager", "offloaded training"),
    ],
)
def test_what_comes_later_says_so(name, part):
    text = f"no '{name}' yet: it comes with {part}"
    with pytest.raises(ImportError, match=text):
        getattr(core, name)
    with pytest.raises(ImportError, match=text):
        exec(f"from diffsynth.core import {name}", {})
    assert name not in core.__all__
    assert name not in dir(core)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'load_mdoel'"):
        _ = core.load_mdoel
