"""A model hub on loopback for both client libraries, which can drop connections, corrupt files and refuse requests."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c" * 40


@dataclass
class Hub:
    """One repository, `owner/model`.

    Args:
        files: path -> content.
        cut: path -> bytes after which the connection is dropped, once for each entry.
        lies: paths whose content is sent as zeros instead of the announced bytes.
        refuses: HTTP status for every request; 0 serves normally.
        dies: refuse with 503 after the first dropped connection.
        requests: received requests, in order: method, path with query, headers.
    """

    files: dict[str, bytes]
    cut: dict[str, list[int]] = field(default_factory=dict)
    lies: set[str] = field(default_factory=set)
    refuses: int = 0
    dies: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def asked_for(self, path: str) -> list[str]:
        """Return the Range header of each request for a file's content, "" where there was none."""
        return [
            headers.get("range", "")
            for method, url, headers in self.requests
            if method == "GET" and unquote(url).endswith((f"/{path}", f"FilePath={path}"))
        ]


def serve() -> http.server.ThreadingHTTPServer:
    """Start a server for `server.hub` in its own thread; the caller shuts it down.

    One server may serve many hubs, one after the other: client libraries remember the first address they see.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            hub = server.hub
            hub.requests.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
            if hub.refuses:
                return self._json({"Code": hub.refuses, "Message": "refused", "Success": False}, hub.refuses)
            url = urlparse(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            if match := re.fullmatch(r"/owner/model/resolve/[^/]+/(.+)", url.path):
                return self._content(unquote(match[1]))
            if url.path == "/api/v1/models/owner/model/repo":
                return self._content(query["FilePath"])
            if url.path == "/api/v1/models/owner/model/repo/files":
                return self._json({"Code": 200, "Success": True, "Data": {"Files": self._modelscope_listing()}})
            if url.path == "/api/v1/models/owner/model":
                return self._json({"Code": 200, "Success": True, "Data": {"Name": "model"}})
            if url.path.startswith("/api/models/owner/model/tree/"):
                return self._json(self._huggingface_listing())
            if re.fullmatch(r"/api/models/owner/model(/revision/.+)?", url.path):
                siblings = [{"rfilename": path} for path in hub.files]
                return self._json({"id": "owner/model", "modelId": "owner/model", "sha": COMMIT, "siblings": siblings})
            return self._json({"Code": 404, "Message": "not found", "Success": False}, 404)

        do_HEAD = do_POST = do_GET  # noqa: N815

        def _modelscope_listing(self):
            return [
                {
                    "Path": path,
                    "Name": path.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(data),
                    "Sha256": _sha256(data),
                }
                for path, data in server.hub.files.items()
            ]

        def _huggingface_listing(self):
            return [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest(),
                 "lfs": {"oid": _sha256(data), "size": len(data), "pointerSize": 134}}
                for path, data in server.hub.files.items()
            ]  # fmt: skip

        def _json(self, value, status=200):
            self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", "Retry-After": "0"})

        def _content(self, path):
            hub = server.hub
            if path not in hub.files:
                return self._json({"Code": 404, "Message": "not found", "Success": False}, 404)
            whole = hub.files[path]
            headers = {
                "ETag": f'"{_sha256(whole)}"', "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(whole)),
                "X-Linked-Etag": f'"{_sha256(whole)}"', "Accept-Ranges": "bytes",
            }  # fmt: skip
            body = bytes(len(whole)) if path in hub.lies else whole
            status = 200
            if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(match[1]), int(match[2] or len(whole) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(whole)}"
                body, status = body[first : last + 1], 206
            cuts = hub.cut.get(path, [])
            cut = cuts.pop(0) if cuts and self.command == "GET" else None
            return self._send(status, body, headers, cut)

        def _send(self, status, body, headers, cut=None):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(body if cut is None else body[:cut])
            if cut is not None:
                self.wfile.flush()
                server.hub.refuses = 503 if server.hub.dies else 0
                self.close_connection = True

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    return server


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
