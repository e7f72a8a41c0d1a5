"""A real Ray with Serve on this machine, and a constant load on an app of it.

Ray is the one of the environment that runs the tests, or of the one that CLUSTERKIT_RAY_ENV names. Tests skip where
neither has ray[serve].
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module, run_module

Json = dict[str, Any]
START_S = 120

CODE = """
import asyncio, os, time
from ray import serve
from starlette.responses import PlainTextResponse, StreamingResponse

VERSION = "%s"

@serve.deployment
class Answer:
    def __init__(self, word, start_s, fail):
        time.sleep(start_s)
        if fail:
            raise RuntimeError("no weights in /nowhere")
        self.word, self.more = word, ""

    def reconfigure(self, config):
        self.more = config["more"]

    async def __call__(self, request):
        said = "%%s %%s %%s %%d end\\n" %% (VERSION, self.word, self.more, os.getpid())
        if "stream" not in request.query_params:
            await asyncio.sleep(0.02)
            return PlainTextResponse(said)
        async def parts():
            for _ in range(15):
                yield "part\\n"
                await asyncio.sleep(0.2)
            yield said
        return StreamingResponse(parts(), media_type="text/plain")

def build(args):
    return Answer.bind(args["word"], args["start_s"], args["fail"])
"""

# A client of its own process: a pause of the tests is none of the load's. Reads lines of `url seconds rate streams`.
LOAD = """
import asyncio, json, sys, time
host, port, path, seconds, rate, every = sys.argv[1], int(sys.argv[2]), sys.argv[3], *map(float, sys.argv[4:7])
told = {"sent": 0, "failed": 0, "streams": 0, "cut": 0, "errors": {}, "words": {}, "slowest_s": 0.0}

async def ask(stream):
    began = time.monotonic()
    told["streams" if stream else "sent"] += 1
    try:
        reader, writer = await asyncio.open_connection(host, port)
        query = "?stream=1" if stream else ""
        writer.write(("GET %s%s HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n" % (path, query)).encode())
        text = (await asyncio.wait_for(reader.read(), 120)).decode()
        while chunk := (await asyncio.wait_for(reader.read(), 120)).decode():
            text += chunk
        writer.close()
        status = text.split(" ", 2)[1] if text else "nothing"
        good = status == "200" and " end\\n" in text
        why = None if good else status + (" cut" if status == "200" else "")
        if good:
            word = text.split(" end\\n")[0].splitlines()[-1].rsplit(" ", 1)[0]
            told["words"][word] = told["words"].get(word, 0) + 1
    except Exception as error:
        why = type(error).__name__
    if why:
        told["cut" if stream else "failed"] += 1
        told["errors"][why] = told["errors"].get(why, 0) + 1
    told["slowest_s"] = max(told["slowest_s"], round(time.monotonic() - began, 2))

async def main():
    tasks, began, number = set(), time.monotonic(), 0
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_reader(sys.stdin, stop.set)
    while time.monotonic() - began < seconds and not stop.is_set():
        task = asyncio.create_task(ask(number % every == 0))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
        await asyncio.sleep(max(0, began + number / rate - time.monotonic()))
    told["seconds"] = round(time.monotonic() - began, 1)
    await asyncio.gather(*tasks)
    print(json.dumps(told))

