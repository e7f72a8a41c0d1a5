#!/usr/bin/env python3
"""Let the other hosts fetch what this one has: the fetched folders, by as much of the Hub's API as a fetch asks for.

share_models.py --root DIR --address IP [--port N] [--user NAME] [--idle SECONDS]

Goes to the background and prints one JSON object: the URL, a token made for this one run, and what there is to fetch.
Only files that a manifest names are given, and only to who has the token. Ends by itself when nobody has asked for
so many seconds. Needs Python 3.9 and nothing else. A client checks every byte against the manifest's SHA-256.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import pwd
import re
import secrets
import socket
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MANIFEST = "clusterkit-manifest.json"
# As the Hub's: /api/models/<repository>/revision/<revision> and so on; a repository has at most one slash.
INFO = re.compile(r"api/models/([^/]+(?:/[^/]+)?)/revision/(.+)")
TREE = re.compile(r"api/models/([^/]+(?:/[^/]+)?)/tree/(.+)")
FILE = re.compile(r"([^/]+(?:/[^/]+)?)/resolve/([0-9a-f]{40})/(.+)")


def read_models(root):
    """The manifests of complete folders, each with its `folder`: a fetch renames a folder when it is complete."""
    found = []
    for name in sorted(os.listdir(root)):
        folder = os.path.join(root, name)
        try:
            with open(os.path.join(folder, MANIFEST), encoding="utf-8") as handle:
                manifest = json.load(handle)
            sizes = {path: os.path.getsize(os.path.join(folder, path)) for path in manifest["files"]}
            whole = all(sizes[path] == about["size"] for path, about in manifest["files"].items())
            named = [manifest[key] for key in ("hub", "revision", "commit", "weights")]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if whole and all(value is not None for value in named) and not name.startswith("."):
            found.append(dict(manifest, folder=folder))
    return found


def offered(models):
    """What a host is told, to find out whether its model is among it."""
    keys = ("hub", "revision", "allow_patterns", "ignore_patterns", "weights")
    return [{key: model[key] for key in keys} for model in models]


def files_of(models, hub, revision):
    """(commit, {name: (path, size, SHA-256)}) of a repository at a revision as it is called here, or its commit."""
    commit, files = None, {}
    for model in models:
        if (
            model["hub"] == hub
            and revision in (model["revision"], model["commit"])
            and commit in (None, model["commit"])
        ):
            commit = model["commit"]
            for name, about in model["files"].items():
                files[name] = (os.path.join(model["folder"], name), about["size"], about["sha256"])
    return commit, files


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        with self.server.lock:
            self.server.busy += 1
        try:
            self.answer()
        except OSError:
            self.close_connection = True  # the other end has gone
        finally:
            with self.server.lock:
                self.server.busy -= 1
                self.server.asked = time.monotonic()

    def answer(self):
        said = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if not hmac.compare_digest(said, b"Bearer " + self.server.token.encode()):
            return self.refuse(401, "Unauthorized", "Invalid credentials in Authorization header")
        path = unquote(urlsplit(self.path).path).strip("/")
        match = INFO.fullmatch(path) or TREE.fullmatch(path) or FILE.fullmatch(path)
        if not match:
            return self.refuse(404, "EntryNotFound", "no such page")
        hub, revision = match.group(1), match.group(2)
        commit, files = files_of(self.server.models, hub, revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", "%s at %s is not here" % (hub, revision))
        if match.re is FILE:
            return self.send_file(commit, files.get(match.group(3)))
        if match.re is INFO:
            siblings = [
                {"rfilename": name, "size": size, "lfs": {"sha256": sha256, "size": size, "pointerSize": 0}}
                for name, (_, size, sha256) in sorted(files.items())
            ]
            return self.send_json({"id": hub, "sha": commit, "siblings": siblings})
        return self.send_json(
            [
                {
                    "type": "file",
                    "path": name,
                    "size": size,
                    "oid": sha256[:40],
                    "lfs": {"oid": sha256, "size": size, "pointerSize": 0},
                }
                for name, (_, size, sha256) in sorted(files.items())
            ]
        )

    def send_file(self, commit, entry):
        if entry is None:
            return self.refuse(404, "EntryNotFound", "no such file")
        path, size, sha256 = entry
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = min(int(asked.group(1)), size) if asked else 0
        with open(path, "rb") as handle:
            self.send_response(206 if start else 200)
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", '"%s"' % sha256)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(size - start))
            if start:
                self.send_header("Content-Range", "bytes %d-%d/%d" % (start, size - 1, size))
            self.end_headers()
            if self.command == "GET" and size > start:
                self.wfile.flush()
                self.connection.sendfile(handle, start)
        return None

    def send_json(self, answer):
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code, name, message):
        self.send_response(code)
        self.send_header("X-Error-Code", name)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, token):
        self.models, self.token = [], token
        self.lock = threading.Lock()
        self.busy, self.asked = 0, time.monotonic()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self):
        # The base class asks DNS for the host's name, which can take its time, and is of no use here.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def until_idle(self, idle_s):
        """Serve until nobody has asked for so long and nobody is still being served."""
        threading.Thread(target=self.serve_forever, daemon=True).start()
        while True:
            with self.lock:
                left = idle_s if self.busy else self.asked + idle_s - time.monotonic()
            if left <= 0:
                return
            time.sleep(min(left, 5))


def become(user):
    entry = pwd.getpwnam(user)
    os.setgroups(os.getgrouplist(user, entry.pw_gid))
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def parse(argv):
    parser = argparse.ArgumentParser(description="Let other hosts fetch the models of this one, for a while.")
    parser.add_argument("--root", required=True, metavar="DIR", help="the folder with the models")
    parser.add_argument("--address", required=True, metavar="IP", help="the address to listen on")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--user", default="", help="whose rights are enough to read them; for root")
    parser.add_argument("--idle", type=float, default=600, metavar="SECONDS", help="end when nobody asked for so long")
    return parser.parse_args(argv)


def main(argv=None):
    wanted = parse(argv)
    try:
        server = Server((wanted.address, wanted.port), secrets.token_urlsafe(32))
        if wanted.user and os.geteuid() == 0:
            become(wanted.user)
        server.models = read_models(wanted.root)
    except (OSError, KeyError) as error:
        print("cannot share %s at %s port %d: %s" % (wanted.root, wanted.address, wanted.port, error), file=sys.stderr)
        return 1
    host = "[%s]" % wanted.address if ":" in wanted.address else wanted.address
    url = "http://%s:%d" % (host, server.server_address[1])
    print(json.dumps({"url": url, "token": server.token, "models": offered(server.models)}), flush=True)
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    # Whoever started this waits for the end of its output.
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    server.until_idle(wanted.idle)
    return 0


if __name__ == "__main__":
    sys.exit(main())
