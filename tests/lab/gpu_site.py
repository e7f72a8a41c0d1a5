"""Servers that look like ones with eight MI300X, made of a lab's hosts.

What lies below the kernel's boundary is made of files (`KERNEL`): bus, module, devices, command line and boot id,
which a boot makes anew. They do reboot: Docker leaves a container off then, and `Power` starts it again. The packages
are stand-ins from a repository on the head, and nothing comes from outside.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
import yaml

from tests.lab.conftest import Cluster, Maker, clusterkit, playbook, recap
from tests.modules.gpu_support import AMD_FILES, BDF, MI300X
from tests.roles.gpu_repository import GRUB, Shop, archive

Json = dict[str, Any]

WORKERS = ("worker1", "worker2")
TAGS = "preflight,baseline,rocm_host,rdma_fabric,host_agent,gpu_health"
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
        return self.lab.agent(host, "status")["quarantine"]

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


def shop() -> dict[str, bytes]:
    """Two drivers of one ROCm release, and what else the hosts install, as the files of a repository."""
    # Short, for gpg's socket.
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    try:
        made = Shop(folder)
        made.distribution([os_release()], ("python3-venv", "libnuma1"))
        for driver, build in (("30.30.3", "6.16.13.30300300-2327507"), ("30.30.4", "6.16.13.30300400-2341068")):
            made.amd(driver, build, "7.2.3", "26.2.2.70203-81~22.04", smi=AMD_SMI)
        files = (path for path in made.root.rglob("*") if path.is_file())
        return {f"/srv/shop/{path.relative_to(made.root)}": path.read_bytes() for path in files}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def os_release() -> str:
    """The kernel is this machine's."""
    return Path("/proc/sys/kernel/osrelease").read_text().strip()


@contextmanager
def gpu_site(lab_of: Maker, inventory: Path) -> Iterator[Site]:
    made = lab_of("gpulab", "--workers", "2", "--offline", "--runtime", "venv")
    lab = Cluster(made.name, inventory)
    head = lab.on("head", "hostname -i")
    write_inventory(inventory, made.inventory, head)
    site = Site(lab, Power(lab))
    try:
        site.put("head", shop())
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
