"""The whole of playbooks/hosts.yml on servers that look like ones with eight MI300X, from bare Debian to removal.

What the hosts are made of: `tests/lab/gpu_site.py`. The tests go through the hosts' life in their order.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.lab.conftest import clusterkit, playbook, recap
from tests.lab.gpu_site import TIER_1, WORKERS, Site, changed, named
from tests.modules.gpu_support import BDF

pytestmark = [pytest.mark.docker, pytest.mark.slow]

REPOSITORY = "/etc/apt/sources.list.d/clusterkit-rocm.sources"
RULES = "/etc/udev/rules.d/70-clusterkit-amdgpu.rules"


# ------------------------------------------------------------------ bare


def test_a_plan_of_bare_hosts_names_what_gpus_need(site: Site) -> None:
    told = site.plan()
    assert (told["failed"], told["unreachable"], told["complete"]) == ([], [], True)
    for host in WORKERS:
        (source,) = named(told, host, what="file", name=REPOSITORY)
        assert "amd/amdgpu/30.30.3/ubuntu" in source["diff"]
        (package,) = [
            item for item in named(told, host, what="package", name="amdgpu-dkms") if item["wanted"] != "held"
        ]
        assert package["actual"] == "missing"
        (driver,) = named(told, host, what="driver", name="amdgpu")
        assert driver["actual"] == "nothing"
        assert driver["disrupts"] == ["host"], "the kernel was booted without its parameters"
        parameters = {item["name"] for item in named(told, host, what="kernel parameter")}
        assert parameters >= {"pci=realloc=off", "pci=bfsort", "iommu=pt"}
        assert told["hosts"][host]["driver"]["state"] == "not_installed"
    site.assert_waits_for_reboots(told, "rocm_host")


# ------------------------------------------------------------------ converged


def test_from_bare_to_fit_with_one_reboot_each_one_after_the_other(site: Site) -> None:
    site.converge_one_by_one()
    for host in WORKERS:
        assert "pci=realloc=off pci=bfsort iommu=pt" in site.lab.on(host, "cat /proc/cmdline")
        assert site.lab.on(host, "systemctl is-active clusterkit-gpu-health.timer") == "active"
        assert site.lab.on(host, "ls /var/lib/clusterkit/reboot.json 2>/dev/null || echo gone") == "gone"
    assert site.lab.on("head", "ls /opt/clusterkit/bin") == "host-agent"


def test_a_second_run_changes_nothing_and_needs_no_repository(site: Site) -> None:
    site.lab.on("head", "systemctl stop shop.service")
    site.assert_converged()


def test_a_plan_of_fit_hosts_changes_nothing_and_shows_driver_and_gpus(site: Site) -> None:
    told = site.plan()
    assert (told["failed"], told["disruptions"]) == ([], [])
    # Tier 1 has a playbook of its own, which did not run.
    assert {change["name"] for change in told["changes"]} <= TIER_1
    for host in WORKERS:
        driver, gpus = told["hosts"][host]["driver"], told["hosts"][host]["gpus"]
        assert (driver["state"], driver["loaded"]["version"]) == ("fits", "6.16.13")
        assert [gpu["address"] for gpu in gpus] == BDF
        assert {(gpu["model"], gpu["driver"]) for gpu in gpus} == {("AMD Instinct MI300X", "6.16.13")}
    assert told["hosts"]["head"]["driver"] is None
    assert told["hosts"]["head"]["gpus"] == []


# ------------------------------------------------------------------ sick


def test_a_sick_gpu_keeps_its_host_out_and_no_other(site: Site) -> None:
    site.set_ecc_errors("worker1", gpu=3, count=2)
    site.lab.on("worker2", f"rm {RULES}")
    counts, said = site.converge(code=2)
    assert (counts["worker1"]["failed"], counts["worker2"]["failed"], counts["head"]["failed"]) == (1, 0, 0)
    assert "worker1 is in quarantine" in said
    assert "clusterkit host release worker1" in said
    (finding,) = site.quarantine("worker1")["findings"]
    assert (finding["check"], finding["subject"]) == ("ecc_uncorrectable", f"GPU 3 ({BDF[3]})")
    assert "2 uncorrectable memory errors" in finding["problem"]
    assert site.lab.agent("worker1", "start", code=3)["refused"] == "quarantine"
    # The other one was brought to its wish by the same run.
    assert counts["worker2"]["changed"] > 0
    assert "kfd" in site.lab.on("worker2", f"cat {RULES}")
    assert site.quarantine("worker2") is None


def test_the_next_run_leaves_it_so_and_says_how_to_lift_it(site: Site) -> None:
    counts, said = site.converge()
    assert changed(counts) == {}
    assert f"worker1 is in quarantine: 1 GPU error: ecc_uncorrectable on GPU 3 ({BDF[3]})" in said
    assert "Once it is mended: clusterkit host release worker1" in said


def test_a_mended_host_that_was_released_is_taken_in_again(site: Site) -> None:
    site.set_ecc_errors("worker1", gpu=3, count=0)
    done = clusterkit("host", "release", "worker1", "-i", str(site.inventory))
    assert done.returncode == 0, done.stderr
    counts, said = site.converge()
    assert changed(counts) == {}
    assert "worker1 is in quarantine" not in said
    assert site.quarantine("worker1") is None
    assert site.lab.agent("worker1", "start", code=3)["refused"] == "generation", "there is no Ray here yet"


# ------------------------------------------------------------------ both at once, by consent


def test_with_leave_for_two_both_are_rebooted_at_once(site: Site) -> None:
    """What the batches of one keep from happening: here no host comes back before both are down."""
    more = {"rocm_host_kernel_parameters": ["pci=realloc=off", "pci=bfsort", "iommu=pt", "standin=1"]}
    told = site.plan("-e", json.dumps(more))
    stopped = {(item["host"], item["what"]) for item in told["disruptions"]}
    assert stopped == {(host, "host") for host in WORKERS}
    site.power.forget()
    site.power.together = 2
    site.converge("-e", json.dumps({**more, "clusterkit_max_unavailable": 2}))
    site.power.together = 1
    assert site.power.most_away() == 2
    assert [action for action, _ in site.power.seen] == ["die", "die", "start", "start"]
    for host in WORKERS:
        assert "standin=1" in site.lab.on(host, "cat /proc/cmdline")


def test_a_host_that_does_not_come_back_stops_the_one_behind_it(site: Site) -> None:
    more = {"rocm_host_kernel_parameters": ["pci=realloc=off", "pci=bfsort", "iommu=pt", "standin=2"]}
    before = site.boots()
    site.power.forget()
    site.power.together = 3
    counts, said = site.converge("-e", json.dumps({**more, "host_reboot_timeout_s": 20}), code=2)
    ((action, gone),) = site.power.seen
    (other,) = {*WORKERS} - {gone}
    assert action == "die"
    assert (counts[gone]["failed"], counts[other]["failed"]) == (1, 1)
    assert f"left as it is: {gone} failed before its turn came" in said
    assert site.boot_of(other) == before[other]
    # Mended, the same command goes on where it stopped.
    site.power.together = 1
    site.lab.container(gone).start()
    site.lab.on(gone, "until systemctl is-active --quiet ssh.service; do sleep 0.2; done")
    came_back = site.boot_of(gone)
    site.converge("-e", json.dumps(more))
    assert site.boot_of(gone) == came_back
    assert site.boot_of(other) != before[other]


# ------------------------------------------------------------------ gone


def test_remove_takes_away_what_the_roles_have_made(site: Site) -> None:
    done = playbook("playbooks/remove.yml", site.inventory, "--limit", "worker1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    left = site.lab.on("worker1", "find /opt /etc /usr/local /var/lib /var/log -path '*clusterkit*'")
    assert left == ""
    assert site.lab.on("worker1", "apt-mark showhold") == ""
    assert "iommu" not in site.lab.on("worker1", "cat /boot/grub/grub.cfg")
    assert site.lab.on("worker1", "dpkg-query -W -f '${db:Status-Status}' amdgpu-dkms") == "installed"
    assert re.search(r"stay: .*amdgpu-dkms", " ".join(done.stdout.split()))
    again = playbook("playbooks/remove.yml", site.inventory, "--limit", "worker1")
    assert again.returncode == 0, again.stdout[-6000:] + again.stderr
    assert recap(again.stdout)["worker1"]["changed"] == 0
