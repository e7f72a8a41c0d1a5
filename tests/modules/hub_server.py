"""A server that speaks as much of the Hugging Face Hub's API as huggingface_hub asks to fetch a model.

Made from the library's own source (0.36.2 and 2.4.0: `hf_api.py`, `file_download.py`, `utils/_http.py`) and the Hub's
documentation: paths, headers and error codes are the Hub's; repositories, tokens and contents are these tests'.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Json = dict[str, Any]

LARGE = ".safetensors"  # what the Hub keeps outside of git


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_name(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    # What the server says of a size, where that is a lie.
    sizes: dict[str, int] = field(default_factory=dict)
    # How often a file comes with other bytes than it should.
    damaged: dict[str, int] = field(default_factory=dict)

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        commit = commit_of(files)
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class Hub:
    """`log` holds the paths of every request; `stop_at` makes one file stop half-way until `go_on` is set."""

    def __init__(self, certificate: str | None = None, address: str = "127.0.0.1") -> None:
        self.repositories: dict[str, Repository] = {}
        self.log: list[str] = []
        self.stop_at: str | None = None
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.page: bytes | None = None
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer((address, 0), handler)
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://{address}:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def repository(self, name: str = "org/model") -> Repository:
        return self.repositories.setdefault(name, Repository())

    def gets(self) -> list[str]:
        """Names of the files whose content was asked for."""
        return [line.rpartition("/")[2] for line in self.log if line.startswith("GET") and "/resolve/" in line]

    def close(self) -> None:
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.reply(head=True)

    def do_GET(self) -> None:
        self.reply(head=False)

    def reply(self, head: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.log.append(f"{self.command} {path}")
        if self.hub.page is not None:
            return self.send(200, self.hub.page, {"Content-Type": "text/html"})
        if path.startswith("api/models/"):
            name, _, rest = path.removeprefix("api/models/").partition("/revision/")
            kind = "info"
            if not rest:
                name, _, rest = path.removeprefix("api/models/").partition("/tree/")
                kind = "tree"
        else:
            name, _, rest = path.partition("/resolve/")
            kind = "file"
        repository = self.hub.repositories.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in {known.token for known in self.hub.repositories.values()}:
            return self.error(401, None, "Invalid credentials in Authorization header")
        if repository is None or (repository.token and not repository.gated and token != repository.token):
            return self.error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repository.gated and kind != "info" and token != repository.token:
            return self.error(403 if token else 401, "GatedRepo", "Access to model org/model is restricted")
        revision, _, file = (rest, "", "") if kind != "file" else rest.partition("/")
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self.error(404, "RevisionNotFound", "Invalid rev id: " + revision)
        files = repository.commits[commit]
        if kind == "info":
            entries = [self.sibling(repository, *item) for item in files.items()]
            return self.send_json({"id": name, "sha": commit, "siblings": entries})
        if kind == "tree":
            return self.send_json([self.entry(*item) for item in files.items()])
        return self.send_file(repository, commit, file, head)

    @staticmethod
    def sibling(repository: Repository, name: str, data: bytes) -> Json:
        found: Json = {"rfilename": name, "size": repository.sizes.get(name, len(data)), "blobId": git_name(data)}
        if name.endswith(LARGE):
            found["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
        return found

    @staticmethod
    def entry(name: str, data: bytes) -> Json:
        found: Json = {"type": "file", "path": name, "size": len(data), "oid": git_name(data)}
        if name.endswith(LARGE):
            found["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        return found

    def send_file(self, repository: Repository, commit: str, name: str, head: bool) -> None:
        data = repository.commits[commit].get(name)
        if data is None:
            return self.error(404, "EntryNotFound", "Entry not found")
        large = name.endswith(LARGE)
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{sha256(data) if large else git_name(data)}"',
            "Accept-Ranges": "bytes",
        }
        if head:
            return self.send(200, b"", {**headers, "Content-Length": str(len(data))})
        if repository.damaged.get(name, 0) > 0:
            repository.damaged[name] -= 1
            data = bytes(byte ^ 1 for byte in data)
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(206 if start else 200, data[start:], headers, pause=name == self.hub.stop_at)
        return None

    def send_json(self, answer: Any) -> None:
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def error(self, code: int, name: str | None, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": name} if name else {})}
        self.send(code, json.dumps({"error": message}).encode(), headers)

    def send(self, code: int, body: bytes, headers: dict[str, str], pause: bool = False) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if pause:
                half = len(body) // 2
                self.wfile.write(body[:half])
                self.wfile.flush()
                self.hub.stopped.set()
                self.hub.go_on.wait(30)
                body = body[half:]
            self.wfile.write(body)
        except OSError:
            self.close_connection = True
