import functools
import http.server
import io
import threading

import numpy as np
import pytest
from PIL import Image

from diffsynth.core.data import image as module
from diffsynth.core.data.operators import ImageCropAndResize, LoadImage
from diffsynth.errors import CorruptFile, DownloadFailed, NoFiles


@pytest.mark.parametrize(
    ("size", "settings", "expected"),
    [
        ((100, 50), {"height": 32, "width": 48}, (48, 32)),
        ((100, 50), {"max_pixels": 10_000, "height_division_factor": 16, "width_division_factor": 16}, (96, 48)),
        ((100, 50), {"max_pixels": 1250}, (50, 25)),
        ((100, 50), {"max_pixels": 1250, "height_division_factor": 8, "width_division_factor": 16}, (48, 24)),
        ((3, 5), {}, (3, 5)),
    ],
)
def test_sizes(size, settings, expected):
    assert ImageCropAndResize(**settings)(Image.new("RGB", size)).size == expected


def test_the_centre_is_kept_and_nothing_is_stretched():
    picture = np.zeros((40, 80), dtype=np.uint8)
    picture[:, 20:60] = 255
    found = np.asarray(ImageCropAndResize(height=20, width=20)(Image.fromarray(picture)))
    assert found[:, 1:-1].min() == 255
    found = np.asarray(ImageCropAndResize(height=20, width=40)(Image.fromarray(picture)))
    assert abs(int((found > 127).sum(axis=1)[0]) - 20) <= 1


def test_unfit_sizes():
    with pytest.raises(ValueError, match="height=8 and width=None"):
        ImageCropAndResize(height=8)
    with pytest.raises(ValueError, match="10x10 pixels is smaller than the factors 16x16"):
        ImageCropAndResize(height_division_factor=16, width_division_factor=16)(Image.new("RGB", (10, 10)))


@pytest.mark.parametrize(
    ("settings", "mode"), [({}, "RGB"), ({"convert_RGBA": True}, "RGBA"), ({"convert_RGB": False}, "LA")]
)
def test_modes(tmp_path, settings, mode):
    Image.new("LA", (4, 4), (90, 10)).save(tmp_path / "a.png")
    assert LoadImage(**settings)(tmp_path / "a.png").mode == mode


def test_no_image(tmp_path):
    (tmp_path / "a.png").write_text("text")
    for name, error, message in [
        ("gone.png", NoFiles, "gone.png does not exist"),
        ("", NoFiles, "is a folder"),
        ("a.png", CorruptFile, "a.png is not an image"),
    ]:
        with pytest.raises(error, match=message):
            LoadImage()(str(tmp_path / name))


class Server(http.server.BaseHTTPRequestHandler):
    """/image.png after two failures, /gone never."""

    def __init__(self, asked, *args):
        self.asked = asked
        super().__init__(*args)

    def do_GET(self):
        self.asked.append(self.path)
        status = 404 if self.path == "/gone" else 503 if len(self.asked) < 3 else 200
        self.send_response(status)
        self.end_headers()
        if status == 200:
            data = io.BytesIO()
            Image.new("RGB", (3, 2)).save(data, "png")
            self.wfile.write(data.getvalue())

    def log_message(self, *args):
        pass


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_address(served):
    address, asked = served
    assert LoadImage()(f"{address}/image.png").size == (3, 2)
    assert len(asked) == 3


def test_address_that_does_not_answer(served):
    address, asked = served
    with pytest.raises(DownloadFailed, match="did not answer in 2 trials"):
        LoadImage(url_max_retries=2)(f"{address}/image.png")
    asked.clear()
    with pytest.raises(DownloadFailed, match="/gone answers 404"):
        LoadImage()(f"{address}/gone")
    assert asked == ["/gone"]
