"""`examples/host_app.py` on loopback: progress, cancellation, images of concurrent jobs, bad input."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import json
import re
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

import diffsynth
from diffsynth import _discovery, provenance
from diffsynth._discovery import Declared

FILE = Path(__file__).parents[2] / "examples" / "host_app.py"
SMALL = {"height": 32, "width": 32, "num_inference_steps": 2, "cfg_scale": 1.0}
TIMEOUT = 30


def host_app():
    spec = importlib.util.spec_from_file_location("host_app", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


app = host_app()


@pytest.fixture(scope="module")
def pipelines():
    return app.open_models({"nano": "z-image-nano", "again": "z-image-nano"}, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def direct():
    """The same model, loaded with `diffsynth.load`."""
    return diffsynth.load("z-image-nano", device="cpu", torch_dtype=torch.float32)


class Client:
    def __init__(self, studio, port):
        self.studio, self.port = studio, port

    def ask(self, method, path, body=None, **headers):
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        if body is not None and not isinstance(body, bytes):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(content) if is_json else content

    def submit(self, model="nano", **arguments):
        status, job = self.ask("POST", "/jobs", {"model": model, "arguments": {**SMALL, **arguments}})
        assert status == 201, job
        return job["id"]

    def events(self, job_id, after=None):
        """Yield (number, kind, data) of each server-sent event as it arrives."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(after)} if after else {})
        response = connection.getresponse()
        assert response.headers.get_content_type() == "text/event-stream"
        event = {}
        for line in response:
            name, colon, text = line.decode().rstrip("\n").partition(": ")
            if colon and name:
                event[name] = text
            elif event:
                yield int(event["id"]), event["event"], json.loads(event["data"])
                event = {}
        connection.close()

    def image(self, job_id):
        status, content = self.ask("GET", f"/jobs/{job_id}/image.png")
        assert status == 200
        return content

    def wait(self, job_id):
        return list(self.events(job_id))[-1][1]


