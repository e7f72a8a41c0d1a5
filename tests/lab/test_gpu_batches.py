"""Another driver on servers that look like ones with eight MI300X, while Ray runs on them: batches, by consent alone.

Ray is the real one, without an engine: three GPU nodes that announce what the inventory declares. So drain, stop,
reboot, gate and return are real; what moves away is not, since no engine here can hold such a GPU: replicas that move
are in test_hosts.py and test_runtime.py. The venv runtime: in a container the device files would have to be real ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.conftest import Cluster, Maker, playbook, recap
from tests.lab.gpu_site import MI300X_SERVERS, Site, changed, gpu_site

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

WORKERS = ("worker1", "worker2", "worker3")
# As in every lab; and Ray alone, from wheels that the controller brings.
RAY = MI300X_SERVERS.but(
    "batchlab",
    clusterkit_object_store_gib=0.5,
    ray_env_source="wheelhouse",
    ray_env_engine={
        "requirements": ["ray[serve]==2.60.0"],
        "exclude": [],
        "provides_vllm": None,
        "find_links": [],
        "extra_index_urls": [],
        "python": ["3.11"],
        "system_packages": [],
        "note": "",
    },
)
LIFE = "systemctl show clusterkit-ray -p InvocationID --value"
LOADED = "cat /sys/module/amdgpu/srcversion; modinfo -F srcversion amdgpu"


def serves(lab: Cluster, host: str) -> bool:
    return bool(lab.agent(host, "status")["state"] == "running")


@pytest.fixture(scope="module")
def site(lab_of: Maker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three workers with GPUs, on which Ray runs."""
    with gpu_site(lab_of, tmp_path_factory.mktemp("batches"), RAY, workers=3, in_service=serves) as made:
        # At once: nothing runs there yet.
        made.power.together = 3
        made.converge("-e", '{"clusterkit_max_unavailable": 3}')
        made.power.together = 1
        for name, *words in (("playbooks/images.yml", "--tags", "ray_env"), ("playbooks/ray.yml",)):
            done = playbook(name, made.inventory, *words)
            assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        made.power.forget()
        yield made


def nodes(site: Site) -> dict[str, dict[str, Any]]:
    """Ray's nodes that are alive, by host."""
    return {node["host"]: node for node in site.lab.status()["nodes"] if node["alive"]}


def lives(site: Site) -> dict[str, str]:
    """What changes with every start of a node."""
    return {host: site.lab.on(host, LIFE) for host in WORKERS}


def check_cluster(site: Site) -> None:
    """All are in, with the GPUs that the inventory declares; the head has none."""
    found = nodes(site)
    assert set(found) == {"head", *WORKERS}
    for host in WORKERS:
        resources = found[host]["resources"]
        assert (resources["GPU"], resources["accelerator_type:AMD-Instinct-MI300X-OAM"]) == (8, 8)
        assert site.lab.agent(host, "status")["state"] == "running"
    assert "GPU" not in found["head"]["resources"]


def check_rebooted_once_each(site: Site, before: dict[str, str], started: dict[str, str]) -> None:
    """Every worker, into the driver that is on its disk, and back in Ray."""
    assert sorted(host for action, host in site.power.seen if action == "die") == sorted(WORKERS)
    after = site.boots()
    for host in WORKERS:
        assert after[host] != before[host]
        loaded, on_disk = site.lab.on(host, LOADED).split()
        assert loaded == on_disk, host
        assert site.lab.on(host, LIFE) != started[host]
    check_cluster(site)


def pin(site: Site, version: str) -> None:
    (site.inventory / "group_vars/all/driver.yml").write_text(f"clusterkit_driver_version: {version}\n")


# ------------------------------------------------------------------ without consent


def test_ray_runs_on_every_host_with_the_declared_gpus(site: Site) -> None:
    check_cluster(site)


def test_a_plan_says_which_nodes_another_driver_would_stop(site: Site) -> None:
    told = site.plan("-e", "clusterkit_driver_version=30.30.4")
    assert {(item["host"], item["what"], item["needs_consent"]) for item in told["disruptions"]} == {
        (host, "host", True) for host in WORKERS
    }


def test_without_consent_the_driver_is_installed_and_its_reboot_listed_and_left(site: Site) -> None:
    pin(site, "30.30.4")
    boots, started = site.boots(), lives(site)
    _, said = site.converge()
    for host in WORKERS:
        assert f"{host} was left without a reboot: another build of amdgpu 6.16.13 is loaded" in said
        version = site.lab.on(host, "dpkg-query -W -f '${Version}' amdgpu-dkms")
        assert version == "1:6.16.13.30300400-2341068.22.04"
        loaded, on_disk = site.lab.on(host, LOADED).split()
        assert loaded != on_disk
    assert (site.boots(), lives(site), site.power.seen) == (boots, started, [])
    check_cluster(site)
    # The same again changes nothing, and says it again.
    counts, said = site.converge()
    assert changed(counts) == {}
    assert "worker3 was left without a reboot" in said
    assert lives(site) == started


# ------------------------------------------------------------------ by consent


def test_by_consent_they_go_one_after_the_other_and_come_back(site: Site) -> None:
    boots, started = site.boots(), lives(site)
    _, said = site.converge("-e", "clusterkit_allow_disruption=true")
    check_rebooted_once_each(site, boots, started)
    assert sorted(re.findall(r"Drain the node, by consent\] \*+ changed: \[(\w+)\]", said)) == sorted(WORKERS)
    # Each was off and on again before the next one went, and all others served then.
    assert [action for action, _ in site.power.seen] == ["die", "start"] * 3
    assert [host for _, host in site.power.seen[::2]] == [host for _, host in site.power.seen[1::2]]
    assert site.power.away == [(host, ()) for action, host in site.power.seen if action == "die"]


def test_a_second_run_by_consent_disturbs_nobody(site: Site) -> None:
    site.power.forget()
    boots, started = site.boots(), lives(site)
    counts, _ = site.converge("-e", "clusterkit_allow_disruption=true")
    assert changed(counts) == {}
    done = playbook("playbooks/ray.yml", site.inventory, "-e", "clusterkit_allow_disruption=true")
    assert done.returncode == 0, done.stdout[-4000:]
    assert changed(recap(done.stdout)) == {}
    assert (site.boots(), lives(site), site.power.seen) == (boots, started, [])


def test_with_leave_for_two_there_are_two_batches_and_never_three_away(site: Site) -> None:
    """What the batches of one keep from happening does happen here: no host of the first comes back before both go."""
    pin(site, "30.30.3")
    site.power.forget()
    site.power.turns = [2, 1]
    boots, started = site.boots(), lives(site)
    leave = {"clusterkit_allow_disruption": True, "clusterkit_max_unavailable": 2}
    site.converge("-e", json.dumps(leave))
    check_rebooted_once_each(site, boots, started)
    assert [action for action, _ in site.power.seen] == ["die", "die", "start", "start", "die", "start"]
    assert site.power.most_away() == 2
    last, others = site.power.away[-1]
    assert (last, others) == (site.power.seen[-1][1], ()), "both were in service again before the third went"
