"""What the wheels hold."""

import subprocess
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_embedded_model_is_in_its_wheel(tmp_path):
    command = ["uv", "build", "--quiet", "--wheel", "--out-dir", str(tmp_path), str(ROOT / "packages/diffsynth-zimage")]
    subprocess.run(command, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/nano/" in name}
    assert names >= {"dit.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer.json"}
