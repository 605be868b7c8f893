"""A small image generation server, as an example of an application that uses pipelines.

    python examples/host_app.py                                   z-image-nano, on http://127.0.0.1:8000
    python examples/host_app.py turbo=z-image-turbo base=z-image  two models that share text encoder and autoencoder

    GET    /                       a web page that builds its form from the schema
    GET    /models                 names of the models
    GET    /models/NAME/schema     JSON Schema of the arguments of a job
    POST   /jobs                   {"model": NAME, "arguments": {...}} -> {"id": ..., "state": "queued", ...}
    GET    /jobs/ID                state
    GET    /jobs/ID/events         server-sent events: queued, started, step (one each), done | failed | cancelled
    DELETE /jobs/ID                cancel a queued or running job
    GET    /jobs/ID/preview.png    a small image of the last step
    GET    /jobs/ID/image.png      the image, with the record of the call

Each request is answered in a thread of its own; jobs are queued and run by workers. There is no login, so the server
listens on the loopback interface by default. Nothing here is specific to a model.
"""

from __future__ import annotations

import argparse
import io
import ipaddress
import json
import logging
import queue
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffsynth import ModelConfig, Pipeline, provenance, registry
from diffsynth.core.device import default_device
from diffsynth.core.progress import OnProgress, Progress, reporting
from diffsynth.errors import Cancelled, DiffsynthError, PipelineError
from diffsynth.runtime.pretrained import PretrainedLoader
from diffsynth.runtime.progress import no_progress
from diffsynth.runtime.request import Step
from diffsynth.runtime.schema import HOST_ONLY, arguments_from_json
from diffsynth.spec import resolve

logger = logging.getLogger(__name__)

PAGE = Path(__file__).with_suffix(".html")
ENDS = ("done", "failed", "cancelled")
FIXED = {"num_images": 1, "output_type": "pil"}
"""Arguments that callers cannot set, because a job is one image."""

MAX_BODY = 32 * 2**20
MAX_PIXELS = 2048 * 2048
KEPT_JOBS = 100
HEARTBEAT = 15.0


