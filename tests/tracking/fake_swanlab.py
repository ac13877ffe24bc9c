"""A SwanLab server on loopback that takes what the client sends and keeps it; `with serving() as server:`."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

KEY = "0123456789abcdefghijk"


class Server(http.server.ThreadingHTTPServer):
    """What it was sent: experiments as they were begun, lines of metrics, profiles, states at the end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.knows_the_key = self.answers = True
        self.wake = threading.Event()
        self.experiments: list[dict] = []
        self.scalars: list[tuple[str, int, float]] = []
        self.profiles: dict[str, Any] = {}
        self.states: list[str] = []
        self.files: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: the client drops its connections at the end of a run."""

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """(status, reply) of a request."""
        if path == "/api/login/api_key":
            user = {"sid": "s", "expiredAt": "2099-01-01T00:00:00.000Z", "userInfo": {"username": "me"}}
            return (200, user) if self.knows_the_key else (401, {})
        if path.endswith("/experiment"):
            known = [experiment["cuid"] for experiment in self.experiments]
            self.experiments.append(body)
            again = body["cuid"] in known
            named = {"cuid": body["cuid"], "slug": body["cuid"], "name": body.get("name") or "n"}
            return (200 if again else 201), {**named, "createdAt": "2026-01-01T00:00:00.000Z"}
        if "/house/metrics/summaries/" in path:
            last = {key: step for key, step, _ in self.scalars}
            return 200, {"log": [], "media": [], "scalar": [{"key": key, "step": step} for key, step in last.items()]}
        if path == "/api/house/metrics" and body.get("type") == "scalar":
            self.scalars += [(line["key"], line["index"], line["data"]) for line in body["metrics"]]
        if path.endswith("/profile"):
            self.profiles |= body
        if path.endswith("/state"):
            self.states.append(body["state"])
        if path == "/api/resources/presigned/put":
            return 200, {"urls": [f"{self.url}/up/{name}" for name in body["paths"]]}
        if path.startswith("/api/project/"):
            own = {"cuid": "p", "version": 1, "name": "sft", "path": "/me/sft", "group": {"username": "me"}}
            return 200, {**own, "_count": {"experiments": 0}}
        return 200, {}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.server.answers:
            self.server.wake.wait(60)
        path = self.path.partition("?")[0]
        if path.startswith("/up/"):
            self.server.files[path.removeprefix("/up/")] = text
        status, reply = self.server.answer(path, json.loads(text or b"{}") if path.startswith("/api/") else {})
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in the block."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.wake.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
