"""The whole chain on one machine: Ray's head with its autoscaler, our provider, the daemon, the host agent, the
launcher, and real raylets. Only `ssh` is pretended; hosts are folders and addresses of this machine.

Ray is not in the kit's environment: run with one that has ray[default]==2.60.0, pydantic, PyYAML and pytest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from clusterkit.node_provider.client import FleetAway, FleetClient, FleetRefused
from clusterkit.render.autoscaler import autoscaler_environment, autoscaling_config, fleet_config
from tests import support
from tests.unit.test_spec import Vars, spec_of

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ROOT / "roles/ray_node/files/ray-node"
AGENT = ROOT / "roles/host_agent/files/host-agent"
PATIENCE_S = 240.0
until = partial(support.until, patience_s=PATIENCE_S, pause_s=0.2)
IDLE_S = 10

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="the agent's `remote` goes by sudo for anybody else"),
]

SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
for dir in FOLDER/w*; do [ "$(cat $dir/address)" = "$2" ] && break; done
shift 2
echo "$*" >> $dir/calls
SSH_ORIGINAL_COMMAND="$*" exec PYTHON AGENT --config $dir/host-agent.json remote
"""

TASK = """
import os, sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=1)
def where(seconds):
    time.sleep(seconds)
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    return [os.environ["RAY_CLOUD_INSTANCE_ID"], node["Labels"].get("rack"), node["Labels"].get("ray.io/node-group")]
import json
print("ANSWER " + json.dumps(ray.get(where.remote(float(sys.argv[2])))))
"""


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.head_ip = own_address()
        pool: Vars = {
            "clusterkit_accelerator": "cpu",
            "clusterkit_cpus": 1,
            "clusterkit_labels": {"rack": "a1"},
            "clusterkit_pool": {"mode": "autoscaled", "boot_budget_s": 60},
        }
        cluster: Vars = {"clusterkit_stack": "cpu", "clusterkit_autoscaler": {"idle_timeout_s": IDLE_S}}
        hosts = {"h1": {"ansible_host": self.head_ip}, "w1": {"ansible_host": "127.0.0.2"}}
        hosts["w2"] = {"ansible_host": "127.0.0.3"}
        workers = {"w1": "cpus", "w2": "cpus"}
        self.spec = spec_of(cluster=cluster, pools={"cpus": pool}, workers=workers, hosts=hosts)
        self.gcs = f"{self.head_ip}:26379"
        self.socket = str(folder / "fleet.sock")
        self.client = FleetClient(self.socket)
        self.daemon: subprocess.Popen[bytes] | None = None
        for number, name in enumerate(workers, 1):
            self.worker(name, number)
        ssh = folder / "ssh"
        text = SSH.replace("FOLDER", str(folder)).replace("PYTHON", sys.executable).replace("AGENT", str(AGENT))
        ssh.write_text(text)
        ssh.chmod(0o755)
        # All that Ray's environment gets of the kit.
        lib = folder / "etc/lib/clusterkit"
        shutil.copytree(ROOT / "clusterkit/node_provider", lib / "node_provider")
        shutil.copy(ROOT / "clusterkit/__init__.py", lib / "__init__.py")

    def worker(self, name: str, number: int) -> None:
        home = self.folder / name
        for part in ("state", "log"):
            (home / part).mkdir(parents=True)
        address = self.spec.hosts[name].node_ip
        first = 26400 + 100 * number
        names = ("metrics", "agent_http", "agent_grpc", "node_manager", "object_manager", "runtime_env_agent")
        ports = {port: first + offset for offset, port in enumerate(names)}
        node = {
            "kind": "worker",
            "runtime": "venv",
            "venv": str(Path(sys.executable).parents[1]),
            "node_ip": address,
            "head_address": self.gcs,
            "ports": {**ports, "worker_min": 28000 + 500 * number, "worker_max": 28400 + 500 * number},
            "num_cpus": 1,
            "labels": {"rack": "a1"},
            "object_store_gib": 0.1,
            "temp_dir": str(self.folder / f"t{number}"),
            "state_dir": str(home / "state"),
            "log_dir": str(home / "log"),
            "node_type": "cpus",
            "generation": "g1",
            # A worker leaves when it has lost its head for so long.
            "env": {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"},
        }
        agent = {
            "launcher": str(LAUNCHER),
            "launcher_config": str(home / "node.json"),
            "python": sys.executable,
            "record": str(home / "host.json"),
            "instance_env": str(home / "state/instance.env"),
            "generation_file": str(home / "generation"),
        }
        (home / "node.json").write_text(json.dumps(node))
        (home / "host-agent.json").write_text(json.dumps(agent))
        (home / "generation").write_text("g1\n")
        (home / "address").write_text(address)

    def write_config(self, **cpus: Any) -> None:
        """As the role autoscaler does: at once. `cpus`: what is otherwise with the pool."""
        config = autoscaling_config(self.spec)
        config["provider"]["fleet_socket"] = self.socket
        config["available_node_types"]["cpus"].update(cpus)
        path = self.folder / "etc/autoscaling.yaml"
        path.with_suffix(".new").write_text(json.dumps(config))
        path.with_suffix(".new").rename(path)

    def start_head(self) -> str:
        """Its instance."""
        home = self.folder / "h1"
        for part in ("state", "log"):
            (home / part).mkdir(parents=True, exist_ok=True)
        names = ("dashboard", "client", "metrics", "agent_http", "agent_grpc", "node_manager", "object_manager")
        ports = {port: number for number, port in enumerate((*names, "runtime_env_agent"), 26265)}
        node = {
            "kind": "head",
            "runtime": "venv",
            "venv": str(Path(sys.executable).parents[1]),
            "node_ip": self.head_ip,
            "head_address": self.gcs,
            "ports": {**ports, "gcs": 26379, "worker_min": 27000, "worker_max": 27400},
            "num_cpus": 0,
            "object_store_gib": 0.1,
            "temp_dir": str(self.folder / "t0"),
            "state_dir": str(home / "state"),
            "log_dir": str(home / "log"),
            "node_type": "head",
            "autoscaler": {
                "config": str(self.folder / "etc/autoscaling.yaml"),
                "lib": str(self.folder / "etc/lib"),
                "environment": autoscaler_environment(self.spec),
                "folders": [],
            },
            "env": {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"},
        }
        (home / "node.json").write_text(json.dumps(node))
        words = [sys.executable, str(LAUNCHER), "--config", str(home / "node.json"), "start"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return str(json.loads(done.stdout)["instance_id"])

    def kill_head(self) -> None:
        """All of it at once, before anything could say goodbye: what has this test's own folder in it."""
        mine = (str(self.folder / "t0").encode(), str(self.folder / "h1").encode())
        for path in Path("/proc").glob("[0-9]*"):
            try:
                known = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            except OSError:
                continue
            if any(part in known for part in mine):
                os.kill(int(path.name), signal.SIGKILL)

    def start_daemon(self) -> None:
        config = fleet_config(self.spec)
        config.update(socket=self.socket, record=str(self.folder / "record.json"))
        config["ssh"] = {"command": [str(self.folder / "ssh")], "identity": "/x", "known_hosts": "/x"}
        config["ssh"].update(control_dir="/tmp", status_timeout_s=60)
        config["polling"] = {"interval_s": 2}
        path = self.folder / "fleet.json"
        path.write_text(json.dumps(config))
        words = [sys.executable, "-m", "clusterkit.fleet", "--config", str(path)]
        with (self.folder / "fleet.log").open("ab") as log:
            self.daemon = subprocess.Popen(words, cwd=ROOT, stderr=log)
        until(lambda: self.states().count("idle") == 2, lambda: (self.folder / "fleet.log").read_text()[-3000:])

    def states(self) -> list[str]:
        try:
            return [host["state"] for host in self.client.status()["hosts"]]
        except (FleetAway, FleetRefused):
            return []

    def task(self, seconds: float = 0) -> subprocess.Popen[str]:
        script = self.folder / "task.py"
        script.write_text(TASK)
        env = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        words = [sys.executable, str(script), self.gcs, str(seconds)]
        return subprocess.Popen(words, cwd="/", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def answer(self, task: subprocess.Popen[str]) -> list[str]:
        out, err = task.communicate(timeout=PATIENCE_S)
        lines = [line for line in out.splitlines() if line.startswith("ANSWER ")]
        assert lines, err[-1500:] + self.monitor()[-1000:] + json.dumps(self.client.status(), indent=1)
        found = json.loads(lines[0].removeprefix("ANSWER "))
        assert isinstance(found, list)
        return found

    def monitor(self) -> str:
        path = self.folder / "t0/session_latest/logs/monitor.log"
        return path.read_text()[-6000:] if path.exists() else "no monitor log"

    def words(self) -> list[str]:
        """What the hosts were told, polls apart."""
        lines = [line for path in sorted(self.folder.glob("w*/calls")) for line in path.read_text().splitlines()]
        return [line.split()[0] for line in lines if line != "status"]

    def end(self) -> None:
        if self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait()
        for home in self.folder.glob("w*"):
            words = [sys.executable, str(LAUNCHER), "--config", str(home / "node.json"), "stop"]
            subprocess.run(words, capture_output=True, check=False)
        self.kill_head()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="Ray is not in this environment")
    # pytest's own folders are too long for Ray's sockets.
    folder = Path(tempfile.mkdtemp(prefix="ck", dir="/tmp"))
    cluster = Cluster(folder)
    try:
        cluster.start_daemon()
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


def test_load_brings_a_node_idleness_ends_it_and_a_new_head_is_served_at_once(cluster: Cluster) -> None:
    # No node may come; a running head reads what is written later, and needs no other start.
    cluster.write_config(max_workers=0)
    first = cluster.start_head()
    until(lambda: "Using Autoscaling Config" in cluster.monitor(), lambda: cluster.monitor())
    task = cluster.task()
    cluster.write_config()
    instance, rack, group = cluster.answer(task)
    assert (rack, group) == ("a1", "cpus")
    assert [node["id"] for node in cluster.client.nodes()] == [instance]

    until(lambda: cluster.states() == ["idle", "idle"], lambda: cluster.monitor())
    assert cluster.client.nodes() == []
    assert cluster.words().count("start") == 1
    assert cluster.words()[-1] == "stop", "what outlives a drain is cleared away"

    # A node serves as the head dies; the new head knows nothing of the old one's nodes.
    busy = cluster.task(3600)
    until(lambda: "busy" in cluster.states(), lambda: cluster.monitor())
    (old,) = [node["id"] for node in cluster.client.nodes()]
    until(lambda: cluster.client.nodes()[0]["running"])
    cluster.kill_head()
    busy.kill()
    busy.wait()
    # It leaves by itself; and here, where all live on one machine, Ray starts no head before.
    until(lambda: cluster.client.nodes() == [], lambda: json.dumps(cluster.client.status(), indent=1))
    assert cluster.start_head() != first, "Ray takes no id twice"
    began = time.monotonic()
    instance, _, _ = cluster.answer(cluster.task())
    assert instance != old
    assert time.monotonic() - began < 180, "Ray's own patience with the old node would be an hour"
    until(lambda: cluster.states() == ["idle", "idle"], lambda: cluster.monitor())
    assert cluster.words().count("start") == 3
