"""Images from files and URLs, and contact sheets."""

import functools
import http.server
import io
import threading
import time

import pytest
from PIL import Image

from diffsynth.core.data.image import contact_sheet
from diffsynth.core.data.operators import LoadImage
from diffsynth.errors import CorruptFile, DownloadFailed, NoFiles


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
    """Serves /image.png after two failures, and /gone never."""

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
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_url(served):
    url, asked = served
    assert LoadImage()(f"{url}/image.png").size == (3, 2)
    assert len(asked) == 3


def test_url_that_cannot_be_downloaded(served):
    url, asked = served
    with pytest.raises(DownloadFailed, match="in 2 trials"):
        LoadImage(url_max_retries=2)(f"{url}/image.png")
    asked.clear()
    with pytest.raises(DownloadFailed, match="/gone returns 404"):
        LoadImage()(f"{url}/gone")
    assert asked == ["/gone"]


def test_a_contact_sheet_shows_first_and_last(tmp_path, frames):
    sheet = contact_sheet(frames, columns=2, rows=2, width=24, gap=2)
    assert sheet.size == (50, 34)
    greys = [sheet.getpixel(place)[0] for place in ((0, 0), (49, 0), (0, 33), (49, 33), (24, 0))]
    assert greys == [0, 75, 150, 225, 0]
    assert contact_sheet(frames[:1], width=24).size == (24, 16)
    assert contact_sheet(frames[:3], columns=2, width=24, gap=0).size == (48, 32)
    with pytest.raises(ValueError, match="0 frames"):
        contact_sheet([])
    with pytest.raises(ValueError, match="columns=0"):
        contact_sheet(frames, columns=0)
