"""A W&B server on loopback that takes what the client sends and keeps it; `with serving() as server:`."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


class Server(http.server.ThreadingHTTPServer):
    """What it was sent: runs as they were begun, history lines by their offset, names of files, artifacts, alerts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.knows_the_key = True
        self.runs: list[dict] = []
        self.history: dict[int, dict] = {}
        self.files: set[str] = set()
        self.artifacts: list[dict] = []
        self.alerts: list[dict] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: the client drops its connections at the end of a run."""

    def answer(self, query: str, variables: dict[str, Any]) -> dict:
        """The data of a GraphQL request."""
        if "upsertBucket" in query:
            self.runs.append(variables)
            entity = {"id": "e", "name": variables.get("entity") or "me"}
            project = {"id": "p", "name": variables.get("project"), "entity": entity}
            bucket = {"id": "b", "name": variables["name"], "displayName": "n", "description": None, "config": "{}",
                      "sweepName": None, "historyLineCount": 0, "project": project}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "CreateArtifact" in query:
            self.artifacts.append(variables["input"])  # as one that it has already, whose files it does not want
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": artifact}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "query ArtifactType(" in query:
            return {"project": {"artifact": None}}
        if "RunResumeStatus" in query:
            return {"model": self._resumed(variables["name"])}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "v"} if self.knows_the_key else None} if "viewer" in query else {}

    def _resumed(self, name: str) -> dict | None:
        """What the server has of a run that goes on."""
        if name not in {run["name"] for run in self.runs}:
            return None
        last = self.history[max(self.history)] if self.history else {}
        known = {"id": "b", "name": name, "displayName": "n", "tags": [], "notes": None, "wandbConfig": '{"t": 1}'}
        counts = {"historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": json.dumps([json.dumps(last)]), "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}"}
        return {"id": "p", "name": "sft", "entity": {"id": "e", "name": "me"}, "bucket": {**known, **counts, **texts}}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body, reply = self.rfile.read(int(self.headers.get("Content-Length", 0))), {}
        if self.path == "/graphql":
            asked = json.loads(body)
            reply = {"data": self.server.answer(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            self.server.history |= {lines["offset"] + i: json.loads(text) for i, text in enumerate(lines["content"])}
        elif self.path.startswith("/up/"):
            self.server.files.add(self.path.removeprefix("/up/"))
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server in the block; it may be shut down inside already."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        stop(server)
        thread.join(10)


def stop(server: Server) -> None:
    """From here on nobody answers at its address."""
    server.shutdown()
    server.server_close()
