"""Servers that look like ones with eight MI300X or H100, made of a lab's hosts.

What lies below the kernel's boundary is made of files (`KERNEL`): bus, module, devices, command line and boot id,
which a boot makes anew. They do reboot: Docker leaves a container off then, and `Power` starts it again. The packages
are stand-ins from a repository on the head, and nothing comes from outside. What a kind of server has of its own is a
`Kind`: `MI300X_SERVERS`, `H100_SERVERS`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest
import yaml

from tests.lab.conftest import Cluster, Maker, clusterkit, playbook, recap
from tests.modules.gpu_support import AMD_FILES, BDF, H100, H100_BDF, MI300X
from tests.roles.gpu_repository import GRUB, Shop, archive

Json = dict[str, Any]

WORKERS = ("worker1", "worker2")
HOSTS_PLAYBOOK = "playbooks/hosts.yml"
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
"""
BOOT_AMD = """[ ! -e /lib/modules/$(uname -r)/updates/dkms/amdgpu.ko ] || modprobe amdgpu
"""
# nouveau comes first, where the initramfs does not keep it away.
BOOT_NVIDIA = """if ! grep -q '^blacklist nouveau' /boot/initrd.img-$(uname -r); then
    mkdir -p $top/module/nouveau
    echo live >$top/module/nouveau/initstate
elif [ -e /lib/modules/$(uname -r)/updates/dkms/nvidia.ko ]; then
    modprobe nvidia
fi
"""
# The kernel's part of it: the driver takes the GPUs, and its devices appear.
MODPROBE_AMD = """#!/bin/sh
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
# NVIDIA's makes no device files.
MODPROBE_NVIDIA = """#!/bin/sh
set -e
top=/srv/kernel
[ "$1" = nvidia ]
[ ! -e $top/module/nouveau ] || { echo "modprobe: ERROR: could not insert 'nvidia': No such device" >&2; exit 1; }
mkdir -p $top/module/nvidia $top/pci/drivers/nvidia
for key in version srcversion; do modinfo -F $key nvidia >$top/module/nvidia/$key; done
for device in $top/pci/devices/*; do
    ! grep -q 0x0302 $device/class || ln -s ../../drivers/nvidia $device/driver
done
echo live >$top/module/nvidia/initstate
"""
# As far as a boot looks at it: what modprobe is told in there.
UPDATE_INITRAMFS = """#!/bin/sh
cat /etc/modprobe.d/*.conf >/boot/initrd.img-$(uname -r) 2>/dev/null
exit 0
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
# As AMD's; it has NVIDIA's helper make the GPUs' device files. What it says without its driver is the real one's.
NVIDIA_SMI = """#!/bin/sh
if [ ! -e /sys/module/nvidia ]; then
    echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest" \\
        "NVIDIA driver is installed and running."
    exit 9
fi
touch /dev/nvidiactl
number=0
for device in /sys/bus/pci/devices/*; do
    grep -q 0x0302 $device/class || continue
    touch /dev/nvidia$number
    number=$((number + 1))
done
case "$*" in
    "-q -x") cat /srv/nvidia-smi/q_x.xml ;;
    --query-gpu=*) cat /srv/nvidia-smi/query_gpu.csv ;;
    "nvlink -s") cat /srv/nvidia-smi/nvlink_s.txt ;;
    *) echo "ERROR: Option $1 is not recognized." >&2; exit 2 ;;
esac
"""
# The real one would tell of the machine that the lab runs on.
DMESG = """#!/bin/sh
echo '2026-01-01T00:00:00,000000+00:00 Linux version 6.1.0'
[ ! -e /srv/dmesg ] || cat /srv/dmesg
"""
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
[ ! -e /usr/sbin/update-initramfs ] || update-initramfs -u
systemctl enable --now stand-in-kernel.service
"""
SERVE = """
systemd-run -q --unit shop --working-directory /srv/shop /usr/bin/python3 -m http.server 8099
until python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))' 2>/dev/null; do sleep 0.1; done
"""
SETTINGS: Json = {
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
    # Ray is not installed here.
    "preflight_pythons": ["3.11"],
    "preflight_disk_gib": {},
    "host_reboot_timeout_s": 300,
    "host_reboot_settle_s": 30,
}
POOL: Json = {"clusterkit_gpus": 8, "clusterkit_pool": {"mode": "fixed"}}


def mi300x_packages(shop: Shop) -> None:
    """Two drivers of one ROCm release."""
    for driver, build in (("30.30.3", "6.16.13.30300300-2327507"), ("30.30.4", "6.16.13.30300400-2341068")):
        shop.amd(driver, build, "7.2.3", "26.2.2.70203-81~22.04", smi=AMD_SMI)


def h100_packages(shop: Shop) -> None:
    """The driver that nvidia-smi was recorded with, and an older one."""
    shop.nvidia([H100_DRIVER, "580.65.06"], ["1.19.1"], smi=NVIDIA_SMI)


def on_the_bus(addresses: list[str], **facts: str) -> dict[str, bytes]:
    """Devices as the kernel shows them before there is a driver; `kind` is their class."""
    files = {"class" if name == "kind" else name: text for name, text in facts.items()}
    return {
        f"/srv/kernel/pci/devices/{address}/{name}": f"{text}\n".encode()
        for address in addresses
        for name, text in files.items()
    }


@dataclass(frozen=True)
class Kind:
    """What servers of a kind have of their own."""

    lab: str
    pool: str
    tags: str
    # Of the inventory; addresses are of the shop, which is put in front of them.
    settings: Mapping[str, Any]
    addresses: Mapping[str, str]
    pool_settings: Mapping[str, Any]
    packages: Callable[[Shop], None]
    # What the hosts are made of, by path.
    files: Mapping[str, bytes]
    # Active on a host that is in service.
    units: tuple[str, ...]

    def but(self, lab: str, **settings: Any) -> Kind:
        """The same servers in another lab, with more settings."""
        return replace(self, lab=lab, settings={**self.settings, **settings})


# Tier 1 has a playbook of its own.
TIER_1 = {"/opt/clusterkit/bin/gpu-tier1", "/etc/clusterkit/gpu-tier1.json"}
H100_DRIVER = "590.48.01"
MI300X_SERVERS = Kind(
    lab="gpulab",
    pool="mi300x",
    tags="preflight,baseline,rocm_host,rdma_fabric,host_agent,gpu_health",
    settings={"clusterkit_stack": "rocm72", "rocm_host_sysctl": {}},
    addresses={"rocm_host_repository_url": "amd"},
    pool_settings={
        "clusterkit_accelerator": "rocm",
        "clusterkit_gpu_model": "AMD-Instinct-MI300X-OAM",
        "clusterkit_gpu_memory_gib": 192,
    },
    packages=mi300x_packages,
    files={
        **on_the_bus(BDF, vendor="0x1002", device="0x74a1", kind="0x120000", current_link_width="16"),
        **{f"/srv/amd-smi/{name.split('.')[0]}": (MI300X / name).read_bytes() for name in AMD_FILES.values()},
        "/usr/local/sbin/modprobe": MODPROBE_AMD.encode(),
        "/usr/local/sbin/stand-in-kernel": (KERNEL + BOOT_AMD).encode(),
    },
    units=("ssh.service", "clusterkit-acs.service"),
)
H100_SERVERS = Kind(
    lab="nvidialab",
    pool="h100",
    tags="preflight,baseline,cuda_host,rdma_fabric,host_agent,gpu_health",
    settings={"clusterkit_stack": "cuda", "clusterkit_driver_version": H100_DRIVER},
    addresses={"cuda_host_repository_url": "nvidia", "cuda_host_toolkit_repository_url": "toolkit"},
    pool_settings={
        "clusterkit_accelerator": "cuda",
        "clusterkit_gpu_model": "H100",
        "clusterkit_gpu_memory_gib": 80,
    },
    packages=h100_packages,
    files={
        **on_the_bus(H100_BDF, vendor="0x10de", device="0x2330", kind="0x030200"),
        # A baseboard of eight H100 has four switches.
        **on_the_bus([f"0000:0{n}:00.0" for n in range(5, 9)], vendor="0x10de", device="0x22a3", kind="0x068000"),
        **{f"/srv/nvidia-smi/{path.name}": path.read_bytes() for path in H100.iterdir()},
        "/usr/local/sbin/modprobe": MODPROBE_NVIDIA.encode(),
        "/usr/local/sbin/stand-in-kernel": (KERNEL + BOOT_NVIDIA).encode(),
        "/usr/sbin/update-initramfs": UPDATE_INITRAMFS.encode(),
    },
    units=("ssh.service",),
)


@dataclass
class Power:
    """Switches hosts on again that have rebooted, once as many of them are off as it was told. Keeps what it saw.

    `in_service`: whether a host that is on works. `turns`: how many are to be off, for one batch after the other; from
    then on it is `together`.
    """

    lab: Cluster
    workers: tuple[str, ...]
    in_service: Callable[[str], bool]
    together: int = 1
    turns: list[int] = field(default_factory=list)
    seen: list[tuple[str, str]] = field(default_factory=list)
    # Each host that went down, with the others that were not in service then.
    away: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

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
            others = (name for name in self.workers if name != host)
            self.away.append((host, tuple(name for name in others if not self.works(name))))
            if len(down) >= (self.turns[0] if self.turns else self.together):
                del self.turns[:1]
                for name in down:
                    self.lab.container(name).start()
                down = []

    def works(self, host: str) -> bool:
        try:
            return self.in_service(host)
        except (docker.errors.APIError, OSError, AssertionError, ValueError, StopIteration):  # off, or on its way
            return False

    def forget(self) -> None:
        del self.seen[:], self.away[:]

    def most_away(self) -> int:
        """How many hosts were out of service at once."""
        return max((1 + len(others) for _, others in self.away), default=0)


@dataclass
class Site:
    """The lab, its inventory with GPUs, and what switches its hosts on."""

    lab: Cluster
    kind: Kind
    workers: tuple[str, ...]
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
        done = clusterkit("plan", "-i", str(self.inventory), "--json", "--tags", self.kind.tags, *words)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        found: Json = json.loads(done.stdout)
        return found

    def assert_waits_for_reboots(self, told: Json, role: str) -> None:
        """A plan of bare hosts: the head gets nothing of the GPUs' roles, and no reboot asks for consent."""
        on_head = {change["role"] for change in told["changes"] if change["host"] == "head"}
        assert not on_head & {role, "gpu_health"}
        # Nothing runs there yet.
        assert {(item["host"], item["what"], item["needs_consent"]) for item in told["disruptions"]} == {
            (host, "host", False) for host in self.workers
        }
        assert self.power.seen == []

    def converge_one_by_one(self) -> None:
        """Two hosts that need a reboot get one each, and the first is back before the second goes."""
        before = self.boots()
        counts, _ = self.converge()
        after = self.boots()
        assert all(before[host] != after[host] for host in self.workers)
        first, second = (host for action, host in self.power.seen if action == "die")
        assert {first, second} == {*self.workers}
        assert self.power.seen == [("die", first), ("start", first), ("die", second), ("start", second)]
        assert self.power.most_away() == 1, "the first was back in service before the second went"
        assert counts["head"]["failed"] == 0

    def assert_converged(self) -> None:
        boots = self.boots()
        counts, _ = self.converge()
        assert set(counts) == {"localhost", "head", *self.workers}
        assert changed(counts) == {}
        assert self.boots() == boots

    def boots(self) -> dict[str, str]:
        return {host: self.boot_of(host) for host in self.workers}

    def boot_of(self, host: str) -> str:
        """The id of its boot."""
        return self.lab.on(host, "cat /proc/sys/kernel/random/boot_id")

    def quarantine(self, host: str) -> Any:
        return self.lab.agent(host, "status")["quarantine"]

    def set_ecc_errors(self, host: str, gpu: int, count: int) -> None:
        answer = json.loads((MI300X / AMD_FILES["metric"]).read_text())
        answer["gpu_data"][gpu]["ecc"]["total_uncorrectable_count"] = count
        self.put(host, {"/srv/amd-smi/metric": json.dumps(answer).encode()})

    def log(self, host: str, line: str) -> None:
        """Into the host's kernel log."""
        self.lab.on(host, f'echo "$(date -u +%Y-%m-%dT%H:%M:%S,000000+00:00) {line}" >>/srv/dmesg')

    def put(self, host: str, files: Mapping[str, bytes]) -> None:
        self.lab.container(host).put_archive("/", archive(files))


def named(told: Json, host: str, **wanted: str) -> list[Json]:
    """A host's changes in a plan whose fields are these."""
    found = (change for change in told["changes"] if change["host"] == host)
    return [change for change in found if all(change[key] == value for key, value in wanted.items())]


def changed(counts: dict[str, dict[str, int]]) -> dict[str, int]:
    """Ansible's counts of changes, by host; hosts without one are left out."""
    return {host: count["changed"] for host, count in counts.items() if count["changed"]}


def write_inventory(folder: Path, made: Path, head: str, kind: Kind) -> None:
    """The lab's own hosts, in a pool of servers with GPUs."""
    hosts = yaml.safe_load((made / "hosts.yml").read_text())
    pools = hosts["all"]["children"]["ray_workers"]["children"]
    pools[kind.pool] = pools.pop("cpu_pool")
    addresses = {name: f"http://{head}:8099/{path}" for name, path in kind.addresses.items()}
    for name, content in (
        ("hosts.yml", hosts),
        ("group_vars/all/main.yml", {**SETTINGS, "clusterkit_name": kind.lab, **kind.settings, **addresses}),
        (f"group_vars/{kind.pool}.yml", {**POOL, **kind.pool_settings}),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(content))


def shop(kind: Kind) -> dict[str, bytes]:
    """The vendor's packages, and what else the hosts install, as the files of a repository."""
    # Short, for gpg's socket.
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    try:
        made = Shop(folder)
        made.distribution([os_release()], ("python3-venv", "libnuma1"))
        kind.packages(made)
        files = (path for path in made.root.rglob("*") if path.is_file())
        return {f"/srv/shop/{path.relative_to(made.root)}": path.read_bytes() for path in files}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def os_release() -> str:
    """The kernel is this machine's."""
    return Path("/proc/sys/kernel/osrelease").read_text().strip()


@contextmanager
def gpu_site(
    lab_of: Maker,
    inventory: Path,
    kind: Kind = MI300X_SERVERS,
    workers: int = 2,
    in_service: Callable[[Cluster, str], bool] | None = None,
) -> Iterator[Site]:
    """Bare servers of that kind. `in_service`: whether one works; without it, by the kind's units."""
    missing = [tool for tool in ("gpg", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"builds and signs packages: needs {', '.join(missing)}")
    made = lab_of(kind.lab, "--workers", str(workers), "--offline", "--runtime", "venv")
    lab = Cluster(made.name, inventory)
    head = lab.on("head", "hostname -i")
    write_inventory(inventory, made.inventory, head, kind)
    names = tuple(f"worker{number}" for number in range(1, workers + 1))

    def by_units(host: str) -> bool:
        said = lab.on(host, f"systemctl is-active {' '.join(kind.units)}", check=False)
        return said.split() == ["active"] * len(kind.units)

    works = by_units if in_service is None else lambda host: in_service(lab, host)
    site = Site(lab, kind, names, Power(lab, names, works))
    try:
        site.put("head", shop(kind))
        lab.on("head", PREPARE % head + SERVE)
        tools = {
            "/usr/sbin/update-grub": GRUB,
            "/usr/local/bin/dmesg": DMESG,
            "/etc/systemd/system/stand-in-kernel.service": KERNEL_UNIT,
        }
        for host in names:
            site.put(host, {**kind.files, **{path: text.encode() for path, text in tools.items()}})
            lab.on(host, PREPARE % head + PREPARE_GPUS)
        yield site
    finally:
        site.power.stream.close()
