"""Import lines of existing scripts."""

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_door_leads_to_the_family():
    from diffsynth.pipelines.z_image import ModelConfig, ZImagePipeline

    import diffsynth
    import diffsynth_zimage

    assert ZImagePipeline is diffsynth_zimage.ZImagePipeline
    assert ModelConfig is diffsynth.ModelConfig


def test_finding_the_doors_imports_no_family():
    result = run(
        "import diffsynth.pipelines, sys; assert 'torch' not in sys.modules; print(*diffsynth.pipelines.__path__)"
    )
    assert result.returncode == 0, result.stderr
    assert "diffsynth_zimage" in result.stdout


def test_a_door_that_nobody_offers():
    result = run("import diffsynth.pipelines.no_such_family")
    assert "No module named 'diffsynth.pipelines.no_such_family'" in result.stderr
