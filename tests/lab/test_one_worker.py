"""A head and one worker in containers, from bare to an answer and back: what CI sees of the container runtime."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import check_openai
from tests.lab.conftest import Cluster, Maker, clusterkit, playbook, recap

pytestmark = [pytest.mark.docker, pytest.mark.engine]

SITE_DAEMON = '{\n "log-opts": {"tag": "site"},\n "labels": ["rack=a1"]\n}\n'
# What packages leave behind, which stay: their data, caches, and what their scripts register.
OF_PACKAGES = (
    "/etc/.pwd.lock",
    "/etc/group",
    "/etc/gshadow",
    "/etc/ld.so.cache",
    "/etc/passwd",
    "/etc/shadow",
    "/etc/subgid",
    "/etc/subuid",
    "/etc/alternatives/",
    "/etc/apparmor.d/",
    "/etc/cni",
    "/etc/docker/key.json",
    "/etc/rc",
    "/home/ops/.ansible",
    "/home/ops/.cache",
    "/var/lib/apt/",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/lib/dpkg/",
    "/var/lib/systemd/",
    "/var/lib/ucf/",
    "/root/.ansible",
)


def files(lab: Cluster, host: str) -> dict[str, str]:
    """Every file and folder with mode, owner and, of plain files, a checksum; what packages own is left out."""
    where = "/etc /home /opt /root /srv /usr/local /var/lib"
    listed = lab.on(host, f"find {where} -xdev -printf '%p\\t%y %m %u:%g %l\\n'")
    sums = lab.on(host, f"find {where} -xdev -type f -exec sha256sum {{}} +", check=False)
    packaged = set(lab.on(host, "cat /var/lib/dpkg/info/*.list").splitlines())
    found = dict(line.split("\t", 1) for line in listed.splitlines() if "\t" in line)
    for line in sums.splitlines():
        digest, _, path = line.partition("  ")
        if path in found:
            found[path] += " " + digest
    return {path: what for path, what in found.items() if path not in packaged and not _of_a_package(path)}


def _of_a_package(path: str) -> bool:
    """Units that a package enables are its own; ours are ours to take away."""
    enabled = path.startswith("/etc/systemd/system/") and ".wants" in path and "clusterkit" not in path
    return enabled or path.startswith(OF_PACKAGES)


def packages(lab: Cluster, host: str) -> set[str]:
    return set(lab.on(host, "dpkg-query -W -f '${Package}\\n'").splitlines())


@pytest.fixture(scope="module")
def lab(lab_of: Maker) -> Cluster:
    made = lab_of("onetest", "--workers", "1")
    # The site was here first: Docker's settings, a user's file.
    made.on("worker1", f"mkdir -p /etc/docker && printf '%s' '{SITE_DAEMON}' > /etc/docker/daemon.json")
    made.on("worker1", "mkdir -p /srv/site && echo 'ours' > /srv/site/notes")
    return made


@pytest.fixture(scope="module")
def before(lab: Cluster) -> dict[str, dict[str, str]]:
    return {host: files(lab, host) for host in ("head", "worker1")}


@pytest.fixture(scope="module")
def deployed(lab: Cluster, before: dict[str, dict[str, str]]) -> Cluster:
    done = playbook("site.yml", lab.inventory)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    return lab


def test_from_bare_to_an_answer(deployed: Cluster) -> None:
    (worker,) = [node for node in deployed.status()["nodes"] if node["host"] == "worker1"]
    check_openai(f"http://{worker['node_ip']}:8000/v1")
    assert deployed.on("worker1", "docker inspect --format '{{.State.Running}}' clusterkit-ray") == "true"


def test_a_second_run_and_a_plan_find_nothing_to_do(deployed: Cluster) -> None:
    again = playbook("site.yml", deployed.inventory)
    assert again.returncode == 0, again.stdout[-4000:]
    assert {host: count["changed"] for host, count in recap(again.stdout).items() if count["changed"]} == {}
    plan = clusterkit("plan", "-i", str(deployed.inventory), "--json")
    assert plan.returncode == 0, plan.stderr
    assert json.loads(plan.stdout)["changes"] == []


def test_the_sites_own_settings_of_docker_are_kept(deployed: Cluster) -> None:
    daemon = json.loads(deployed.on("worker1", "cat /etc/docker/daemon.json"))
    assert daemon["labels"] == ["rack=a1"]
    assert daemon["log-opts"]["tag"] == "site"
    assert daemon["live-restore"] is True


def test_remove_leaves_what_was_there_before(deployed: Cluster, before: dict[str, dict[str, str]]) -> None:
    done = clusterkit("remove", "-i", str(deployed.inventory), "--yes")
    assert done.returncode == 0, done.stderr
    for host in ("head", "worker1"):
        after = files(deployed, host)
        assert {path: what for path, what in after.items() if before[host].get(path) != what} == {}, "what is new"
        # What a package has come to own is left out above, and there.
        left_out = sorted(set(before[host]) - set(after))
        assert [path for path in left_out if deployed.on(host, f"test -e '{path}' || echo gone")] == []
        assert deployed.on(host, "docker ps --all --quiet; docker image ls --quiet clusterkit/*") == ""
        assert deployed.on(host, "id ray >/dev/null 2>&1 && echo there || echo gone") == "gone"
        assert deployed.on(host, "pgrep -c raylet || true") == "0"
        # Nobody can tell who else has come to need them.
        assert "docker.io" in packages(deployed, host)
    assert deployed.on("worker1", "cat /etc/docker/daemon.json") == SITE_DAEMON.strip()
    again = clusterkit("remove", "-i", str(deployed.inventory), "--yes")
    assert again.returncode == 0, again.stderr
