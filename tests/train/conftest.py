import copy
import csv

import pytest
from PIL import Image

from diffsynth.testing.tiny_processors import byte_tokenizer


@pytest.fixture
def workspace(tmp_path):
    """Write five grey images with captions and a tokenizer; return the folder."""
    with (tmp_path / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "prompt"))
        for level in range(5):
            Image.new("RGB", (32, 32), (50 * level,) * 3).save(tmp_path / f"{level}.png")
            writer.writerow((f"{level}.png", f"grey {level}"))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def autoencoder_recipe(workspace):
    return {
        "pipeline": "diffsynth_zimage.pipeline:ZImagePipeline",
        "objective": {"name": "reconstruction", "crop": 16, "noise": 0.05},
        "components": {"vae": {"architecture": "flux_autoencoder", "train": True, "config": copy.deepcopy(VAE)}},
        "data": {"manifest": str(workspace / "metadata.csv"), "height": 32, "width": 32},
        "loop": {"steps": 4, "batch_size": 3, "precision": "fp32", "log_every": 1},
        "output": {"folder": str(workspace / "autoencoder"), "dtype": "float32"},
    }


@pytest.fixture
def flow_recipe(workspace):
    return {
        "pipeline": "diffsynth_zimage.pipeline:ZImagePipeline",
        "objective": {"name": "flow_match"},
        "components": {
            "vae": {"architecture": "flux_autoencoder", "config": copy.deepcopy(VAE)},
            "text_encoder": {"architecture": "qwen3_text_encoder", "train": True, "config": copy.deepcopy(TEXT)},
            "dit": {"architecture": "z_image_dit", "train": True, "config": copy.deepcopy(DIT), "init": INIT},
        },
        "processors": {"tokenizer": str(workspace / "tokenizer")},
        "data": {
            "manifest": str(workspace / "metadata.csv"),
            "height": 32,
            "width": 32,
            "cache": str(workspace / "cache"),
            "captions": {"templates": ["{caption}", "{article} {caption}"], "drop": 0.2},
        },
        "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2},
        "ema": {"decay": 0.9},
        "loop": {"steps": 6, "batch_size": 3, "precision": "fp32", "log_every": 1, "save_every": 3},
        "output": {"folder": str(workspace / "flow"), "dtype": "float32"},
    }


INIT = "diffsynth_zimage.dit:ZImageDiT.init_weights"
VAE = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1, "norm_groups": 8}
TEXT = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "intermediate_size": 32,
    "vocab_size": 300,
}
DIT = {
    "dim": 64,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [4, 6, 6],
    "cap_feat_dim": 32,
    "time_hidden_dim": 32,
}