asyncio.run(main())
"""


def ray_environment() -> Path:
    """The interpreter of an environment with Ray's Serve; skips where there is none."""
    folder = os.environ.get("CLUSTERKIT_RAY_ENV")
    python = Path(folder) / "bin/python" if folder else Path(sys.executable)
    if subprocess.run([python, "-c", "import ray.serve"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{python} has no ray[serve]; CLUSTERKIT_RAY_ENV may name an environment that has it")
    return python


def free_ports(number: int) -> list[int]:
    """Below the range that outgoing connections take, so that they stay free."""
    found: list[int] = []
    for port in range(21000 + os.getpid() % 3000, 26000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


@dataclass
class Told:
    """What a load saw. `words`: answers by code, argument and user_config."""

    sent: int
    failed: int
    streams: int
    cut: int
    seconds: float
    slowest_s: float
    errors: dict[str, int]
    words: dict[str, int]

    def __str__(self) -> str:
        offered = (self.sent + self.streams) / self.seconds
        return (
            f"offered {offered:.0f}/s for {self.seconds:.0f} s, sent {self.sent + self.streams}, failed {self.failed}, "
            f"streams {self.streams}, cut {self.cut}, slowest answer {self.slowest_s:.1f} s"
            + (f", {self.errors}" if self.errors else "")
        )


class Cluster:
    """One node. `config` and `apply` are of the one app `answer`."""

    def __init__(self, folder: Path, cpus: int = 4) -> None:
        self.python = ray_environment()
        self.folder = folder
        # Ray's sockets need a short path.
        self.temp = Path(f"/tmp/ck{os.getpid()}")
        gcs, self.dashboard, self.serve, *rest = free_ports(9)
        self.url = f"http://127.0.0.1:{self.dashboard}"
        names = ("ray-client-server", "dashboard-agent-listen", "dashboard-agent-grpc")
        names += ("metrics-export", "object-manager", "runtime-env-agent")
        ports = [word for name, port in zip(names, rest, strict=True) for word in (f"--{name}-port", str(port))]
        words = ["start", "--head", "--block", "--node-ip-address", "127.0.0.1", "--port", str(gcs)]
        words += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(self.dashboard), *ports]
        words += ["--min-worker-port", "26000", "--max-worker-port", "27999", "--num-cpus", str(cpus)]
        words += ["--num-gpus", "0", "--object-store-memory", "100000000", "--temp-dir", str(self.temp)]
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"}
        self.log = (folder / "ray.log").open("w")
        self.process = subprocess.Popen(
            [self.python, "-m", "ray.scripts.scripts", *words],
            env=env,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        self.module = load_module("ray_serve_config")

    def wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(self.url + "/api/version", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, (self.folder / "ray.log").read_text()[-3000:]
                assert time.monotonic() < deadline, "Ray's dashboard does not answer"
                time.sleep(1)

    def stop(self) -> None:
        # All of Ray stays in this session, also what it renames.
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._session():
                try:
                    os.kill(pid, sign)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + 20
            while self._session() and time.monotonic() < deadline:
                time.sleep(0.5)
        self.process.wait(30)
        self.log.close()
        shutil.rmtree(self.temp, ignore_errors=True)

    def _session(self) -> list[int]:
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _parent, _group, session, *_ = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return found

    def code(self, version: str) -> str:
        path = self.folder / f"{version}.zip"
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("answering.py", CODE % version)
        return f"file://{path}"

    def config(
        self, version: str = "v1", word: str = "a", more: str = "x", fail: bool = False, **deployment: Any
    ) -> Json:
        answer = {"name": "Answer", "num_replicas": 2, "max_ongoing_requests": 100, "user_config": {"more": more}}
        answer |= {"ray_actor_options": {"num_cpus": 0.5}, "graceful_shutdown_wait_loop_s": 0.5}
        answer |= {"health_check_period_s": 5, "graceful_shutdown_timeout_s": 60, **deployment}
        app = {
            "name": "answer",
            "route_prefix": "/answer",
            "import_path": "answering:build",
            "runtime_env": {"working_dir": self.code(version)},
            "args": {"word": word, "start_s": 1, "fail": fail},
            "deployments": [answer],
        }
        return {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.serve},
            "applications": [app],
        }

    def apply(self, config: Json | None = None, *, check: bool = False, **arguments: Any) -> Json:
        given: Json = {
            "url": self.url,
            "ray_python": str(self.python),
            "history": str(self.folder / "history"),
            "wait_timeout_s": 240,
            "details": True,
            **arguments,
        }
        if config is not None:
            given["config"] = json.loads(json.dumps(config))
        return run_module(self.module, check=check, **given)

    def pids(self) -> set[int]:
        with urllib.request.urlopen(self.url + "/api/serve/applications/", timeout=30) as answer:
            app = json.load(answer)["applications"]["answer"]
        # While an app is built anew, Serve lists none of its deployments.
        replicas = app["deployments"].get("Answer", {}).get("replicas", [])
        return {item["pid"] for item in replicas if item["state"] == "RUNNING"}

    @contextmanager
    def load(self, rate: float, seconds: float = 600) -> Iterator[list[Told]]:
        """A constant load, one stream of 3 s in twenty requests. What it saw is in the list, after the block."""
        told: list[Told] = []
        words = ["127.0.0.1", str(self.serve), "/answer", str(seconds), str(rate), "20"]
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield told
            out, _ = process.communicate("stop\n", timeout=300)
            told.append(Told(**json.loads(out)))
        finally:
            process.kill()
            process.wait()
