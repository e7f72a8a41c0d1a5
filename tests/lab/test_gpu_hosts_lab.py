"""The whole of playbooks/hosts.yml on servers that look like ones with eight MI300X, from bare Debian to removal.

The hosts are those of a lab; what lies below the kernel's boundary is made of files (`KERNEL`): bus, module, devices,
command line and boot id, which a boot makes anew. They do reboot: Docker leaves a container off then, and `Power`
starts it again. The packages are stand-ins from a repository on the head, and nothing comes from outside. The tests go
through the hosts' life in their order.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from tests.lab.conftest import Cluster, Maker, clusterkit, playbook, recap
from tests.modules.gpu_support import AMD_FILES, BDF, MI300X
from tests.roles.gpu_repository import GRUB, Shop, archive

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("gpg", "dpkg-deb"))), reason="builds and signs packages: needs gpg and dpkg-deb"
    ),
]

Json = dict[str, Any]

WORKERS = ("worker1", "worker2")
TAGS = "preflight,baseline,rocm_host,rdma_fabric,host_agent,gpu_health"
HOSTS_PLAYBOOK = "playbooks/hosts.yml"
REPOSITORY = "/etc/apt/sources.list.d/clusterkit-rocm.sources"
TIER_1 = {"/opt/clusterkit/bin/gpu-tier1", "/etc/clusterkit/gpu-tier1.json"}
RULES = "/etc/udev/rules.d/70-clusterkit-amdgpu.rules"
# What a boot makes of a host: firmware, boot loader and kernel.
KERNEL = """#!/bin/sh
set -e
top=/srv/kernel
cat /proc/sys/kernel/random/uuid >$top/boot_id
sed -n 's/^ *linux //p' /boot/grub/grub.cfg >$top/cmdline
rm -rf $top/class $top/module $top/pci/devices/*/driver
mkdir -p $top/class $top/module $top/pci/drivers
for path in /sys/class/*; do
    mkdir $top/class/${path##*/}
    mount --bind $path $top/class/${path##*/}
done
[ ! -d $top/class/drm ] || umount $top/class/drm
mkdir -p $top/class/drm
mount --bind $top/boot_id /proc/sys/kernel/random/boot_id
mount --bind $top/cmdline /proc/cmdline
mount --bind $top/pci /sys/bus/pci
mount --bind $top/module /sys/module
mount --rbind $top/class /sys/class
[ ! -e /lib/modules/$(uname -r)/updates/dkms/amdgpu.ko ] || modprobe amdgpu
"""
# The kernel's part of it: the driver takes the GPUs, and its devices appear.
MODPROBE = """#!/bin/sh
set -e
top=/srv/kernel
[ "$1" = amdgpu ]
mkdir -p $top/module/amdgpu $top/pci/drivers/amdgpu /dev/dri
for key in version srcversion; do modinfo -F $key amdgpu >$top/module/amdgpu/$key; done
number=128
for device in $top/pci/devices/*; do
    grep -q 0x1200 $device/class || continue
    ln -s ../../drivers/amdgpu $device/driver
    mkdir -p $top/class/drm/renderD$number
    ln -s /sys/bus/pci/devices/${device##*/} $top/class/drm/renderD$number/device
    touch /dev/dri/renderD$number
    number=$((number + 1))
