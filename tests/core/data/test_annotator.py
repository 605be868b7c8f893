import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data.annotator import Annotator, canny
from diffsynth.errors import Unavailable


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


def test_annotators_that_are_not_there():
    with pytest.raises(Unavailable, match=r"Annotator\('depth'\) needs a network"):
        Annotator("depth")
    with pytest.raises(ValueError, match="'cany' is unknown; did you mean 'canny'"):
        Annotator("cany")
