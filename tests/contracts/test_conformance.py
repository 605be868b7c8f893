"""Our own distributions pass the suite that we give to strangers."""

from diffsynth.testing import conformance

test_core = conformance("diffsynth-core")
test_flux = conformance("diffsynth-flux")
test_qwen_image = conformance("diffsynth-qwen-image")
test_train = conformance("diffsynth-train")
test_wan = conformance("diffsynth-wan")
test_zimage = conformance("diffsynth-zimage")