class Refusal(Exception):
    """An error response: an HTTP status and a message for the client."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def open_models(
    models: Mapping[str, str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    on_progress: OnProgress | None = None,
) -> dict[str, Pipeline]:
    """Return pipelines by name. A component that several models take from one source is loaded once and shared.

    Args:
        models: name on this server -> a model's name or hub id.
        device: the device that computes; None picks the first accelerator, else the CPU.
        dtype: of weights and activations.
        on_progress: called while files are downloaded and read.
    """
    device = default_device() if device is None else device
    components: dict[tuple[str, str], Any] = {}
    files: dict[tuple[str, str], list[Path]] = {}
    pipelines = {}
    for name, model in models.items():
        record = registry.get(model)
        cls: type[Pipeline] = resolve(record.pipeline)
        keys = {role: (role, source) for role, source in {**record.components, **record.processors}.items()}
        missing = {role: ModelConfig.from_source(key[1]) for role, key in keys.items() if key not in components}
        if missing:
            weights = [config for role, config in missing.items() if role in record.components]
            processors = {f"{role}_config": config for role, config in missing.items() if role in record.processors}
            loader = PretrainedLoader({role: cls.roles[role] for role in missing}, cls.__name__)
            with reporting(on_progress):
                loaded, read = loader.load(weights, processors, dtype=dtype, device=device)
            components |= {keys[role]: part for role, part in loaded.items()}
            files |= {keys[role]: paths for role, paths in read.items()}
        pipelines[name] = cls(
            {role: components[key] for role, key in keys.items()},
            device=device,
            torch_dtype=dtype,
            component_files={role: files[key] for role, key in keys.items()},
        ).named(record.name, record.defaults)
    return pipelines


class Job:
    """A job for one image, and its events; safe to use from several threads."""

    def __init__(self, model: str, arguments: dict[str, Any]) -> None:
        self.id = secrets.token_hex(8)
        self.model = model
        self.arguments = arguments
        self.cancelled = threading.Event()
        self.png = b""
        self.preview = b""
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._changed = threading.Condition()
        self.add("queued")

    @property
    def state(self) -> str:
        """The state: "queued", "started", or one of `ENDS`."""
        return next(kind for kind, _ in reversed(self.events) if kind != "step")

    def add(self, kind: str, **data: Any) -> bool:
        """Append an event and notify the threads that follow the job; return False if it has ended already."""
        with self._changed:
            if self.events and self.state in ENDS:
                return False
            self.events.append((kind, data))
            self._changed.notify_all()
            return True

    def cancel(self) -> None:
        """Cancel the job: a queued one ends now, a running one at its next step."""
        self.cancelled.set()
        with self._changed:
            is_queued = self.state == "queued"
        # A worker that starts the job between these lines sees that `cancelled` is set.
        if is_queued:
            self.add("cancelled")

    def follow(self, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]] | None]:
        """Yield events after a number as they arrive, until the job ends; None as a heartbeat while there are none."""
        while True:
            with self._changed:
                if len(self.events) <= after and self.state not in ENDS:
                    self._changed.wait(HEARTBEAT)
                new, ended = self.events[after:], self.state in ENDS
            for kind, data in new:
                after += 1
                yield after, kind, data
            if ended:
                return
            if not new:
                yield None

    def to_dict(self) -> dict[str, Any]:
        """Return the job as JSON values for clients."""
        kind, data = self.events[-1]
        return {"id": self.id, "model": self.model, "state": self.state, "seed": self.arguments["seed"]} | (
            {kind: data} if data else {}
        )


class Studio:
    """Pipelines, a queue of jobs, and the workers that run them.

    Args:
        pipelines: by name; they may share components, because calls do not change them.
        workers: number of jobs that run at once.
        queue_size: maximum number of queued jobs; more are refused.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline], *, workers: int = 1, queue_size: int = 16) -> None:
        self.pipelines = dict(pipelines)
        self.jobs: dict[str, Job] = {}
        self._queue: queue.Queue[Job | None] = queue.Queue(queue_size)
        self._lock = threading.Lock()
        self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def schema(self, model: str) -> dict[str, Any]:
        """Return the schema of a job: that of the pipeline without the arguments in `FIXED`."""
        schema = self._pipeline(model, status=404).schema()
        for name in FIXED:
            if described := schema["properties"].pop(name, None):
                schema[HOST_ONLY][name] = described.get("description", "")
        return schema | {"title": model}

    def submit(self, model: str, values: Any) -> Job:
        """Check the arguments of a job and queue it.

        Raises:
            Refusal, TypeError, ValueError, DiffsynthError: an argument is invalid, or the queue is full.
        """
        pipe = self._pipeline(model, status=400)
        arguments = {**arguments_from_json(self.schema(model), values), **FIXED}
        if arguments.get("seed") is None:
            arguments["seed"] = secrets.randbelow(2**31)
        request = pipe.check(**arguments)
        if request.batch_size != 1 or not request.single:
            raise Refusal(400, "a job is one image: pass one prompt and one seed")
        pixels = request.values.get("height", 1) * request.values.get("width", 1)
        if pixels > MAX_PIXELS:
            raise Refusal(400, f"height times width is {pixels}; this server generates at most {MAX_PIXELS} pixels")
        job = Job(model, arguments)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise Refusal(503, f"{self._queue.maxsize} jobs are queued already; try again later") from None
        with self._lock:
            self.jobs[job.id] = job
            ended = [one.id for one in self.jobs.values() if one.state in ENDS]
            for old in ended[: max(0, len(self.jobs) - KEPT_JOBS)]:
                del self.jobs[old]
        return job

    def job(self, job_id: str) -> Job:
        """Return a job by its id.

        Raises:
            Refusal: no job has this id.
        """
        if job_id not in self.jobs:
            raise Refusal(404, f"there is no job {job_id!r}; the last {KEPT_JOBS} are kept")
        return self.jobs[job_id]

    def close(self) -> None:
        """Cancel all jobs and join the workers."""
        for job in list(self.jobs.values()):
            job.cancel()
        for _ in self._workers:
            self._queue.put(None)
        for worker in self._workers:
            worker.join()

    def _pipeline(self, model: Any, *, status: int) -> Pipeline:
        if not isinstance(model, str) or model not in self.pipelines:
            raise Refusal(status, f"there is no model {model!r} here; there are {', '.join(self.pipelines)}")
        return self.pipelines[model]

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            if job.cancelled.is_set() or not job.add("started"):
                job.add("cancelled")
                continue
            try:
                job.png = self._generate(job)
                job.add("done", image=f"/jobs/{job.id}/image.png")
            except Cancelled:
                job.add("cancelled")
            except Exception as error:  # a failed job must not end its worker
                logger.exception("job %s failed", job.id)
                job.add("failed", error=f"{type(error).__name__}: {error}")

    def _generate(self, job: Job) -> bytes:
        pipe = self.pipelines[job.model]

        def on_step(step: Step) -> None:
            try:
                job.preview = to_png(pipe.decode_preview(step.x0), {})
            except PipelineError:
                logger.debug("%s has no previews", job.model, exc_info=True)
            job.add("step", index=step.index + 1, of=step.num_steps)

        watched = {"on_step": on_step, "cancel": job.cancelled, "progress_bar_cmd": no_progress}
        made = pipe(**job.arguments, **watched, return_record=True)
        return to_png(made.output, made.record)


