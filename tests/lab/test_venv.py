"""The venv runtime over SSH: three hosts from bare Debian to an answer, and a host without a route."""

from __future__ import annotations

import pytest

from tests.lab.conftest import Cluster, Maker, clusterkit, playbook, recap
from tests.lab.test_cluster import check_replicas, check_unchanged, check_units

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(scope="module")
def venv_cluster(lab_of: Maker) -> Cluster:
    made = lab_of("venvtest", "--workers", "2", "--runtime", "venv")
    done = playbook("site.yml", made.inventory)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return made


def test_the_same_answer_without_docker(venv_cluster: Cluster) -> None:
    check_replicas(venv_cluster)
    check_units(venv_cluster, user="ray")
    assert venv_cluster.on("worker1", "command -v docker || echo none") == "none"


def test_a_second_run_changes_nothing(venv_cluster: Cluster) -> None:
    check_unchanged(venv_cluster)


def test_a_killed_launcher_and_a_drained_worker_come_back(venv_cluster: Cluster) -> None:
    venv_cluster.on("worker1", "kill -9 $(systemctl show clusterkit-ray -p MainPID --value)")
    assert venv_cluster.agent("worker2", "drain")["drained"] is True
    # With no worker left, Serve may have given the app up: then the head has it applied again.
    assert {"worker1", "worker2"} <= set(venv_cluster.deploy())
    assert venv_cluster.deploy() == {}


def test_remove_ends_everything(venv_cluster: Cluster) -> None:
    done = clusterkit("remove", "-i", str(venv_cluster.inventory), "--yes")
    assert done.returncode == 0, done.stderr
    for host in ("head", "worker1"):
        left = venv_cluster.on(host, "find /opt /etc /var/lib /var/log -path '*clusterkit*'")
        assert left == ""
        assert venv_cluster.on(host, "pgrep -c raylet || true") == "0"


def test_a_host_without_a_route_gets_its_environment_from_the_wheelhouse(lab_of: Maker) -> None:
    lab = lab_of("offlinetest", "--workers", "1", "--offline")
    # An address that is nobody's: with a route the packet would leave and be lost.
    fetch = "import urllib.request; urllib.request.urlopen('http://192.0.2.1', timeout=10)"
    assert "Network is unreachable" in lab.on("worker1", f'/usr/bin/python3 -c "{fetch}"', check=False)
    # Bare Debian: no pip and no ensurepip either; pip comes out of the wheelhouse too.
    words = ("playbooks/images.yml", lab.inventory, "--limit", "worker1", "--tags", "ray_env")
    done = playbook(*words)
    assert done.returncode == 0, done.stdout[-4000:]
    said = lab.on("worker1", "/opt/clusterkit/ray-env/bin/python -c 'import ray, torch; print(ray.__version__)'")
    assert said == "2.60.0"
    assert recap(playbook(*words).stdout)["worker1"]["changed"] == 0
