"""One replica of a model through Serve, and the same engine as bare `vllm serve`: what the way to it costs.

python -m bench.serve_path [--ways proxy haproxy direct] [--concurrency 8 32 128] [--requests 256] [--rounds 3]

Its own Ray, in a folder of its own; needs the engine environment of the CPU stack, which it makes unless
CLUSTERKIT_TEST_ENGINE names one. Both sides have the same model (tiny: nearly all that is measured is the way), the
same arguments and environment of the engine, one core for its calculation, the same client. They take turns in short
rounds, while the other is idle: ratios of one run count, not seconds. The client's own work is in both of them, which
brings ratios nearer to 1; it stands in the second table, with the CPU time of everything else per request. On a machine
of few cores that is what bounds the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from bench.common import BIN, run, table
from clusterkit.render.serve import serve_config
from tests.roles.test_engine_launcher import MAKER, Node
from tests.roles.test_llm_serving import WAYS, Site
from tests.support import until

TOKENS = 16
APP: dict[str, Any] = {"num_replicas": 1, "engine_kwargs": {"max_model_len": 512, "max_num_seqs": 128}}
# Who a process works for, by its title.
PARTS = {
    "engine": r"VLLM::",
    "proxy": r"ProxyActor|haproxy",
    "ingress": r"Ingress|LLMRouter",
    "server": r"LLMServer|vllm serve",
}
SHOWN = ("client", "proxy", "ingress", "server", "engine", "Ray's own")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Side:
    """Bare or through Serve: where it answers, and which processes do the work."""

    url: str
    processes: Callable[[], dict[int, str]]
    points: dict[tuple[int, bool], Point] = field(default_factory=dict)


@dataclass
class Point:
    """What was measured at one concurrency, with streams or without, in all rounds. Times in seconds."""

    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    lasts: list[float] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[8, 32, 128])
    parser.add_argument("--requests", type=int, default=256, help="of a round, at least; four for each at a time")
    parser.add_argument("--rounds", type=int, default=3)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        Node.engine = engine(home)
        model = home / "tiny"
        run(f"{Node.engine}/bin/python", str(MAKER), "--out", str(model))
        found = {}
        for way in wanted.ways:
            with ExitStack() as stack:
                site = Site(below(home, way), WAYS[way])
                # Of the node's block, which nobody listens on yet, behind those that the node takes.
                port = site.node.ports["metrics"] + 40
                stack.callback(site.node.clean_up)
                # The engine's arguments as the kit renders them are those of the bare one, too.
                (app,) = serve_config(site.spec(model, **APP))["applications"]
                bare = stack.enter_context(vllm_serve(below(home, f"{way}-bare"), model, app, port))
                site.node.run("start")
                site.apply(model, **APP)
                served = Side(f"http://127.0.0.1:{site.ports['serve']}/one/v1/completions", site.node.processes)
                measure(bare, served, wanted.concurrency, wanted.requests, wanted.rounds)
                found[way] = bare, served
    for way, (bare, served) in found.items():
        show(way, bare, served)


def engine(home: Path) -> Path:
    given = os.environ.get("CLUSTERKIT_TEST_ENGINE")
    if given:
        return Path(given)
    words = [str(BIN / "ansible-playbook"), "playbooks/images.yml", "-i", "inventory/local", "--tags", "ray_env"]
    run(*words, "-e", json.dumps({"ray_env_path": str(home / "ray-env")}))
    return home / "ray-env"


def below(home: Path, name: str) -> Path:
    (home / name).mkdir()
    return home / name


@contextmanager
def vllm_serve(folder: Path, model: Path, app: dict[str, Any], port: int) -> Iterator[Side]:
    """The engine of the app as vLLM serves it by itself."""
    command = [str(Node.engine / "bin/vllm"), "serve", str(model), "--served-model-name", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    for name, value in app["args"]["llm_configs"][0]["engine_kwargs"].items():
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)]
    environment = {
        **os.environ,
        **app["runtime_env"]["env_vars"],
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
    }
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:

        def listens() -> bool:
            if process.poll() is not None:
                raise SystemExit(f"vllm serve ended:\n{log.read_text()[-3000:]}")
            return "Application startup complete" in log.read_text()

        until(listens, lambda: log.read_text()[-3000:], patience_s=600, pause_s=0.5)
        yield Side(f"http://127.0.0.1:{port}/v1/completions", lambda: session(process.pid))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def session(leader: int) -> dict[int, str]:
    """The processes of a session, with their titles."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def measure(bare: Side, served: Side, concurrencies: list[int], requests: int, rounds: int) -> None:
    for number in range(rounds + 1):
        for concurrency in concurrencies:
            for stream in (False, True):
                # Now this one first, now that one: what else the machine does meets both.
                for side in (bare, served) if number % 2 else (served, bare):
                    # The first round only warms up.
                    point = Point() if number == 0 else side.points.setdefault((concurrency, stream), Point())
                    least = 0 if number == 0 else requests
                    measured(side, point, concurrency, max(least, 4 * concurrency), stream)


