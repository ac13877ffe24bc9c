"""A small hub on 127.0.0.1 for tests: what `huggingface_hub` asks of the real one, kept in memory.

with HubServer() as hub:
    hub.repos["me/model"].files["config.json"]
    hub.fail_blob = 2            # the second blob that arrives is answered with 500
    hub.requests                 # every request as "METHOD /path", in order
"""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

# Made up here, in the form of a real one, so that the tests can look for it everywhere.
TOKEN = "hf_" + "TestTokenOfTheLoopbackHub01234"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


@dataclass
class Repo:
    """A repository: its files as they are committed, and how many commits there were."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    lfs: set[str] = field(default_factory=set)
    commits: list[str] = field(default_factory=lambda: ["0" * 39 + "1"])

    @property
    def head(self) -> str:
        return self.commits[-1]


class HubServer:
    """The server and its switches; a context manager."""

    def __init__(self) -> None:
        self.user = {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        """Content of large files by sha256: stored by an upload, whether or not a commit names it later."""
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.uploads: list[str] = []
        """sha256 of every blob that was received whole."""
        self.forbidden: set[str] = set()
        """Repositories that may be read but not written."""
        self.forbid_create = False
        self.busy = 0
        """Answer the next so many requests for a new repository with "another operation is in progress"."""
        self.fail_blob: int | None = None
        """Answer 500 to the blob with this number, counted from 1."""
        self.fail_for_good = False
        """Answer 500 to that blob every time, not only the first."""
        self.fail_status = 500
        self.fail_commit = False
        self.part_size: int | None = None
        """Ask for blobs larger than this in parts of this size."""
        self.delay = 0.0
        """Seconds before every answer."""
        self.echo_token = False
        """Repeat the Authorization header in error messages, as a careless proxy does."""
        self.without_auth_check = False
        self._failing: str | None = None
        self._seen: list[str] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def asked(self, words: str) -> list[str]:
        """The requests that contain `words`."""
        return [request for request in self.requests if words in request]

    def must_fail(self, oid: str) -> bool:
        """Whether this blob is the one that the switches want to fail."""
        with self._lock:
            if oid not in self._seen:
                self._seen.append(oid)
                if len(self._seen) == self.fail_blob:
                    self._failing = oid
            if oid != self._failing:
                return False
            if not self.fail_for_good:
                self._failing = None
            return True


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Nothing on stderr."""

    def _serve(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        hub.requests.append(f"{self.command} {path}")
        if hub.delay:
            time.sleep(hub.delay)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._read_chunks()
        else:
            self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        sent = self.headers.get("Authorization")
        self.user = hub.user if sent == f"Bearer {TOKEN}" else None
        if path.startswith("/blobs/"):  # the storage behind the hub: no token, as with signed addresses
            return self._blob(path.split("/")[2:])
        if sent and self.user is None:
            return self._error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._json(self.user) if self.user else self._error(401, "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path == "/api/validate-yaml":
            return self._validate_yaml(json.loads(self.body)["content"])
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._model(f"{owner}/{name}", rest)
        words = path.strip("/").split("/")
        if len(words) > 3 and words[2] == "resolve":
            return self._resolve(f"{words[0]}/{words[1]}", "/".join(words[4:]))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(path.strip("/").partition(".git")[0])
        return self._error(404, "Not found")

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    # ------------------------------------------------------------------------------------------------ routes

    def _create(self, asked: dict) -> None:
        hub, owner = self.hub, asked.get("organization") or (self.user or {}).get("name")
        repo = f"{owner}/{asked['name']}"
        if self.user is None:
            return self._error(401, "Invalid username or password.")
        if hub.busy:
            hub.busy -= 1
            return self._error(409, "Cannot create repo: another conflicting operation is in progress")
        if repo in hub.repos:
            return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{repo}"}, 409)
        if hub.forbid_create or owner not in {self.user["name"], *(o["name"] for o in self.user["orgs"])}:
            return self._error(403, f"You don't have the rights to create a model under the namespace {owner}")
        hub.repos[repo] = Repo(private=asked.get("visibility") == "private")
        return self._json({"url": f"{hub.url}/{repo}", "name": repo})

    def _validate_yaml(self, content: str) -> None:
        """Front matter has to be a mapping with the hub's own types."""
        try:
            head = content.split("---\n")[1] if content.startswith("---\n") else "{}"
            data = yaml.safe_load(head)
            assert isinstance(data, dict), "metadata is no mapping"
            assert isinstance(data.get("tags", []), list), "tags is no list"
            assert isinstance(data.get("license", ""), str), "license is no text"
        except (yaml.YAMLError, AssertionError, IndexError) as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _model(self, name: str, rest: list[str]) -> None:
        hub = self.hub
        repo = self._readable(name)
        if repo is None:
            return None
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in repo.files]
            facts = {"_id": "1", "id": name, "modelId": name, "private": repo.private, "sha": repo.head, "tags": []}
            return self._json({**facts, "siblings": siblings, "downloads": 0, "likes": 0})
        if rest[0] == "auth-check":
            if hub.without_auth_check:
                return self._error(404, "Not found")
            return self._error(403, "Forbidden") if rest[1:] == ["write"] and not self._writable(name) else self._json({})
        if rest[0] == "tree":
            return self._tree(repo, "/".join(rest[2:]))
        if not self._writable(name):
            return self._error(403, f"You don't have write access to {name}")
        if rest[0] == "preupload":
            files = []
            for file in json.loads(self.body)["files"]:
                path = file["path"]
                mode = "lfs" if path.endswith(LFS_SUFFIXES) and file["size"] else "regular"
                oid = _oid(repo, path) if path in repo.files else None
                ignored = path in repo.files.get(".gitignore", b"").decode().split()
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, "oid": oid})
            return self._json({"files": files})
        if rest[0] == "commit":
            return self._commit(name, repo)
        return self._error(404, "Not found")

    def _commit(self, name: str, repo: Repo) -> None:
        hub = self.hub
        if hub.fail_commit:
            return self._error(500, "Internal error")
        files, lfs = dict(repo.files), set(repo.lfs)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                lfs.discard(value["path"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in hub.blobs:
                    return self._error(400, f"The blob of {value['path']} was never uploaded")
                files[value["path"]] = hub.blobs[value["oid"]]
                lfs.add(value["path"])
            elif entry["key"] == "deletedFile":
                if value["path"] not in files:
                    return self._error(404, "A file with this name doesn't exist")
                del files[value["path"]]
        repo.files, repo.lfs = files, lfs
        repo.commits.append(hashlib.sha1(self.body).hexdigest())
        return self._json({"commitUrl": f"{hub.url}/{name}/commit/{repo.head}", "commitOid": repo.head, "success": True})

    def _batch(self, name: str) -> None:
        hub = self.hub
        if self._readable(name) is None:
            return None
        if not self._writable(name):
            return self._error(403, f"You don't have write access to {name}")
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in hub.blobs:
                address = f"{hub.url}/blobs/{wanted['oid']}"
                upload = {"href": f"{address}?X-Amz-Signature=secret"}
                if hub.part_size and wanted["size"] > hub.part_size:
                    count = -(-wanted["size"] // hub.part_size)
                    upload = {"href": f"{address}/complete", "header": {"chunk_size": str(hub.part_size)}}
                    upload["header"] |= {str(n): f"{address}/part/{n}" for n in range(1, count + 1)}
                entry["actions"] = {"upload": upload}
            objects.append(entry)
        return self._json({"transfer": "basic", "objects": objects})

    def _blob(self, words: list[str]) -> None:
        """Receive a blob, whole or in parts."""
        hub, oid = self.hub, words[0]
        if hub.must_fail(oid):
            return self._error(hub.fail_status, "The storage is out of order")
        if words[1:2] == ["part"]:
            hub.parts.setdefault(oid, {})[int(words[2])] = self.body
            return self._answer(200, b"", {"ETag": hashlib.md5(self.body).hexdigest()})
        if words[1:2] == ["complete"]:
            parts = hub.parts.pop(oid)
            asked = [(p["partNumber"], p["etag"]) for p in json.loads(self.body)["parts"]]
            assert asked == [(n, hashlib.md5(parts[n]).hexdigest()) for n in sorted(parts)]
            content = b"".join(parts[n] for n in sorted(parts))
        else:
            content = self.body
        if hashlib.sha256(content).hexdigest() != oid:
            return self._error(400, "The content is not what was announced")
        hub.blobs[oid] = content
        hub.uploads.append(oid)
        return self._json({"success": True})

    def _tree(self, repo: Repo, below: str) -> None:
        found = []
        for path, content in sorted(repo.files.items()):
            if path.startswith(below):
                lfs = {"oid": _oid(repo, path), "size": len(content), "pointerSize": 130} if path in repo.lfs else None
                entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                found.append(entry | ({"lfs": lfs} if lfs else {}))
        if below and not found:
            return self._error(404, "Entry not found", {"X-Error-Code": "EntryNotFound"})
        return self._json(found)

    def _resolve(self, name: str, path: str) -> None:
        repo = self._readable(name)
        if repo is None:
            return None
        headers = {"X-Repo-Commit": repo.head}
        if path not in repo.files:
            return self._error(404, "Entry not found", {"X-Error-Code": "EntryNotFound", **headers})
        headers["ETag"] = f'"{_oid(repo, path)}"'
        return self._answer(200, repo.files[path], headers)

    # ------------------------------------------------------------------------------------------------ answers

    def _readable(self, name: str) -> Repo | None:
        """The repository; None, with the answer given, where it is missing or private and nobody is logged in."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.user is None):
            self._error(404 if self.user else 401, "Repository not found", {"X-Error-Code": "RepoNotFound"})
            return None
        return repo

    def _writable(self, name: str) -> bool:
        return self.user is not None and name not in self.hub.forbidden

    def _error(self, status: int, message: str, headers: dict | None = None) -> None:
        if self.hub.echo_token:
            message += f" (you sent {self.headers.get('Authorization')})"
        self._answer(status, json.dumps({"error": message}).encode(), {"X-Error-Message": message, **(headers or {})})

    def _json(self, content: object, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: dict) -> None:
        try:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except OSError:  # whoever asked has given up waiting
            self.close_connection = True

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(repo: Repo, path: str) -> str:
    content = repo.files[path]
    return hashlib.sha256(content).hexdigest() if path in repo.lfs else _git_oid(content)