def to_png(image: Image.Image, made_by: Mapping[str, Any]) -> bytes:
    """Return a PNG file with the record that `diffsynth info FILE.png` reads."""
    text, buffer = PngInfo(), io.BytesIO()
    text.add_itxt(provenance.KEY, json.dumps(made_by, ensure_ascii=False))
    image.save(buffer, format="PNG", pnginfo=text)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Handles the HTTP requests for a `Studio`."""

    server: Server

    ROUTES = (
        ("GET", re.compile(r"/"), "page"),
        ("GET", re.compile(r"/models"), "models"),
        ("GET", re.compile(r"/models/([^/]+)/schema"), "schema"),
        ("POST", re.compile(r"/jobs"), "submit"),
        ("GET", re.compile(r"/jobs/(\w+)"), "state"),
        ("DELETE", re.compile(r"/jobs/(\w+)"), "cancel"),
        ("GET", re.compile(r"/jobs/(\w+)/events"), "events"),
        ("GET", re.compile(r"/jobs/(\w+)/preview\.png"), "preview"),
        ("GET", re.compile(r"/jobs/(\w+)/image\.png"), "image"),
    )

    def answer(self) -> None:
        """Route a request; an exception becomes an error response."""
        try:
            self._check_host()
            self._route()
        except Refusal as refusal:
            self._send_json({"error": str(refusal)}, refusal.status)
        except (BrokenPipeError, ConnectionResetError):
            logger.debug("%s disconnected", self.client_address)
        except Exception:  # a bug of this program: the log has the traceback
            logger.exception("%s %s", self.command, self.path)
            self._send_json({"error": "something went wrong here; see the server's log"}, 500)

    do_GET = do_POST = do_DELETE = answer  # noqa: N815

    def page(self) -> None:
        """Send the web page."""
        self._send(PAGE.read_bytes(), "text/html; charset=utf-8")

    def models(self) -> None:
        """Send the names of the models."""
        self._send_json(list(self.server.studio.pipelines))

    def schema(self, model: str) -> None:
        """Send the schema of a job."""
        self._send_json(self.server.studio.schema(model))

    def submit(self) -> None:
        """Queue a new job."""
        body = self._read_json()
        if not isinstance(body, dict) or not {"model"} <= set(body) <= {"model", "arguments"}:
            raise Refusal(400, 'expected {"model": NAME, "arguments": {...}}')
        try:
            job = self.server.studio.submit(body["model"], body.get("arguments", {}))
        except (DiffsynthError, TypeError, ValueError) as error:
            raise Refusal(400, str(error)) from error
        self._send_json(job.to_dict(), 201)

    def state(self, job_id: str) -> None:
        """Send the state of a job."""
        self._send_json(self.server.studio.job(job_id).to_dict())

    def cancel(self, job_id: str) -> None:
        """Cancel a job; a job that has ended does not change."""
        job = self.server.studio.job(job_id)
        job.cancel()
        self._send_json(job.to_dict())

    def events(self, job_id: str) -> None:
        """Send server-sent events; a client that reconnects continues after its last event."""
        job = self.server.studio.job(job_id)
        seen = self.headers.get("Last-Event-ID", "")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        for event in job.follow(int(seen) if seen.isdecimal() else 0):
            text = ": still here\n\n" if event is None else _as_event(*event)
            self.wfile.write(text.encode())
            self.wfile.flush()

    def preview(self, job_id: str) -> None:
        """Send a small image of the last step."""
        job = self.server.studio.job(job_id)
        if not job.preview:
            raise Refusal(409, f"job {job_id} is {job.state} and has no preview")
        self._send(job.preview, "image/png")

    def image(self, job_id: str) -> None:
        """Send the image of a job that is done."""
        job = self.server.studio.job(job_id)
        if job.state != "done":
            raise Refusal(409, f"job {job_id} is {job.state} and has no image")
        self._send(job.png, "image/png")

    def log_message(self, format: str, *values: Any) -> None:
        """Log requests instead of writing them to stderr."""
        logger.debug(format, *values)

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        allowed = []
        for method, pattern, name in self.ROUTES:
            if match := pattern.fullmatch(path):
                if method == self.command:
                    return getattr(self, name)(*match.groups())
                allowed.append(method)
        if allowed:
            raise Refusal(405, f"{path} takes {' and '.join(allowed)}, not {self.command}")
        raise Refusal(404, f"there is nothing at {path}")

    def _check_host(self) -> None:
        # DNS rebinding: another site may resolve its own name to this server, but its requests carry that name.
        name = urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""
        if _is_loopback(self.server.server_address[0]) and not _is_loopback(name):
            raise Refusal(403, f"this server accepts requests from its own machine only; Host was {name!r}")

    def _read_json(self) -> Any:
        if self.headers.get_content_type() != "application/json":
            raise Refusal(415, "send Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refusal(411, "send Content-Length")
        if int(length) > MAX_BODY:
            raise Refusal(413, f"the body has {length} bytes; at most {MAX_BODY} are accepted")
        try:
            return json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise Refusal(400, f"the body is no JSON: {error}") from None

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value, ensure_ascii=False).encode(), "application/json", status)

    def _send(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """An HTTP server with a thread for each request."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], studio: Studio) -> None:
        super().__init__(address, Handler)
        self.studio = studio


def _as_event(number: int, kind: str, data: Mapping[str, Any]) -> str:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n"


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def print_progress(progress: Progress) -> None:
    """Print how far loading is, on one line."""
    total = "?" if progress.total is None else f"{progress.total / 2**20:.0f}"
    print(f"\r{progress.stage} {progress.description}: {progress.done / 2**20:.0f} of {total} MiB", end="", flush=True)
    if progress.done == progress.total:
        print()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="Generate images over HTTP.")
    parser.add_argument("models", nargs="*", default=["nano=z-image-nano"], metavar="NAME=MODEL")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; there is no login")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=1, help="number of jobs that run at once")
    options = parser.parse_args()
    models = {name: model or name for name, _, model in (text.partition("=") for text in options.models)}
    studio = Studio(open_models(models, device=options.device, on_progress=print_progress), workers=options.workers)
    server = Server((options.host, options.port), studio)
    print(f"http://{options.host}:{server.server_address[1]}")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        studio.close()


if __name__ == "__main__":
    main()
