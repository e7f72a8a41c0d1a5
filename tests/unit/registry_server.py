"""A registry as small as can be: OCI's distribution specification 1.0 as far as a push needs it.

Constructed from the specification; the real program stands in tests/roles/test_registry_role.py.
"""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Registry:
    """`blobs` and `manifests` are what it holds; `log` the requests. It drops the line in upload number `cut`."""

    def __init__(self, certificate: Path | None = None, key: Path | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[str, bytes] = {}
        self.log: list[str] = []
        self.cut = 0
        self.refuses: tuple[int, dict[str, Any]] | None = None
        self.uploads = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"registry": self}))
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sent(self) -> int:
        """How many uploads there were since the last question."""
        count = len([line for line in self.log if line.startswith("PUT") and "/uploads/" in line])
        self.log.clear()
        return count


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    registry: Registry

    def answer(self, status: int, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": "0", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def refuse(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.answer(status, Content_Length=str(len(text)))
        self.wfile.write(text)

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        kind, name = url.path.rsplit("/", 2)[-2:]
        held = self.registry.blobs if kind == "blobs" else self.registry.manifests
        self.registry.log.append(f"{self.command} {url.path}")
        if self.command == "GET":
            self.answer(200)
        elif self.command == "HEAD":
            known = {"Docker_Content_Digest": digest(held[name])} if name in held else {}
            self.answer(200 if name in held else 404, **known)
        elif self.command == "POST" and self.registry.refuses:
            self.refuse(*self.registry.refuses)
        elif self.command == "POST":
            self.answer(202, Location=f"{url.path}1?_state=x")
        else:
            self.put(kind, name, parse_qs(url.query))

    def put(self, kind: str, name: str, query: dict[str, list[str]]) -> None:
        length = int(self.headers["Content-Length"])
        if kind == "uploads":
            self.registry.uploads += 1
            if self.registry.uploads == self.registry.cut:
                self.rfile.read(length // 2)
                self.close_connection = True
                self.connection.close()
                return
            assert query["_state"] == ["x"]
            body, name = self.rfile.read(length), query["digest"][0]
            if digest(body) != name:
                self.refuse(400, {"errors": [{"code": "DIGEST_INVALID", "message": "provided digest did not match"}]})
                return
            self.registry.blobs[name] = body
        else:
            body = self.rfile.read(length)
            about = json.loads(body)
            assert all(entry["digest"] in self.registry.blobs for entry in [about["config"], *about["layers"]])
            self.registry.manifests[name] = self.registry.manifests[digest(body)] = body
        self.answer(201)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def log_message(self, format: str, *args: Any) -> None:
        return None


def digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"