done
touch /dev/kfd
echo live >$top/module/amdgpu/initstate
"""
KERNEL_UNIT = """
[Unit]
DefaultDependencies=no
Before=sysinit.target systemd-journald.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/sbin/stand-in-kernel
[Install]
WantedBy=sysinit.target
"""
# Its answers are files; without its driver it has none.
AMD_SMI = """#!/bin/sh
answer=/srv/amd-smi/$(echo "$*" | sed 's/ --json$//; s/ -/_/')
[ -e /sys/module/amdgpu ] || { echo "amd-smi: error: the driver is not loaded" >&2; exit 1; }
[ -e "$answer" ] || { echo "amd-smi: error: invalid choice: '$1'" >&2; exit 2; }
cat "$answer"
"""
# The real one would tell of the machine that the lab runs on.
DMESG = "#!/bin/sh\necho '2026-01-01T00:00:00,000000+00:00 Linux version 6.1.0'\n"
NODE = {
    "/opt/clusterkit/bin/ray-node": """print('{"state": "stopped", "changed": false}')\n""",
    "/etc/systemd/system/clusterkit-ray.service": "[Service]\nExecStart=/bin/false\n",
}
PREPARE = """
set -e
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /var/lib/apt/lists/*
echo 'deb [trusted=yes] http://%s:8099/debian ./' >/etc/apt/sources.list
"""
PREPARE_GPUS = """
set -e
# Of the package udev, which every server has.
groupadd --system render
mkdir -p /boot/grub /etc/default/grub.d /etc/udev/rules.d /lib/modules/$(uname -r)
touch /etc/default/grub /boot/vmlinuz-$(uname -r)
cp /usr/sbin/update-grub /usr/sbin/grub-mkconfig
update-grub
systemctl enable --now stand-in-kernel.service
"""
SERVE = """
systemd-run -q --unit shop --working-directory /srv/shop /usr/bin/python3 -m http.server 8099
until python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))' 2>/dev/null; do sleep 0.1; done
"""
SETTINGS: Json = {
    "clusterkit_name": "gpulab",
    "clusterkit_stack": "rocm72",
    "clusterkit_runtime": "venv",
    "clusterkit_apps": [
        {
            "name": "tiny",
            "template": "llm",
            "route_prefix": "/",
            "parameters": {"model_id": "tiny-llama", "model_source": {"make": "tiny-llama"}, "tensor_parallel": 4},
        }
    ],
    # As in every lab: small hosts that share a kernel.
    "preflight_memory_gib": 2,
    "baseline_sysctl": {},
    "rocm_host_sysctl": {},
    # Ray is not installed here.
    "preflight_pythons": ["3.11"],
    "preflight_disk_gib": {},
    "host_reboot_timeout_s": 300,
    "host_reboot_settle_s": 30,
}
POOL: Json = {
    "clusterkit_accelerator": "rocm",
    "clusterkit_gpus": 8,
    "clusterkit_gpu_model": "AMD-Instinct-MI300X-OAM",
    "clusterkit_gpu_memory_gib": 192,
    "clusterkit_pool": {"mode": "fixed"},
}


@dataclass
class Power:
    """Switches a host on again that has rebooted, once `together` of them are off. Keeps what it saw."""

    lab: Cluster
    together: int = 1
    seen: list[tuple[str, str]] = field(default_factory=list)
    # Hosts of which another was not in service when they went down.
    alone: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        label = f"clusterkit.lab={self.lab.name}"
        self.stream = docker.from_env().events(decode=True, filters={"label": label, "event": ["die", "start"]})
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        down: list[str] = []
        for event in self.stream:
            host = event["Actor"]["Attributes"]["clusterkit.lab.host"]
            self.seen.append((event["Action"], host))
            if event["Action"] != "die":
                continue
            down.append(host)
            if self.together == 1:
                (other,) = {*WORKERS} - {host}
                ready = self.lab.on(other, "systemctl is-active ssh.service clusterkit-acs.service", check=False)
                self.alone += [host] if ready.split() != ["active", "active"] else []
            if len(down) >= self.together:
                for name in down:
                    self.lab.container(name).start()
                down = []


@dataclass
class Site:
    """The lab, its inventory with GPUs, and what switches its hosts on."""

    lab: Cluster
    power: Power

    @property
    def inventory(self) -> Path:
        return self.lab.inventory

    def converge(self, *words: str, code: int = 0) -> tuple[dict[str, dict[str, int]], str]:
        """(Ansible's counts by host, all that it said in one line)."""
        done = playbook(HOSTS_PLAYBOOK, self.inventory, *words)
        assert done.returncode == code, done.stdout[-8000:] + done.stderr[-2000:]
        return recap(done.stdout), " ".join(done.stdout.split())

    def plan(self, *words: str) -> Json:
        done = clusterkit("plan", "-i", str(self.inventory), "--json", "--tags", TAGS, *words)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        found: Json = json.loads(done.stdout)
        return found

    def boots(self) -> dict[str, str]:
        return {host: self.boot_of(host) for host in WORKERS}

    def boot_of(self, host: str) -> str:
        """The id of its boot."""
        return self.lab.on(host, "cat /proc/sys/kernel/random/boot_id")

    def quarantine(self, host: str) -> Any:
        """From the host's record: without Ray's launcher, the agent has no status to tell."""
        record = json.loads(self.lab.on(host, "cat /var/lib/clusterkit/host.json 2>/dev/null || echo '{}'"))
        return record.get("quarantine")

    def set_ecc_errors(self, host: str, gpu: int, count: int) -> None:
        answer = json.loads((MI300X / AMD_FILES["metric"]).read_text())
        answer["gpu_data"][gpu]["ecc"]["total_uncorrectable_count"] = count
        self.put(host, {"/srv/amd-smi/metric": json.dumps(answer).encode()})

    def put(self, host: str, files: dict[str, bytes]) -> None:
        self.lab.container(host).put_archive("/", archive(files))


def bus() -> dict[str, bytes]:
    """Eight GPUs, as the kernel shows them before there is a driver."""
    facts = {"vendor": "0x1002", "device": "0x74a1", "class": "0x120000", "current_link_width": "16"}
    return {
        f"/srv/kernel/pci/devices/{address}/{name}": f"{text}\n".encode()
        for address in BDF
        for name, text in facts.items()
    }


def write_inventory(folder: Path, made: Path, head: str) -> None:
    """The lab's own hosts, in a pool of servers with GPUs."""
    hosts = yaml.safe_load((made / "hosts.yml").read_text())
    pools = hosts["all"]["children"]["ray_workers"]["children"]
    pools["mi300x"] = pools.pop("cpu_pool")
    for name, content in (
        ("hosts.yml", hosts),
        ("group_vars/all/main.yml", {**SETTINGS, "rocm_host_repository_url": f"http://{head}:8099/amd"}),
        ("group_vars/mi300x.yml", POOL),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))


@pytest.fixture(scope="module")
def shop() -> Iterator[dict[str, bytes]]:
    # Short, for gpg's socket.
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    try:
        made = Shop(folder)
        made.distribution([os_release()], ("python3-venv", "libnuma1"))
        made.amd("30.30.3", "6.16.13.30300300-2327507", "7.2.3", "26.2.2.70203-81~22.04", smi=AMD_SMI)
        files = (path for path in made.root.rglob("*") if path.is_file())
        yield {f"/srv/shop/{path.relative_to(made.root)}": path.read_bytes() for path in files}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def os_release() -> str:
    """The kernel is this machine's."""
    return Path("/proc/sys/kernel/osrelease").read_text().strip()


@pytest.fixture(scope="module")
def site(lab_of: Maker, shop: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = lab_of("gpulab", "--workers", "2", "--offline", "--runtime", "venv")
    inventory = tmp_path_factory.mktemp("gpus")
    lab = Cluster(made.name, inventory)
    head = lab.on("head", "hostname -i")
    write_inventory(inventory, made.inventory, head)
    site = Site(lab, Power(lab))
    try:
        site.put("head", shop)
        lab.on("head", PREPARE % head + SERVE)
        tools = {
            "/usr/sbin/update-grub": GRUB,
            "/usr/local/sbin/stand-in-kernel": KERNEL,
            "/usr/local/sbin/modprobe": MODPROBE,
            "/usr/local/bin/dmesg": DMESG,
            "/etc/systemd/system/stand-in-kernel.service": KERNEL_UNIT,
        }
        answers = {f"/srv/amd-smi/{name.split('.')[0]}": (MI300X / name).read_bytes() for name in AMD_FILES.values()}
        for host in WORKERS:
            site.put(host, {**bus(), **answers, **{path: text.encode() for path, text in tools.items()}})
            lab.on(host, PREPARE % head + PREPARE_GPUS)
        yield site
    finally:
        site.power.stream.close()


def named(told: Json, host: str, **wanted: str) -> list[Json]:
    """A host's changes whose fields are these."""
    found = (change for change in told["changes"] if change["host"] == host)
    return [change for change in found if all(change[key] == value for key, value in wanted.items())]


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
    assert not {change["role"] for change in told["changes"] if change["host"] == "head"} & {"rocm_host", "gpu_health"}
    assert {(item["host"], item["what"]) for item in told["disruptions"]} == {(host, "host") for host in WORKERS}
    assert site.power.seen == []


# ------------------------------------------------------------------ converged


def test_from_bare_to_fit_with_one_reboot_each_one_after_the_other(site: Site) -> None:
    before = site.boots()
    counts, _ = site.converge()
    after = site.boots()
    assert all(before[host] != after[host] for host in WORKERS)
    first, second = (host for action, host in site.power.seen if action == "die")
    assert {first, second} == {*WORKERS}
    assert site.power.seen == [("die", first), ("start", first), ("die", second), ("start", second)]
    assert site.power.alone == [], "the first was back in service before the second went"
    assert counts["head"]["failed"] == 0
    for host in WORKERS:
        assert "pci=realloc=off pci=bfsort iommu=pt" in site.lab.on(host, "cat /proc/cmdline")
        assert site.lab.on(host, "systemctl is-active clusterkit-gpu-health.timer") == "active"
        assert site.lab.on(host, "ls /var/lib/clusterkit/reboot.json 2>/dev/null || echo gone") == "gone"
    assert site.lab.on("head", "ls /opt/clusterkit/bin") == "host-agent"


def test_a_second_run_changes_nothing_and_needs_no_repository(site: Site) -> None:
    site.lab.on("head", "systemctl stop shop.service")
    boots = site.boots()
    counts, _ = site.converge()
    assert {host: count["changed"] for host, count in counts.items()} == {
        "localhost": 0,
        "head": 0,
        **dict.fromkeys(WORKERS, 0),
    }
    assert site.boots() == boots


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
    assert {host: count["changed"] for host, count in counts.items() if count["changed"]} == {}
    assert f"worker1 is in quarantine: 1 GPU error: ecc_uncorrectable on GPU 3 ({BDF[3]})" in said
    assert "Once it is mended: clusterkit host release worker1" in said


def test_a_mended_host_that_was_released_is_taken_in_again(site: Site) -> None:
    site.set_ecc_errors("worker1", gpu=3, count=0)
    done = clusterkit("host", "release", "worker1", "-i", str(site.inventory))
    assert done.returncode == 0, done.stderr
    counts, said = site.converge()
    assert {host: count["changed"] for host, count in counts.items() if count["changed"]} == {}
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
    del site.power.seen[:]
    site.power.together = 2
    site.converge("-e", json.dumps({**more, "clusterkit_max_unavailable": 2}))
    site.power.together = 1
    assert [action for action, _ in site.power.seen] == ["die", "die", "start", "start"]
    for host in WORKERS:
        assert "standin=1" in site.lab.on(host, "cat /proc/cmdline")


def test_a_host_that_does_not_come_back_stops_the_one_behind_it(site: Site) -> None:
    more = {"rocm_host_kernel_parameters": ["pci=realloc=off", "pci=bfsort", "iommu=pt", "standin=2"]}
    words = ("-e", json.dumps({**more, "host_reboot_timeout_s": 20}))
    before = site.boots()
    del site.power.seen[:]
    site.power.together = 3
    counts, said = site.converge(*words, code=2)
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
    site.converge(*words)
    assert site.boot_of(gone) == came_back
    assert site.boot_of(other) != before[other]


# ------------------------------------------------------------------ gone


def test_remove_takes_away_what_the_roles_have_made(site: Site) -> None:
    # As if playbooks/ray.yml had run: launcher and unit of the node.
    site.put("worker1", {path: text.encode() for path, text in NODE.items()})
    site.lab.on("worker1", "systemctl daemon-reload")
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
