"""One host in, one host out of a running cluster: the others notice nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import inventory_file
from tests.e2e.conftest import check_openai, run
from tests.lab.conftest import ENVIRONMENT, Cluster, Maker, clusterkit
from tests.lab.kill_at import family

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

HOSTS = ("head", "worker1", "worker2")
# One replica, so that it fits on either worker.
SITE = {
    "clusterkit_apps": [
        {
            "name": "tiny",
            "template": "llm",
            "route_prefix": "/",
            "parameters": {
                "model_id": "tiny-llama",
                "model_source": {"make": "tiny-llama"},
                "min_replicas": 1,
                "max_replicas": 1,
                "engine_kwargs": {"max_model_len": 1024, "max_num_seqs": 8},
            },
        }
    ]
}


def host(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    return clusterkit("host", *words, "-i", str(cluster.inventory), "--json")


def done(result: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def hosts_file(cluster: Cluster) -> Path:
    return cluster.inventory / "hosts.yml"


def lives(cluster: Cluster, *names: str) -> dict[str, str]:
    """What changes with every start of a node."""
    return {name: cluster.on(name, "systemctl show clusterkit-ray -p InvocationID --value") for name in names}


def checks(cluster: Cluster) -> dict[str, dict[str, Any]]:
    verify = clusterkit("verify", "-i", str(cluster.inventory), "--json")
    found = {check["name"]: check for check in json.loads(verify.stdout)["checks"]}
    assert verify.returncode == (0 if all(check["ok"] for check in found.values()) else 1)
    return found


def engines(cluster: Cluster) -> list[tuple[str, str]]:
    """(host, state) of each replica that holds an engine."""
    seen = cluster.status()
    names = {node["node_ip"]: node["host"] for node in seen["nodes"]}
    replicas = [replica for app in seen["apps"] for replica in app["replicas"]]
    return [
        (names.get(replica["node_ip"], ""), replica["state"])
        for replica in replicas
        if replica["deployment"].startswith("LLMServer")
    ]


def engine_home(cluster: Cluster) -> str:
    """The host of the replica, once there is exactly one that runs."""
    deadline = time.monotonic() + 300
    while True:
        found = engines(cluster)
        if [state for _, state in found] == ["RUNNING"]:
            return found[0][0]
        assert time.monotonic() < deadline, found
        time.sleep(2)


@pytest.fixture(scope="module")
def small(lab_of: Maker) -> Cluster:
    """Three hosts, of which the inventory knows head and worker1 so far: deployed."""
    cluster = lab_of("hoststest", "--workers", "2")
    (cluster.inventory / "group_vars/all/site.yml").write_text(yaml.safe_dump(SITE))
    inventory_file.write(inventory_file.remove(str(cluster.inventory), "worker2"))
    cluster.deploy()
    return cluster


@pytest.fixture(scope="module")
def address(small: Cluster) -> str:
    """Of the host that the inventory does not know yet."""
    networks = small.container("worker2").attrs["NetworkSettings"]["Networks"]
    return str(next(iter(networks.values()))["IPAddress"])


@pytest.fixture(scope="module")
def grown(small: Cluster, address: str) -> Cluster:
    """The same, after `host add` was killed half-way and given again."""
    before = lives(small, "head", "worker1")
    wish = ["add", "worker2", "--address", address]
    command = [sys.executable, "-m", "clusterkit", "host", *wish, "-i", str(small.inventory)]
    cut = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not small.on("worker2", "test -d /opt/clusterkit && echo there", check=False):
        assert cut.poll() is None, "it was over before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    for pid in (*family(cut.pid), cut.pid):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cut.wait()
    change = done(host(small, *wish))
    assert set(change["hosts"]) == {"worker2"}, "no other host had a task"
    assert change["hosts"]["worker2"]["failed"] == 0
    assert lives(small, "head", "worker1") == before
    return small


def test_an_added_host_is_in_the_cluster_and_a_second_time_changes_nothing(grown: Cluster, address: str) -> None:
    alive = {node["host"] for node in grown.status()["nodes"] if node["alive"]}
    assert alive == set(HOSTS)
    again = done(host(grown, "add", "worker2", "--address", address))
    assert (again["changed"], again["files"], set(again["hosts"])) == (False, [], {"worker2"})
    assert grown.deploy() == {}
    assert all(check["ok"] for check in checks(grown).values())


def test_a_drained_host_stays_off_whatever_is_deployed(grown: Cluster) -> None:
    first = engine_home(grown)
    (second,) = {"worker1", "worker2"} - {first}
    before = lives(grown, "head", second)
    change = done(host(grown, "drain", first, "--reason", "new {{ fan }}"))
    assert set(change["hosts"]) == {first}
    assert change["maintenance"]["reason"] == "new {{ fan }}"
    assert engine_home(grown) == second, "the replica moved"
    node = next(item for item in grown.status()["nodes"] if item["host"] == second)
    check_openai(f"http://{node['node_ip']}:8000/v1")
    assert lives(grown, "head", second) == before

    assert done(host(grown, "drain", first, "--reason", "new {{ fan }}"))["changed"] is False
    assert grown.deploy() == {}
    assert grown.agent(first, "status")["state"] == "stopped"
    assert grown.agent(first, "start", code=3)["refused"] == "maintenance"
    found = checks(grown)
    assert all(check["ok"] for check in found.values()), found
    assert f"2 of 3; {first} in maintenance: new {{{{ fan }}}} (by " in found["nodes"]["detail"]
    held = {item["host"]: item["held"] for item in grown.status()["hosts"]}
    assert "new {{ fan }}" in held[first]
    assert held[second] is None

    # The last worker has nowhere to move its replica to.
    stuck = host(grown, "drain", second, "--reason", "new disk", "-e", "drain_timeout_s=120")
    assert stuck.returncode == 1
    assert f"{second} was not drained" in stuck.stderr
    status = grown.agent(second, "status")
    assert (status["maintenance"], status["state"]) == (None, "running")
    # Longer than Serve leaves a replica whose node has a deadline.
    serving = [state for home, state in engines(grown) if home == second]
    assert serving == ["PENDING_MIGRATION"]
    head = next(item for item in grown.status()["nodes"] if item["host"] == "head")
    check_openai(f"http://{head['node_ip']}:8000/v1")

    back = done(host(grown, "add", first))
    assert (back["changed"], set(back["hosts"])) == (True, {first})
    assert grown.agent(first, "status")["held"] is None
    # Ray goes on with the drain that had nowhere to go, once there is room; a restart of that node ends it.
    done(host(grown, "drain", second, "--reason", "restart", "--force"))
    done(host(grown, "add", second))
    engine_home(grown)
    assert {item["host"] for item in grown.status()["nodes"] if item["alive"]} == set(HOSTS)
    assert all(check["ok"] for check in checks(grown).values())
    assert grown.deploy() == {}


def test_a_removed_host_is_clean_and_gone_and_the_last_one_stays(grown: Cluster) -> None:
    text = hosts_file(grown).read_text()
    before = lives(grown, "head", "worker1")
    change = done(host(grown, "remove", "worker2", "--yes"))
    assert set(change["hosts"]) == {"worker2"}
    assert "worker2" in text
    assert "worker2" not in hosts_file(grown).read_text()
    for path in ("/etc/systemd/system/clusterkit-ray.service", "/etc/clusterkit", "/opt/clusterkit/bin/host-agent"):
        assert grown.on("worker2", f"test -e {path} && echo there", check=False) == "", path
    assert "raylet" not in grown.on("worker2", "ps -eo args")
    assert engine_home(grown) == "worker1"
    assert lives(grown, "head", "worker1") == before
    assert all(check["ok"] for check in checks(grown).values())
    assert done(host(grown, "remove", "worker2", "--yes"))["changed"] is False

    left = hosts_file(grown).read_text()
    refused = host(grown, "remove", "worker1", "--yes")
    assert refused.returncode == 2
    assert "no worker" in refused.stderr
    assert hosts_file(grown).read_text() == left
    assert lives(grown, "head", "worker1") == before


def test_plain_ansible_drains_and_releases_too(grown: Cluster) -> None:
    words = ["-i", str(grown.inventory), "--limit", "worker1"]
    ansible = [str(Path(sys.executable).with_name("ansible-playbook"))]
    reason = ["-e", json.dumps({"drain_reason": "by hand", "drain_force": True})]
    drained = run([*ansible, "playbooks/drain.yml", *words, *reason], env=ENVIRONMENT)
    assert drained.returncode == 0, drained.stdout[-3000:]
    assert grown.agent("worker1", "status")["maintenance"]["reason"] == "by hand"
    site = run([*ansible, "site.yml", *words], env=ENVIRONMENT)
    assert site.returncode == 0, site.stdout[-3000:]
    assert "worker1 is in maintenance: by hand (by " in site.stdout
    released = run([*ansible, "playbooks/release.yml", *words], env=ENVIRONMENT)
    assert released.returncode == 0, released.stdout[-3000:]
    run([*ansible, "site.yml", *words], env=ENVIRONMENT)
    assert grown.agent("worker1", "status")["state"] == "running"
