import sys
import types
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from diffsynth.core.data.annotator import DETECTORS, Annotator, canny
from diffsynth.errors import NoFiles, Unavailable


def of_array(array: np.ndarray) -> Image.Image:
    return Image.fromarray(array.astype(np.uint8))


def lines(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    assert set(np.unique(array)) <= {0, 255}
    assert (array == array[:, :, :1]).all()
    return array[:, :, 0] > 0


@pytest.mark.parametrize("axis", [0, 1])
def test_a_step_is_one_straight_line(axis):
    array = np.zeros((21, 33))
    array[(slice(None),) * axis + (slice(10, None),)] = 200
    found = lines(canny(of_array(array)))
    assert found.sum() == array.shape[1 - axis]
    assert found.any(axis=1 - axis).sum() == 1


def test_a_slope_is_a_connected_diagonal():
    row, column = np.mgrid[:30, :30]
    found = lines(canny(of_array((row > column) * 200)))
    assert found.any(axis=1)[1:-1].all()
    assert np.abs(np.argwhere(found) @ [1, -1]).max() <= 1


def test_a_weak_edge_counts_only_where_it_leads_to_a_strong_one():
    """Levels fall along the edge: strong at the top, weak below, and the weak island beside it stays dark."""
    array = np.zeros((40, 60))
    array[:, 20:40] = np.linspace(90, 30, 40)[:, None]
    array[15:25, 50:55] = 30
    found = lines(canny(of_array(array), low=100, high=300))
    assert found[:, 18:42].any(axis=1).all()
    assert not found[10:30, 45:].any()
    assert not lines(canny(of_array(array), low=100, high=1000)).any()


def test_nothing_in_nothing():
    assert not lines(canny(Image.new("RGB", (7, 5), (90, 90, 90)))).any()
    assert canny(Image.new("RGB", (1, 1))).size == (1, 1)
    with pytest.raises(ValueError, match="low=3 is above high=2"):
        canny(Image.new("RGB", (4, 4)), low=3, high=2)


def test_annotator(tmp_path):
    array = np.zeros((20, 30))
    array[:, 15:] = 255
    image = of_array(array)
    for kind in ("tile", "none", "inpaint"):
        assert Annotator(kind)(image) == image.convert("RGB")
    assert Annotator("depth", skip_processor=True)(image) == image.convert("RGB")
    assert Annotator("canny")(image) == canny(image)
    resized = Annotator("canny", detect_resolution=40)(image)
    assert resized.size == image.size
    assert np.asarray(resized).max() > 0


@pytest.mark.parametrize("blur", [0, 1, 3])
def test_canny_equals_that_of_opencv(blur):
    cv2 = pytest.importorskip("cv2", reason="the edges are compared with those of OpenCV")
    levels = np.random.default_rng(blur).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(levels).filter(ImageFilter.GaussianBlur(blur))
    for low, high in ((100, 200), (30, 90), (0, 10)):
        expected = cv2.Canny(np.ascontiguousarray(np.asarray(image)), low, high) > 0
        assert np.array_equal(lines(canny(image, low, high)), expected)


def test_the_channel_with_the_largest_gradient_counts():
    """An edge between two colours of one grey level."""
    array = np.zeros((20, 30, 3))
    array[:, :15, 0], array[:, 15:, 1] = 200, 102
    image = of_array(array)
    assert np.ptp(np.asarray(image.convert("L")).astype(int)) <= 1
    assert lines(canny(image)).sum() == 20


class Detector:
    """Stands for the networks of `controlnet_aux`: returns the inverted image, half as large, and records its calls."""

    calls: ClassVar[list] = []

    def __init__(self, path):
        self.path = path

    @classmethod
    def from_pretrained(cls, path):
        return cls(path)

    def to(self, device):
        self.device = device

    def __call__(self, image, **options):
        self.calls.append((type(self).__name__, self.path, self.device, options))
        return ImageOps.invert(image).resize((image.width // 2, image.height // 2))


def install(monkeypatch, detector: type) -> None:
    """Put a library `controlnet_aux` in place whose classes all derive from `detector`."""
    module = types.ModuleType("controlnet_aux.processor")
    for name in DETECTORS.values():
        setattr(module, name, type(name, (detector,), {}))
    monkeypatch.setitem(sys.modules, "controlnet_aux", types.ModuleType("controlnet_aux"))
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", module)


@pytest.mark.parametrize("kind", DETECTORS)
def test_networks_are_those_of_the_library(kind, monkeypatch):
    """The class, its folder, its device, both resolutions, and for poses all of their parts."""
    install(monkeypatch, Detector)
    monkeypatch.setattr(Detector, "calls", [])
    image = Image.new("RGB", (64, 40), (255, 0, 0))
    annotator = Annotator(kind, model_path="folder", detect_resolution=96, device="meta")
    found = annotator(image)
    assert (found.size, found.mode, found.getpixel((5, 5))) == ((64, 40), "RGB", (0, 255, 255))
    annotator.to("cpu")
    Annotator(kind)(image, mask=None)
    parts = {"include_body": True, "include_hand": True, "include_face": True} if kind == "openpose" else {}
    assert Detector.calls == [
        (DETECTORS[kind], "folder", "meta", {"detect_resolution": 96, "image_resolution": 64, **parts}),
        (DETECTORS[kind], "models/Annotators", "cpu", {"detect_resolution": 64, "image_resolution": 64, **parts}),
    ]
    assert annotator.detector.device == "cpu"


@pytest.mark.parametrize("broken", [None, types.ModuleType("controlnet_aux.processor")])
def test_annotators_that_are_not_there(broken, monkeypatch):
    """Without the library, and with one that lacks the class."""
    monkeypatch.setitem(sys.modules, "controlnet_aux", types.ModuleType("controlnet_aux"))
    monkeypatch.setitem(sys.modules, "controlnet_aux.processor", broken)
    with pytest.raises(Unavailable, match=r"Annotator\('depth'\) needs MidasDetector of the library controlnet_aux"):
        Annotator("depth")
    with pytest.raises(Unavailable, match=r"pip install 'diffsynth-core\[annotators\]'"):
        Annotator("openpose")
    with pytest.raises(ValueError, match="'cany' is unknown; did you mean 'canny'"):
        Annotator("cany")


def test_weights_that_are_not_there(monkeypatch):
    class Absent(Detector):
        @classmethod
        def from_pretrained(cls, path):
            raise OSError("no such repository")

    install(monkeypatch, Absent)
    expected = (
        r"cannot be loaded from model_path='models/Annotators' \(OSError: no such repository\)\. Download the repo"
    )
    with pytest.raises(NoFiles, match=expected):
        Annotator("depth")


def test_a_small_image_is_enlarged_for_networks(monkeypatch):
    """They round the sides to multiples of 64, and one below 32 to 0."""
    install(monkeypatch, Detector)
    monkeypatch.setattr(Detector, "calls", [])
    assert Annotator("normal")(Image.new("RGB", (30, 20))).size == (30, 20)
    assert Detector.calls[0][3] == {"detect_resolution": 64, "image_resolution": 64}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Annotator(None), TypeError, "processor_id=None: expected the name of a processor"),
        (lambda: Annotator("canny", detect_resolution=0), ValueError, "detect_resolution=0: expected at least 1 pix"),
        (lambda: Annotator("depth", detect_resolution=32), ValueError, "=32: expected at least 64 pixels, or None"),
        (lambda: Annotator("canny", detect_resolution="512"), TypeError, "='512': expected a whole number of pixels"),
        (lambda: Annotator("canny")("photo.png"), TypeError, r"image='photo.png': expected a PIL image, such as Ima"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
