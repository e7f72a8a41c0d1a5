"""A real Redis for tests: Debian's redis-server, on a port of its own, gone with the test."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import free_block, wait_for_port


class RedisServer:
    """Keeps nothing on disk."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_block(1)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, tls: bool = False) -> None:
        listen = ("--port", "0", "--tls-port", str(self.port)) if tls else ("--port", str(self.port))
        command = ["redis-server", *listen, "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder)]
        with (self.folder / "redis.log").open("wb") as log:
            self.process = subprocess.Popen([*command, *self.options], stdout=log, stderr=log)
        wait_for_port(self.port, self.process, self.folder / "redis.log")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)

    def cli(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


@contextmanager
def redis_server(folder: Path, *options: str, tls: bool = False) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian: apt-get install redis-server)")
    server = RedisServer(folder, *options)
    try:
        server.start(tls=tls)
        yield server
    finally:
        server.stop()
