"""Unit, launcher and agent agree on who is alive, whatever happens to dockerd, the launcher or the host."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.lab.conftest import Cluster, clusterkit, playbook

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

WORKER = "worker1"


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.5)


def unit(cluster: Cluster, host: str = WORKER) -> str:
    return cluster.on(host, "systemctl show clusterkit-ray -p ActiveState --value")


def containers(cluster: Cluster, host: str = WORKER) -> str:
    return cluster.on(host, "docker ps --all --quiet")


def first_process(cluster: Cluster, host: str = WORKER) -> str:
    return cluster.on(host, "docker inspect --format '{{.State.Pid}}' clusterkit-ray")


def assert_down(cluster: Cluster, host: str = WORKER) -> None:
    wait_for(lambda: unit(cluster, host) in {"failed", "inactive"})
    assert cluster.agent(host, "status")["state"] == "stopped"
    assert containers(cluster, host) == ""
    assert cluster.on(host, "pgrep -c raylet || true") == "0"


def back(cluster: Cluster, host: str = WORKER) -> None:
    assert cluster.agent(host, "start")["state"] == "running"


def live_restore(cluster: Cluster, on: bool) -> None:
    """The site's own dockerd setting, changed as an operator would."""
    daemon = json.loads(cluster.on(WORKER, "cat /etc/docker/daemon.json"))
    text = json.dumps({**daemon, "live-restore": on})
    cluster.on(WORKER, f"echo '{text}' > /etc/docker/daemon.json && systemctl reload docker")
    wait_for(lambda: f"Live Restore Enabled: {str(on).lower()}" in cluster.on(WORKER, "docker info 2>/dev/null"))


def test_the_container_is_rays_users_and_not_privileged(cluster: Cluster) -> None:
    said = json.loads(cluster.on(WORKER, "docker inspect clusterkit-ray"))[0]
    assert said["HostConfig"]["Privileged"] is False
    assert said["HostConfig"]["NetworkMode"] == "host"
    assert said["Config"]["User"] == cluster.on(WORKER, "echo $(id -u ray):$(id -g ray)")
    token = cluster.on(WORKER, "cat /var/lib/clusterkit/node/token")
    assert len(token) == 64
    assert token not in cluster.on(WORKER, "docker inspect clusterkit-ray; ps -eo args")


def test_dockerd_restarts_with_live_restore_and_the_node_lives(cluster: Cluster) -> None:
    live_restore(cluster, True)
    before = first_process(cluster)
    cluster.on(WORKER, "systemctl restart docker")
    assert first_process(cluster) == before
    assert (unit(cluster), cluster.agent(WORKER, "status")["state"]) == ("active", "running")
    # Not even a dockerd that is down keeps the agent from telling the truth, nor from stopping the node.
    cluster.on(WORKER, "systemctl stop docker.socket docker")
    assert cluster.agent(WORKER, "status")["state"] == "running"
    assert cluster.agent(WORKER, "stop")["changed"] is True
    assert cluster.on(WORKER, "pgrep -c raylet || true") == "0"
    cluster.on(WORKER, "systemctl start docker")
    back(cluster)


def test_with_consent_dockerd_is_restarted_on_one_host_after_the_other(cluster: Cluster) -> None:
    change = {"container_engine_daemon": {"default-ulimits": None, "default-shm-size": "128M"}}
    consent = ("-e", '{"clusterkit_allow_disruption": true}')
    hosts = ("head", "worker1", "worker2")

    def dockerd(host: str) -> str:
        return cluster.on(host, "systemctl show docker -p InvocationID --value")

    def last(host: str, word: str, of: str) -> float:
        # From the journal: systemd forgets the times of a unit that nothing wants.
        lines = cluster.on(host, f"journalctl --no-pager -o short-unix -u {of}").splitlines()
        return max(float(line.split()[0]) for line in lines if f"]: {word} " in line)

    def away(host: str) -> tuple[float, float]:
        """From the stop of dockerd to the next start of the node, in seconds since 1970."""
        return last(host, "Stopping", "docker.service"), last(host, "Started", "clusterkit-ray.service")

    before = {host: dockerd(host) for host in hosts}
    try:
        done = playbook("playbooks/hosts.yml", cluster.inventory, "-e", json.dumps(change), *consent)
        assert done.returncode == 0, done.stdout[-4000:]
        assert all(dockerd(host) != before[host] for host in hosts)
        states = {host: cluster.agent(host, "status") for host in hosts}
        assert {state["state"] for state in states.values()} == {"running"}, (states, done.stdout[-8000:])
        times = sorted(away(host) for host in hosts)
        assert all(one[1] <= other[0] for one, other in pairwise(times)), times
    finally:
        assert playbook("site.yml", cluster.inventory, *consent).returncode == 0
    assert cluster.deploy() == {}


def test_dockerd_restarts_without_live_restore_and_everyone_knows_that_the_node_died(cluster: Cluster) -> None:
    live_restore(cluster, False)
    try:
        cluster.on(WORKER, "systemctl restart docker")
        assert_down(cluster)
    finally:
        live_restore(cluster, True)
    back(cluster)


def test_a_killed_launcher_takes_its_container_along(cluster: Cluster) -> None:
    cluster.on(WORKER, "kill -9 $(systemctl show clusterkit-ray -p MainPID --value)")
    assert_down(cluster)
    back(cluster)


def test_a_killed_container_ends_the_unit(cluster: Cluster) -> None:
    cluster.on(WORKER, "docker kill clusterkit-ray")
    assert_down(cluster)
    assert "137" in cluster.agent(WORKER, "status")["reason"]
    back(cluster)


def test_a_raylet_that_the_kernel_killed_ends_the_unit(cluster: Cluster) -> None:
    """As the kernel does when memory runs out: SIGKILL to one process, and the others stay."""
    cluster.on(WORKER, "pkill -9 -x raylet")
    assert_down(cluster)
    back(cluster)


def test_a_drained_node_has_left_and_comes_back(cluster: Cluster) -> None:
    # Its replica has no other place to go: without a deadline it would be left where it is.
    drained = cluster.agent("worker2", "drain", "--deadline")
    assert drained["drained"] is True
    assert cluster.agent("worker2", "status")["state"] == "degraded", "the raylet is gone, the launcher still there"
    cluster.agent("worker2", "stop")
    assert_down(cluster, "worker2")
    back(cluster, "worker2")


def test_a_rebooted_worker_is_off_until_it_is_started_and_a_head_comes_back_alone(cluster: Cluster) -> None:
    for host in (WORKER, "head"):
        cluster.container(host).restart(timeout=60)
    up = clusterkit("lab", "up", "--workers", "2", "--name", cluster.name, "--inventory", str(cluster.inventory))
    assert up.returncode == 0, up.stderr
    wait_for(lambda: cluster.agent("head", "status")["state"] == "running", 240)
    assert unit(cluster, WORKER) == "inactive"
    assert cluster.agent(WORKER, "status")["state"] == "stopped"
    changed = cluster.deploy()
    assert changed.get(WORKER), "the worker is started again"
    assert cluster.deploy() == {}
    assert {node["host"] for node in cluster.status()["nodes"] if node["alive"]} == {"head", "worker1", "worker2"}