@contextmanager
def serving(pipelines, **options):
    studio = app.Studio(pipelines, **options)
    server = app.Server(("127.0.0.1", 0), studio)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield Client(studio, server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        studio.close()


@pytest.fixture
def client(pipelines):
    with serving(pipelines, workers=2) as client:
        yield client


def same(png: bytes, image: Image.Image) -> bool:
    found = Image.open(io.BytesIO(png))
    return found.size == image.size and ImageChops.difference(found.convert("RGB"), image).getbbox() is None


def test_models_and_their_schemas(client, pipelines):
    assert client.ask("GET", "/models") == (200, ["nano", "again"])
    status, schema = client.ask("GET", "/models/nano/schema")
    assert (status, schema["title"]) == (200, "nano")
    whole = pipelines["nano"].schema()
    assert set(whole["properties"]) - set(schema["properties"]) == {"num_images", "output_type"}
    assert schema["properties"]["height"] == whole["properties"]["height"]
    assert {"num_images", "on_step", "cancel"} <= set(schema["x-diffsynth-host-only"])


def test_progress_arrives_in_order_and_then_the_image(client, direct):
    job = client.submit(prompt="a red apple", seed=3, num_inference_steps=4)
    events = list(client.events(job))
    assert [number for number, _, _ in events] == list(range(1, 8))
    assert [kind for _, kind, _ in events] == ["queued", "started", "step", "step", "step", "step", "done"]
    assert [data for _, kind, data in events if kind == "step"] == [{"index": i, "of": 4} for i in (1, 2, 3, 4)]
    assert events[-1][2] == {"image": f"/jobs/{job}/image.png"}
    assert same(client.image(job), direct("a red apple", **{**SMALL, "seed": 3, "num_inference_steps": 4}))
    assert client.ask("GET", f"/jobs/{job}")[1]["state"] == "done"
    status, preview = client.ask("GET", f"/jobs/{job}/preview.png?step=4")
    assert status == 200
    assert same(preview, Image.open(io.BytesIO(client.image(job)))), "x0 of the last step is the result"


def test_a_client_that_reconnects_continues_after_its_last_event(client):
    job = client.submit(prompt="a", seed=0)
    assert client.wait(job) == "done"
    assert [kind for _, kind, _ in client.events(job, after=3)] == ["step", "done"]


def test_concurrent_jobs_get_their_own_images(client, direct):
    """Images are bit-equal to those of single calls, though two workers use one text encoder at a time."""
    prompts = ("a red apple", "dog face", "green leaf", "a red apple")
    wanted = [(("nano", "again")[seed % 2], prompt, seed) for seed, prompt in enumerate(prompts)]
    jobs = [client.submit(model, prompt=prompt, seed=seed) for model, prompt, seed in wanted]
    assert [client.wait(job) for job in jobs] == ["done"] * 4
    images = [client.image(job) for job in jobs]
    assert len(set(images)) == 4
    for png, (_, prompt, seed) in zip(images, wanted, strict=True):
        assert same(png, direct(prompt, seed=seed, **SMALL))


def test_cancel_in_the_middle_of_a_run_frees_the_worker(pipelines, direct):
    with serving(pipelines, workers=1) as client:
        job = client.submit(prompt="a", num_inference_steps=2000)
        waiting = client.submit(prompt="b")
        also = client.submit(prompt="a red apple", seed=5)
        events = client.events(job)
        assert [next(events)[1] for _ in range(3)] == ["queued", "started", "step"]
        status, answer = client.ask("DELETE", f"/jobs/{waiting}")
        assert (status, answer["state"]) == (200, "cancelled")  # now: no worker has started it
        assert client.ask("DELETE", f"/jobs/{job}")[0] == 200
        rest = [kind for _, kind, _ in events]
        assert rest[-1] == "cancelled"
        assert len(rest) < 1900
        status, answer = client.ask("GET", f"/jobs/{job}/image.png")
        assert (status, answer["error"]) == (409, f"job {job} is cancelled and has no image")
        assert client.wait(also) == "done"
        assert same(client.image(also), direct("a red apple", seed=5, **SMALL))
        assert client.ask("DELETE", f"/jobs/{also}")[1]["state"] == "done"
        assert [kind for _, kind, _ in client.events(waiting)] == ["queued", "cancelled"]


def test_two_names_of_one_model_share_every_component(pipelines):
    nano, again = pipelines["nano"], pipelines["again"]
    assert nano is not again
    assert all(again.components[role] is part for role, part in nano.components.items())


def test_two_models_share_the_text_encoder(monkeypatch, tmp_path, pipelines):
    """Two models that differ only in the network load the other components once."""
    folder = tmp_path / "Owner" / "Other"
    folder.mkdir(parents=True)
    source = Path(pipelines["nano"].component_files["dit"][0])
    save_file({key: tensor * 0.9 for key, tensor in load_file(source).items()}, folder / "dit.safetensors")
    catalog = _discovery.catalog()
    nano = next(one for one in catalog.models if one.spec.name == "z-image-nano")
    components = {**nano.spec.components, "dit": "Owner/Other:dit.safetensors"}
    other = Declared(dataclasses.replace(nano.spec, name="other", components=components), "toy", "toy", "1.0")
    current = _discovery._current()
    changed = dataclasses.replace(catalog, models=(*catalog.models, other))
    loaded = []
    with monkeypatch.context() as installed:
        installed.setattr(_discovery, "_discovered", dataclasses.replace(current, catalog=changed))
        installed.setenv("DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path))
        installed.setattr(_discovery, "notify", lambda hook, **values: loaded.append(values.get("role")))
        found = app.open_models({"nano": "z-image-nano", "other": "other"}, device="cpu", dtype=torch.float32)
    assert sorted(filter(None, loaded)) == ["dit", "dit", "text_encoder", "vae"]
    assert found["other"].text_encoder is found["nano"].text_encoder
    assert found["other"].tokenizer is found["nano"].tokenizer
    assert found["other"].dit is not found["nano"].dit
    with serving(found, workers=2) as client:
        jobs = [client.submit(model, prompt="a red apple", seed=0) for model in ("nano", "other")]
        assert [client.wait(job) for job in jobs] == ["done", "done"]
        first, second = (Image.open(io.BytesIO(client.image(job))) for job in jobs)
        assert ImageChops.difference(first, second).getbbox() is not None


def test_an_image_has_the_record_of_its_call(client, tmp_path):
    job = client.submit(prompt="a red apple")  # the server chooses the seed
    assert client.wait(job) == "done"
    (tmp_path / "a.png").write_bytes(client.image(job))
    record = provenance.read_png(tmp_path / "a.png")
    assert (record["model"], record["prompt"]) == ("z-image-nano", "a red apple")
    assert record["seed"] == client.ask("GET", f"/jobs/{job}")[1]["seed"]
    assert set(record["weights"]) == {"dit", "text_encoder", "vae", "tokenizer"}


def test_an_input_image(client, direct):
    blue, buffer = Image.new("RGB", (32, 32), "blue"), io.BytesIO()
    blue.save(buffer, format="PNG")
    text = base64.b64encode(buffer.getvalue()).decode()
    job = client.submit(prompt="a", seed=0, input_image=text, denoising_strength=0.5)
    assert client.wait(job) == "done"
    assert same(client.image(job), direct("a", seed=0, input_image=blue, denoising_strength=0.5, **SMALL))


BAD = [
    ({"model": "nano", "arguments": {"promt": "a"}}, "unknown argument 'promt'; did you mean 'prompt'?"),
    ({"model": "nano", "arguments": {"height": -8}}, "height=-8: expected an integer, at least 1"),
    ({"model": "nano", "arguments": {"cfg_scale": float("nan")}}, "cfg_scale=nan: expected a number"),
    ({"model": "nano", "arguments": {"on_step": 1}}, "'on_step' can only be given by a program"),
    ({"model": "nano", "arguments": {"output_type": "tensor"}}, "'output_type' can only be given by a program"),
    ({"model": "nano", "arguments": {"prompt": ["a", "b"]}}, "a job is one image"),
    ({"model": "nano", "arguments": {"height": 10**6}}, "at most 32768"),
    ({"model": "nano", "arguments": {"height": 2**15, "width": 256}}, "generates at most"),
    ({"model": "nano", "arguments": {"input_image": "?"}}, "expected a PNG image in base64"),
    ({"model": "nano", "arguments": [1]}, "expected a JSON object"),
    ({"model": "nan", "arguments": {}}, "there is no model 'nan' here; there are nano, again"),
    ({"model": ["nano"]}, "there is no model ['nano'] here"),
    ({"modle": "nano"}, 'expected {"model": NAME'),
    ([], 'expected {"model": NAME'),
]


@pytest.mark.parametrize(("body", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_bad_input_is_answered_by_400(client, body, message):
    status, answer = client.ask("POST", "/jobs", body)
    assert status == 400
    assert message in answer["error"]
    assert client.studio.jobs == {}


def test_other_refusals(client):
    json_type = {"Content-Type": "application/json"}
    assert client.ask("POST", "/jobs", b"{", **json_type)[0] == 400
    assert client.ask("POST", "/jobs", b"[" * 100_000, **json_type)[0] == 400
    assert client.ask("POST", "/jobs", b"{}")[0] == 415
    assert client.ask("GET", "/jobs/0") == (404, {"error": "there is no job '0'; the last 100 are kept"})
    assert client.ask("GET", "/models/x/schema")[0] == 404
    assert client.ask("GET", "/../etc/passwd")[0] == 404
    assert client.ask("DELETE", "/models") == (405, {"error": "/models takes GET, not DELETE"})
    assert client.ask("GET", "/models", Host="evil.example:80")[0] == 403
    assert client.ask("GET", "/models", Host="localhost:1")[0] == 200
    assert client.wait(client.submit(prompt="still there")) == "done"


def test_a_failed_job_has_an_error_and_frees_its_worker(pipelines, monkeypatch):
    def out_of_memory(*roles, **reads):
        raise RuntimeError("out of memory")

    with serving(pipelines, workers=1) as client:
        with monkeypatch.context() as broken:
            broken.setattr(type(pipelines["nano"].vae), "decode", out_of_memory)
            *_, (_, kind, data) = client.events(client.submit(prompt="a"))
        assert (kind, data) == ("failed", {"error": "RuntimeError: out of memory"})
        assert client.wait(client.submit(prompt="a")) == "done"


def test_a_full_queue_refuses(pipelines):
    with serving(pipelines, workers=1, queue_size=1) as client:
        long = client.submit(prompt="a", num_inference_steps=2000)
        events = client.events(long)
        assert [next(events)[1] for _ in range(2)] == ["queued", "started"]
        client.submit(prompt="b")
        status, answer = client.ask("POST", "/jobs", {"model": "nano"})
        assert (status, answer["error"]) == (503, "1 jobs are queued already; try again later")


def test_a_bug_of_the_server_is_a_500(client, monkeypatch):
    monkeypatch.setattr(client.studio, "job", None)
    assert client.ask("GET", "/jobs/0")[0] == 500
    assert client.ask("GET", "/models")[0] == 200


def test_the_page_requests_existing_routes_only(client):
    status, content = client.ask("GET", "/")
    page = content.decode()
    assert status == 200
    asked = re.findall(r"(?:ask|EventSource)\((?:`([^`]+)`|\"([^\"]+)\")", page)
    paths = {re.sub(r"\$\{.+?\}", "x", one or other) for one, other in asked}
    assert paths == {"/models", "/models/x/schema", "/jobs", "/jobs/x", "/jobs/x/events"}
    for path in paths:
        assert any(pattern.fullmatch(path) for _, pattern, _ in app.Handler.ROUTES), path
    assert "innerHTML" not in page


def test_an_unknown_model_is_refused_before_anything_is_loaded():
    with pytest.raises(diffsynth.errors.UnknownModel, match="did you mean 'z-image-nano'"):
        app.open_models({"nano": "z-image-nan"})
