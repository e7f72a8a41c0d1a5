"""The whole of playbooks/hosts.yml on servers that look like ones with eight H100, from bare Debian with nouveau.

What the hosts are made of: `tests/lab/gpu_site.py`; what nvidia-smi says was recorded, for one GPU
(`tests/modules/fixtures/gpu/README.md`). The tests go through the hosts' life in their order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.conftest import Maker, clusterkit
from tests.lab.gpu_site import H100_DRIVER, H100_SERVERS, TIER_1, WORKERS, Site, changed, gpu_site, named
from tests.modules.gpu_support import H100_BDF

pytestmark = [pytest.mark.docker, pytest.mark.slow]

REPOSITORY = "/etc/apt/sources.list.d/clusterkit-cuda.sources"
DRIVER = ("nvidia-kernel-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced", "nvidia-fabricmanager")
UNITS = ("clusterkit-nvidia-devices", "nvidia-persistenced", "nvidia-fabricmanager", "clusterkit-gpu-health.timer")
# As the driver writes it; the address is that of GPU 3.
XID = "NVRM: Xid (PCI:0000:61:00): 48, pid=4711, name=ray::LLMServer, DBE (double bit error)"


@pytest.fixture(scope="module")
def site(lab_of: Maker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with gpu_site(lab_of, tmp_path_factory.mktemp("nvidia"), H100_SERVERS) as made:
        yield made


# ------------------------------------------------------------------ bare


def test_a_plan_of_bare_hosts_names_what_nvidias_gpus_need(site: Site) -> None:
    told = site.plan()
    assert (told["failed"], told["unreachable"], told["complete"]) == ([], [], True)
    for host in WORKERS:
        (source,) = named(told, host, what="file", name=REPOSITORY)
        assert "/nvidia/debian12/x86_64/" in source["diff"]
        for package in (f"nvidia-driver-pinning-{H100_DRIVER}", *DRIVER):
            missing = [item for item in named(told, host, what="package", name=package) if item["actual"] == "missing"]
            assert len(missing) == 1, package
        (blacklist,) = named(told, host, what="file", name="/etc/modprobe.d/clusterkit-nouveau.conf")
        assert "+blacklist nouveau" in blacklist["diff"]
        (driver,) = named(told, host, what="driver", name="nvidia")
        assert (driver["actual"], driver["wanted"]) == ("nouveau", H100_DRIVER)
        assert driver["disrupts"] == ["host"], "nouveau holds the GPUs"
        assert told["hosts"][host]["driver"]["state"] == "not_installed"
    site.assert_waits_for_reboots(told, "cuda_host")


# ------------------------------------------------------------------ converged


def test_from_nouveau_to_fit_with_one_reboot_each_one_after_the_other(site: Site) -> None:
    site.converge_one_by_one()
    versions = f"dpkg-query -W -f '${{Version}}\\n' {' '.join(DRIVER)}"
    for host in WORKERS:
        assert site.lab.on(host, versions).split() == [f"{H100_DRIVER}-1"] * len(DRIVER)
        assert site.lab.on(host, "ls /sys/module") == "nvidia", "the initramfs keeps nouveau away"
        assert site.lab.on(host, f"systemctl is-active {' '.join(UNITS)}").split() == ["active"] * len(UNITS)
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
        assert (driver["state"], driver["loaded"]["version"]) == ("fits", H100_DRIVER)
        assert [gpu["address"] for gpu in gpus] == H100_BDF
        assert {(gpu["model"], gpu["driver"]) for gpu in gpus} == {("NVIDIA H100 80GB HBM3", H100_DRIVER)}


# ------------------------------------------------------------------ sick


def test_a_sick_gpu_keeps_its_host_out_and_no_other(site: Site) -> None:
    site.log("worker1", XID)
    site.lab.on("worker2", "systemctl disable --now nvidia-persistenced.service")
    counts, said = site.converge(code=2)
    assert (counts["worker1"]["failed"], counts["worker2"]["failed"], counts["head"]["failed"]) == (1, 0, 0)
    assert f"worker1 is in quarantine: 1 GPU error: xid_48 on GPU 3 ({H100_BDF[3]})" in said
    assert f"error GPU 3 ({H100_BDF[3]}), xid_48: Xid 48: an uncorrectable (double-bit) memory error" in said
    assert "Fix: drain the host and reset the GPU (nvidia-smi -r -i N)" in said
    assert "clusterkit host release worker1" in said
    (finding,) = site.quarantine("worker1")["findings"]
    assert (finding["check"], finding["severity"]) == ("xid_48", "error")
    assert site.lab.agent("worker1", "start", code=3)["refused"] == "quarantine"
    # The other one was brought to its wish by the same run.
    assert counts["worker2"]["changed"] > 0
    unit = "nvidia-persistenced.service"
    assert site.lab.on("worker2", f"systemctl is-enabled {unit}; systemctl is-active {unit}").split() == [
        "enabled",
        "active",
    ]
    assert site.quarantine("worker2") is None


def test_the_next_run_leaves_it_so_and_says_how_to_lift_it(site: Site) -> None:
    counts, said = site.converge()
    assert changed(counts) == {}
    assert "worker1 is in quarantine: 1 GPU error: xid_48" in said
    assert "Once it is mended: clusterkit host release worker1" in said


def test_a_mended_host_that_was_released_is_taken_in_again(site: Site) -> None:
    """The line is still in the log of this boot: that people released the host deals with it."""
    done = clusterkit("host", "release", "worker1", "-i", str(site.inventory))
    assert done.returncode == 0, done.stderr
    counts, said = site.converge()
    assert changed(counts) == {}
    assert "worker1 is in quarantine" not in said
    assert site.quarantine("worker1") is None
    # What comes after it counts again.
    site.log("worker1", XID)
    counts, _ = site.converge("--limit", "worker1", code=2)
    assert counts["worker1"]["failed"] == 1
