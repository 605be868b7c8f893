"""Our distributions pass the conformance suite for third-party plugins."""

from diffsynth.testing import conformance
from source_tree import SOURCES

test_core = conformance("diffsynth-core")
test_flux = conformance("diffsynth-flux")
test_qwen_image = conformance("diffsynth-qwen-image")
test_train = conformance("diffsynth-train")
test_wan = conformance("diffsynth-wan")
test_zimage = conformance("diffsynth-zimage")


def test_each_of_our_packages_has_its_line():
    tested = {
        f"diffsynth_{name.removeprefix('test_')}" for name, value in globals().items() if name.startswith("test_")
    }
    assert {"diffsynth_core" if name == "diffsynth" else name for name in SOURCES} <= tested
