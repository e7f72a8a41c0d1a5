"""Serve on hosts that come and go: a model that nobody asks has no host, and one that is asked gets one.

One cluster's life, in the order of its tests. The engine is vLLM on CPU; one replica with its ingress fills a host.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pexpect
import pytest
import requests

from tests.e2e.conftest import check_openai
from tests.lab.conftest import ENVIRONMENT, Maker, clusterkit, playbook, recap
from tests.lab.scaled_site import ScaledSite, scaled_site, until
from tests.lab.streams import COLD_S, Streams

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

ECHO = """\
import asyncio
from ray import serve

@serve.deployment
class Echo:
    async def __call__(self, request):
        await asyncio.sleep(0.5)
        return "here"

app = Echo.bind()
"""
APP = {
    "name": "tiny",
    "template": "llm",
    "parameters": {
        "model_id": "tiny-llama",
        "model_source": {"make": "tiny-llama"},
        "engine_kwargs": {"max_model_len": 2048, "max_num_seqs": 8},
        "cpus_per_replica": 1.9,
        "min_replicas": 0,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 2,
        "downscale_delay_s": 30,
        "graceful_shutdown_timeout_s": 120,
    },
}


@pytest.fixture(scope="module")
def site(lab_of: Maker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScaledSite]:
    with scaled_site(lab_of, tmp_path_factory.mktemp("served"), "servedtest", 2, clusterkit_apps=[APP]) as made:
        done = playbook("site.yml", made.inventory)
        assert done.returncode == 0, done.stdout[-6000:]
        yield made


@pytest.fixture(scope="module")
def url(site: ScaledSite) -> str:
    return f"http://{site.address('head')}:8000/v1"


class Requests(threading.Thread):
    """One request after the other, for as long as the block lasts."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.enough = url, threading.Event()
        self.answers, self.failed = 0, list[str]()

    def __enter__(self) -> Requests:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self.join()

    def run(self) -> None:
        while not self.enough.wait(0.05):
            try:
                requests.get(self.url, timeout=60).raise_for_status()
                self.answers += 1
            except requests.RequestException as error:
                self.failed.append(repr(error))


def interruptible() -> None:
    # Tests that run in the background ignore Ctrl-C, and so would what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_model_that_nobody_asks_has_no_host(site: ScaledSite) -> None:
    site.wait_for(worker1="off", worker2="off")
    again = playbook("site.yml", site.inventory)
    assert again.returncode == 0, again.stdout[-6000:]
    assert {host: count["changed"] for host, count in recap(again.stdout).items() if count["changed"]} == {}


def test_the_first_request_switches_a_host_on_and_is_answered(site: ScaledSite, url: str) -> None:
    site.wait_for(worker1="off", worker2="off")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=COLD_S)
    words = ["-m", "clusterkit", "status", "--watch", "--every", "1", "-i", str(site.inventory)]
    watch = pexpect.spawn(
        sys.executable, words, env=ENVIRONMENT, dimensions=(50, 220), encoding="utf-8", preexec_fn=interruptible
    )
    with ThreadPoolExecutor(1) as beside:
        watch.expect(r"worker1 +\S+ +off.*worker2 +\S+ +off", timeout=60)
        asked = beside.submit(client.completions.create, model="tiny-llama", prompt="Hello", max_tokens=4)
        for seen in ("booting|starting", "busy", r"tiny +RUNNING +[1-9]"):
            watch.expect(seen, timeout=COLD_S)
        watch.sendintr()
        watch.expect("stopped; the same command", timeout=60)
        answer = asked.result()
    assert answer.usage is not None
    assert answer.usage.completion_tokens >= 1
    check_openai(url)
    assert len(site.nodes()) == 1


def test_no_request_is_cut_when_its_host_is_taken_out(site: ScaledSite, url: str) -> None:
    """Streams run all the time; their host goes into maintenance, and another takes over."""
    load = [Streams(url) for _ in range(2)]
    assert all(streams.running.wait(COLD_S) for streams in load)
    (busy, *_) = [name for name, state in site.states().items() if state == "busy"]
    held = clusterkit("host", "maintain", busy, "--reason", "a test", "-i", str(site.inventory))
    assert held.returncode == 0, held.stderr
    site.wait(busy, "maintenance")
    ended = [reason for streams in load for reason in streams.stop()]
    print(f"{len(ended)} streams, {sum(reason != 'length' for reason in ended)} cut")
    assert set(ended) == {"length"}, ended
    assert busy not in site.nodes()
    check_openai(url)
    back = clusterkit("host", "add", busy, "-i", str(site.inventory))
    assert back.returncode == 0, back.stderr[-3000:]


def test_load_goes_and_the_hosts_go_off(site: ScaledSite) -> None:
    until(lambda: not site.nodes(), lambda: f"{site.told()}\n{site.log()}", COLD_S)
    site.wait_for(worker1="off", worker2="off")


def test_fewer_replicas_empty_a_host_and_no_request_notices(site: ScaledSite) -> None:
    """Four replicas fill both hosts; two of them are packed onto one, and the other goes off, under load."""
    code = site.inventory.parent / "echo"
    code.mkdir()
    (code / "echo.py").write_text(ECHO)
    echo: dict[str, Any] = {"name": "Echo", "num_cpus": 1, "num_replicas": 4, "max_ongoing_requests": 20}
    parameters = {"code": "../echo", "import_path": "echo:app", "deployments": [echo]}
    apps = [{"name": "echo", "template": "custom", "route_prefix": "/echo", "parameters": parameters}]
    site.declare(clusterkit_apps=apps)
    applied = clusterkit("app", "apply", "-i", str(site.inventory))
    assert applied.returncode == 0, applied.stderr[-4000:]
    assert len(site.nodes()) == 2
    with Requests(f"http://{site.address('head')}:8000/echo") as load:
        until(lambda: load.answers > 20, lambda: str(load.failed))
        echo["num_replicas"] = 2
        site.declare(clusterkit_apps=apps)
        applied = clusterkit("app", "apply", "-i", str(site.inventory))
        assert applied.returncode == 0, applied.stderr[-4000:]
        until(lambda: list(site.states().values()).count("off") == 1, lambda: f"{site.told()}\n{site.log()}", COLD_S)
    print(f"{load.answers} requests answered, {len(load.failed)} failed")
    assert load.failed == []
    assert len(site.nodes()) == 1
