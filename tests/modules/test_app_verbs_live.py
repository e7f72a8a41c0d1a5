"""`clusterkit app` with a real Ray on this machine, and an app of the site's own code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.modules.serve_cluster import Cluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]

CODE = """
from ray import serve
from starlette.responses import PlainTextResponse

@serve.deployment
class Greeter:
    def __init__(self, word):
        if word == "broken":
            raise RuntimeError("no such word")
        self.word = word

    async def __call__(self, request):
        return PlainTextResponse(self.word)

def build(args):
    return Greeter.bind(args["word"])
"""


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


class Site:
    """An inventory whose head is the running Ray."""

    def __init__(self, cluster: Cluster, folder: Path, short: Path) -> None:
        self.cluster, self.folder, self.short = cluster, folder, short
        (short / "root").mkdir(parents=True)
        (short / "root/ray-env").symlink_to(cluster.python.parents[1])
        (short / "state/node").mkdir(parents=True)
        # Ray runs without authentication here, and asks for none.
        (short / "state/node/token").write_text("0123456789abcdef\n")
        (folder / "inventory").mkdir()
        (folder / "greeting").mkdir()
        (folder / "greeting/greeter.py").write_text(CODE)

    def declare(self, word: str, replicas: int = 1) -> None:
        here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        hosts = {
            "all": {
                "hosts": {"box": {**here, "clusterkit_node_ip": own_address()}},
                "children": {
                    "ray_head": {"hosts": {"box": None}},
                    "ray_workers": {"children": {"cpus": {"hosts": {"box": None}}}},
                },
            }
        }
        parameters = {
            "code": "../greeting",
            "import_path": "greeter:build",
            "args": {"word": word},
            "deployments": [{"name": "Greeter", "num_replicas": replicas, "num_cpus": 0.5}],
        }
        app = {"name": "greet", "template": "custom", "route_prefix": "/greet", "parameters": parameters}
        paths = {name: str(self.short / name) for name in ("root", "config", "state", "log", "models")}
        facts = {
            "clusterkit_name": "box",
            "clusterkit_stack": "cpu",
            "clusterkit_paths": {**paths, "ray_temp": str(self.short / "ray")},
            "clusterkit_ports": {"dashboard": self.cluster.dashboard, "serve": self.cluster.serve},
            "clusterkit_serve": {"ready_timeout_s": 240},
            "clusterkit_apps": [app],
        }
        pool = {"clusterkit_accelerator": "cpu", "clusterkit_cpus": 4}
        files: dict[str, Any] = {"hosts.yml": hosts, "group_vars/all.yml": facts, "group_vars/cpus.yml": pool}
        for name, content in files.items():
            (self.folder / "inventory" / name).parent.mkdir(exist_ok=True)
            (self.folder / "inventory" / name).write_text(yaml.safe_dump(content))

    def app(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XDG_STATE_HOME": str(self.folder / "log"), "COLUMNS": "200"}
        command = [sys.executable, "-m", "clusterkit", "app", *words, "-i", str(self.folder / "inventory")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def answer(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.cluster.serve}/greet", timeout=30) as answer:
            return str(answer.read().decode())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    short = Path(tempfile.mkdtemp(prefix="ck-"))
    running = Cluster(tmp_path)
    try:
        running.wait()
        yield Site(running, tmp_path, short)
    finally:
        running.stop()
        shutil.rmtree(short)


def test_an_app_comes_changes_fails_and_goes_back(site: Site) -> None:
    site.declare("hello")
    assert "+ greet" in site.app("diff").stdout
    site.app("apply")
    assert site.answer() == "hello"
    assert site.app("diff").stdout == "nothing would change\n"

    site.declare("welcome", replicas=2)
    shown = site.app("diff").stdout
    assert "~ greet: replicas are replaced" in shown
    assert "args.word: hello -> welcome" in shown
    assert "new replicas start before old ones stop; nothing is missing meanwhile" in shown
    site.app("apply")
    assert site.answer() == "welcome"

    site.declare("broken")
    failed = site.app("apply", code=1)
    assert "RuntimeError: no such word" in failed.stderr
    assert "was put back, and runs" in failed.stderr
    assert site.answer() == "welcome"

    done = site.app("rollback")
    assert "args.word: welcome -> hello" in done.stdout
    assert "the inventory declares what it did" in done.stderr
    assert site.answer() == "hello"

    told = json.loads(site.app("list", "--json").stdout)
    assert [entry["outcome"] for entry in told["history"]] == ["good", "good", "failed", "good"]
    assert told["runs"] == 4
    assert told["apps"][0]["status"] == "RUNNING"
    greeter = yaml.safe_load(site.app("effective", "greet").stdout)["deployments"]["Greeter"]
    assert greeter["graceful_shutdown_wait_loop_s"] == 2
    assert greeter["num_replicas"] == 1