def measured(side: Side, point: Point, concurrency: int, requests: int, stream: bool) -> None:
    processes = side.processes()
    before, own = cpu(processes), own_cpu()
    began = time.monotonic()
    asyncio.run(load(side.url, point, concurrency, requests, stream))
    point.rates.append(requests / (time.monotonic() - began))
    for part, used in cpu(processes).items():
        point.cpu[part] += (used - before.get(part, 0)) / requests
    point.cpu["client"] += (own_cpu() - own) / requests


def own_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu(processes: dict[int, str]) -> dict[str, float]:
    """CPU seconds so far, by part."""
    found: dict[str, float] = defaultdict(float)
    for pid, title in processes.items():
        try:
            # Behind the name, which may have anything in it.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        part = next((part for part, words in PARTS.items() if re.search(words, title)), "Ray's own")
        found[part] += (int(fields[11]) + int(fields[12])) / TICKS
    return found


async def load(url: str, point: Point, concurrency: int, requests: int, stream: bool) -> None:
    """So many requests, always `concurrency` at a time."""
    numbers = iter(range(requests))
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as client:

        async def worker() -> None:
            for number in numbers:
                await one(client, url, point, number, stream)

        await asyncio.gather(*(worker() for _ in range(concurrency)))


async def one(client: aiohttp.ClientSession, url: str, point: Point, number: int, stream: bool) -> None:
    """A request whose answer is looked at: one that fails quickly would look like a fast one."""
    body: dict[str, Any] = {"model": "tiny", "prompt": f"Request {number} asks", "max_tokens": TOKENS}
    body |= {"ignore_eos": True, "temperature": 0, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    began, first, tokens = time.monotonic(), 0.0, 0
    async with client.post(url, json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{url}: {answer.status} {(await answer.text())[:500]}")
        if stream:
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                first = first or time.monotonic() - began
                usage = json.loads(line[6:]).get("usage") or {}
                tokens = usage.get("completion_tokens", tokens)
        else:
            tokens = (await answer.json())["usage"]["completion_tokens"]
    if tokens != TOKENS:
        raise SystemExit(f"{url}: an answer of {tokens} tokens, and {TOKENS} were asked for")
    point.lasts.append(time.monotonic() - began)
    if stream:
        point.firsts.append(first)


def show(way: str, bare: Side, served: Side) -> None:
    rows, costs = [], []
    for (concurrency, stream), ours in served.points.items():
        theirs = bare.points[concurrency, stream]
        what: list[object] = [concurrency, "yes" if stream else "no"]
        rates = [f"{theirs.rate:.1f}", f"{ours.rate:.1f}", f"{ours.rate / theirs.rate:.2f}"]
        rows.append([*what, *rates, *times(theirs.firsts, ours.firsts), *times(theirs.lasts, ours.lasts)])
        for name, point in (("bare", theirs), (way, ours)):
            parts = [1000 * point.cpu[part] / len(point.rates) for part in SHOWN]
            costs.append([*what, name, *(f"{part:.1f}" for part in [*parts, sum(parts)])])
    names = ["concurrency", "stream", "bare req/s", "Serve req/s", "ratio"]
    for time_of in ("TTFT", "latency"):
        names += [f"{time_of} p50 ms", "ratio", "p95 ms", "ratio"]
    machine = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    table(f"One replica through Serve ({way}) beside `vllm serve`; ms are bare's ({machine})", names, rows)
    table("CPU milliseconds of each request", ["concurrency", "stream", "way", *SHOWN, "all"], costs)


def times(bare: list[float], served: list[float]) -> list[str]:
    """p50 and p95 of bare, each with the ratio."""
    found = []
    for part in (49, 94):
        if not bare:
            found += ["", ""]
            continue
        left, right = (statistics.quantiles(values, n=100, method="inclusive")[part] for values in (bare, served))
        found += [f"{1000 * left:.0f}", f"{right / left:.2f}"]
    return found


if __name__ == "__main__":
    main()
