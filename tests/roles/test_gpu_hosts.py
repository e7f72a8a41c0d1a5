"""rocm_host and cuda_host with real apt, dpkg and systemd, in one Debian 12 system container.

The repositories are stand-ins that are laid out and signed as the originals; no kernel module can be loaded here. Where
a test needs a loaded driver or another command line, files stand for the kernel's own. The tests of each role go
through one host's life in their order, from bare Debian to removal.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.gpu_repository import GRUB, Shop, archive
from tests.roles.lonely_host import Box, running_box
from tests.support import Run as AnsibleRun
from tests.support import ansible_playbook

pytestmark = [
    pytest.mark.docker,
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(shutil.which, ("gpg", "dpkg-deb"))), reason="builds and signs packages: needs gpg and dpkg-deb"
    ),
]

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
NAME = "clusterkit-gputest"
SHOP = "http://127.0.0.1:8099"
PROXY: Json = {"http": None, "https": None, "no_proxy": []}
ROCM: Json = {
    "rocm_host_version": "7.2.3",
    "rocm_host_driver_version": "30.30.3",
    "rocm_host_repository_url": f"{SHOP}/amd",
    "rocm_host_proxy": PROXY,
    # Not of a container's own: tests/modules/test_kernel_settings.py.
    "rocm_host_sysctl": {},
    "rocm_host_user": "ray",
    "rocm_host_allow_disruption": False,
    "rocm_host_bin": "/opt/clusterkit/bin",
    "rocm_host_state_path": "/var/lib/clusterkit",
}
CUDA: Json = {
    "cuda_host_driver_version": "",
    "cuda_host_driver_branch": "580",
    "cuda_host_gpu_model": "H100",
    "cuda_host_repository_url": f"{SHOP}/nvidia",
    "cuda_host_toolkit_repository_url": f"{SHOP}/toolkit",
    "cuda_host_proxy": PROXY,
    "cuda_host_allow_disruption": False,
    "cuda_host_bin": "/opt/clusterkit/bin",
    "cuda_host_config_path": "/etc/clusterkit",
    "cuda_host_state_path": "/var/lib/clusterkit",
}
PREPARE = """
set -e
rm -rf /etc/apt/sources.list /etc/apt/sources.list.d/* /var/lib/apt/lists/*
echo 'deb [trusted=yes] file:/srv/debian ./' >/etc/apt/sources.list
useradd --system ray
getent group render >/dev/null || groupadd --system render
mkdir -p /opt/clusterkit/bin /etc/udev/rules.d /boot/grub /etc/default/grub.d /lib/modules/$(uname -r)
touch /etc/default/grub /boot/vmlinuz-$(uname -r)
chmod 755 /usr/sbin/update-grub
cp /usr/sbin/update-grub /usr/sbin/grub-mkconfig
update-grub
systemd-run -q --unit shop --working-directory /srv /usr/bin/python3 -m http.server 8099 --bind 127.0.0.1
until python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))' 2>/dev/null; do sleep 0.1; done
"""
# Stands for the host agent: writes down what it is asked for, and stops the node.
AGENT = """
import subprocess, sys
with open("/root/asked", "a") as log:
    log.write(" ".join(sys.argv[3:]) + "\\n")
if sys.argv[-1] == "stop":
    subprocess.run(["systemctl", "stop", "clusterkit-ray.service"], check=True)
print('{"changed": true}')
"""


class Run(AnsibleRun):
    """And whether it leaves a reboot to the play that may do it."""

    @property
    def waits_for_reboot(self) -> bool:
        return "is in clusterkit_disrupted" in self.text


class Host(Box):
    """The container: plays against it, and the shop."""

    def __init__(self, container: Any, folder: Path, shop: Shop) -> None:
        super().__init__(container, folder)
        self.shop = shop

    def write(self, path: str, text: str) -> None:
        self.put({path: text.encode()})

    def put(self, files: dict[str, bytes]) -> None:
        self.container.put_archive("/", archive(files))

    def stock(self) -> None:
        """The shop as it is now, in the container."""
        self.sh("find /srv -mindepth 1 -delete")
        files = (path for path in self.shop.root.rglob("*") if path.is_file())
        self.put({f"/srv/{path.relative_to(self.shop.root)}": path.read_bytes() for path in files})

    def play(
        self,
        role: str,
        *options: str,
        ok: bool = True,
        tasks: str = "main",
        given: Json | None = None,
        **variables: Any,
    ) -> Run:
        """`given`: the role's variables by their names; `variables`: more of them, without its name."""
        play = [
            {
                "name": "The role",
                "hosts": "box",
                "gather_facts": False,
                "tasks": [{"name": "Role", "ansible.builtin.import_role": {"name": role, "tasks_from": tasks}}],
            },
            {
                "name": "Who waits",
                "hosts": "clusterkit_disrupted",
                "gather_facts": False,
                "tasks": [{"name": "Say it", "ansible.builtin.debug": {"msg": "is in clusterkit_disrupted"}}],
            },
        ]
        (self.folder / "play.yml").write_text(yaml.safe_dump(play))
        base = given or (ROCM if role == "rocm_host" else CUDA)
        said = {**base, **{f"{role}_{name}": value for name, value in variables.items()}}
        (self.folder / "variables.json").write_text(json.dumps(said))
        words = ["-i", str(self.folder / "hosts"), "-e", f"@{self.folder}/variables.json"]
        run = ansible_playbook(self.folder, *words, str(self.folder / "play.yml"), *options)
        assert (run.code == 0) is ok, run.text
        return Run(run.code, run.text)

    def rocm(self, *options: str, **more: Any) -> Run:
        return self.play("rocm_host", *options, **more)

    def cuda(self, *options: str, **more: Any) -> Run:
        return self.play("cuda_host", *options, **more)

    def versions(self, *names: str) -> list[str]:
        return self.sh(f"for name in {' '.join(names)}; do dpkg-query -W -f '${{Version}}\\n' $name; done").split()

    def held(self) -> list[str]:
        return self.sh("apt-mark showhold").split()

    def packages(self) -> str:
        return self.sh("dpkg-query -W -f '${Package} ${Version} ${Status}\\n'")

    def reboot(self, module: str, version: str, cmdline: str = "") -> None:
        """As after a boot: the module that is on the disk is the one that is loaded."""
        self.sh("umount /proc/cmdline /sys/module 2>/dev/null; rm -rf /root/module; cp /proc/cmdline /root/cmdline")
        self.sh(f'echo "$(cat /root/cmdline) {cmdline}" >/root/cmdline.new; mkdir -p /root/module/{module}')
        told = f"modinfo -F srcversion /lib/modules/$(uname -r)/updates/dkms/{module}.ko"
        self.sh(
            f"cd /root/module/{module} && echo live >initstate && echo {version} >version && {told} >srcversion"
            " && mount --bind /root/cmdline.new /proc/cmdline && mount --bind /root/module /sys/module"
        )


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with running_box(lambda container, folder: Host(container, folder, Shop(folder)), NAME) as made:
        shop = made.shop
        kernel = made.sh("uname -r").strip()
        shop.distribution([kernel, "6.1.0-27-amd64"])
        shop.amd("30.30.3", "6.16.13.30300300-2327507", "7.2.3", "26.2.2.70203-81~22.04")
        shop.amd("30.30.4", "6.16.13.30300400-2341068", "7.2.4", "26.2.2.70204-93~22.04")
        shop.nvidia(["580.65.06", "590.44.01"], ["1.19.0", "1.19.1"])
        made.stock()
        made.write("/usr/sbin/update-grub", GRUB)
        made.sh(PREPARE)
        yield made


@pytest.fixture
def os_release(host: Host) -> Iterator[None]:
    host.sh("cp -L /etc/os-release /root/os-release")
    yield
    host.sh("cp /root/os-release /etc/os-release")


# ------------------------------------------------------------------ rocm_host


def test_an_unsupported_distribution_is_refused_with_those_that_are(host: Host, os_release: None) -> None:
    host.sh("sed -i 's/^VERSION_ID=.*/VERSION_ID=\"11\"/' /etc/os-release")
    before = host.packages()
    refused = host.rocm(ok=False)
    said = " ".join(refused.text.split())
    assert "ROCm 7.2.3 is not supported on debian 11" in said
    assert "ubuntu 22.04, 24.04; debian 12, 13; rhel 9.4, 9.6, 10.0; rocky 9.6" in said
    assert "rocm_host_allow_unsupported" in said
    # ROCm 7.0.0 is older than Debian 13.
    host.sh("sed -i 's/^VERSION_ID=.*/VERSION_ID=\"13\"/' /etc/os-release")
    older = " ".join(host.rocm(ok=False, version="7.0.0", driver_version="30.10").text.split())
    assert "not supported on debian 13" in older
    assert "debian 12; rhel 9.4, 9.6; rocky" in older
    assert host.packages() == before
    assert "clusterkit" not in host.sh("ls /etc/apt/sources.list.d /etc/apt/keyrings 2>&1", check=False)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"driver_version": "7.2.3"}, "the driver has numbers of its own: 30.10 came with 7.0.0"),
        ({"version": "7.13.0"}, "Supported are ROCm 7.0 to 7.2"),
        ({"memory_partition": "NPS4"}, "SPX/NPS1, CPX/NPS1, CPX/NPS4; here it is SPX/NPS4"),
    ],
)
def test_what_does_not_go_together_is_refused(host: Host, variables: Json, said: str) -> None:
    assert said in " ".join(host.rocm(ok=False, **variables).text.split())


def test_a_plan_of_a_bare_host_is_whole_and_changes_nothing(host: Host) -> None:
    before = host.packages()
    shown = host.rocm("--check", "--diff").text
    for wanted in (
        "amdgpu-dkms: missing",
        "amdgpu-dkms: not held",
        f"+URIs: {SHOP}/amd/amdgpu/30.30.3/ubuntu",
        f"+URIs: {SHOP}/amd/rocm/apt/7.2.3",
        "+Pin: release o=repo.radeon.com",
        '+KERNEL=="kfd", GROUP="render", MODE="0660"',
        "+ray hard memlock unlimited",
        "clusterkit-acs.service",
        "pci=realloc=off",
        "Load the driver, or find out",
    ):
        assert wanted in shown, wanted
    assert host.packages() == before
    assert host.sh("ls /opt/clusterkit/bin; ls /var/lib/clusterkit 2>/dev/null", check=False) == ""


def test_from_bare_debian_to_the_pinned_driver_and_again(host: Host) -> None:
    host.write("/etc/modprobe.d/blacklist-amdgpu.conf", "blacklist amdgpu\n")
    first = host.rocm()
    assert host.versions("amdgpu-dkms", "amd-smi-lib") == ["1:6.16.13.30300300-2327507.22.04", "26.2.2.70203-81~22.04"]
    kernel = host.sh("uname -r").strip()
    assert host.held() == ["amd-smi-lib", "amdgpu-dkms", "amdgpu-dkms-firmware", f"linux-headers-{kernel}"]
    source = host.sh("cat /etc/apt/sources.list.d/clusterkit-rocm.sources")
    assert "Suites: jammy\n" in source, "AMD has Ubuntu's folders for Debian"
    assert "Signed-By: /etc/apt/keyrings/clusterkit-rocm.gpg" in source
    assert set(host.sh("id -nG ray").split()) >= {"render", "video"}
    assert host.sh("systemctl is-enabled clusterkit-acs; systemctl is-active clusterkit-acs").split() == [
        "enabled",
        "active",
    ]
    assert "a virtual machine or a container: left as it is" in host.sh("journalctl -u clusterkit-acs")
    assert "No such file" in host.sh("ls /etc/modprobe.d/blacklist-amdgpu.conf 2>&1", check=False)
    assert "pci=realloc=off pci=bfsort iommu=pt" in host.sh("cat /boot/grub/grub.cfg")
    # The kernel was not booted with them.
    assert first.waits_for_reboot

    again = host.rocm()
    assert again.changed == 0, again.text
    assert again.waits_for_reboot


def test_after_the_reboot_the_driver_fits(host: Host) -> None:
    cpu = host.sh("grep -m1 vendor_id /proc/cpuinfo")
    iommu = "intel_iommu=on" if "Intel" in cpu else "amd_iommu=on"
    host.reboot("amdgpu", "6.16.13", f"pci=realloc=off pci=bfsort iommu=pt {iommu}")
    run = host.rocm()
    assert run.changed == 0, run.text
    assert not run.waits_for_reboot


def test_unattended_upgrades_leave_driver_and_kernel_alone(host: Host) -> None:
    """Read by apt itself; the patterns are matched as unattended-upgrades does (re.match)."""
    listed = host.sh("apt-config dump Unattended-Upgrade::Package-Blacklist")
    patterns = re.findall(r'Package-Blacklist:: "(.*)";', listed)

    def kept(name: str) -> bool:
        return any(re.match(pattern, name) for pattern in patterns)

    assert kept("amdgpu-dkms-firmware")
    assert kept("linux-image-6.1.0-27-amd64")
    assert kept("kernel-core")
    assert not kept("openssl")
    assert not kept("amd-smi-lib-extra"), "a name without a star is the whole name"


def test_an_upgrade_of_the_host_leaves_the_driver_and_without_holds_it_does_not(host: Host) -> None:
    shop = host.shop
    shop.amd("30.30.3", "6.16.13.30300399-2399999", "7.2.3", "26.2.2.70203-99~22.04")
    host.stock()
    pinned = host.versions("amdgpu-dkms")
    host.sh("apt-get update -q && apt-get upgrade -y -q")
    assert host.versions("amdgpu-dkms") == pinned

    host.rocm(hold_packages=[])
    assert host.held() == []
    host.sh("apt-get upgrade -y -q")
    assert host.versions("amdgpu-dkms") != pinned
    shop.amd("30.30.3", "6.16.13.30300300-2327507", "7.2.3", "26.2.2.70203-81~22.04")
    host.stock()
    back = host.rocm()
    assert host.versions("amdgpu-dkms") == pinned, back.text
    assert "amdgpu-dkms" in host.held()
    assert host.rocm().changed == 0


def test_another_pin_lifts_the_hold_for_itself(host: Host) -> None:
    shown = host.rocm("--check", "--diff", driver_version="30.30.4").text
    assert "-amdgpu-dkms: 1:6.16.13.30300300-2327507.22.04" in shown
    assert "+amdgpu-dkms: *.30300400-*" in shown
    assert '"disrupts": [ "host" ]' in " ".join(shown.split()), "another driver is loaded"
    done = host.rocm(driver_version="30.30.4")
    assert host.versions("amdgpu-dkms", "amdgpu-dkms-firmware") == [
        "1:6.16.13.30300400-2341068.22.04",
        "30.30.4.0.30300400-2341068.22.04",
    ]
    assert {"amdgpu-dkms", "amdgpu-dkms-firmware"} <= set(host.held())
    # Another build is loaded than the one on the disk.
    assert done.waits_for_reboot
    assert host.rocm(driver_version="30.30.4").changed == 0
    # And back, to an older one.
    host.rocm()
    assert host.versions("amdgpu-dkms") == ["1:6.16.13.30300300-2327507.22.04"]
    host.reboot("amdgpu", "6.16.13", host.sh("cat /proc/cmdline").strip())


def test_a_driver_that_is_not_published_is_named_with_its_address(host: Host) -> None:
    refused = " ".join(host.rocm(ok=False, driver_version="30.30.9").text.split())
    assert f"{SHOP}/amd/amdgpu/30.30.9/ubuntu" in refused
    assert "404" in refused
    assert "is that version published for this distribution? Check the pin and the address, or the mirror" in refused
    assert host.versions("amdgpu-dkms") == ["1:6.16.13.30300300-2327507.22.04"]
    host.rocm()


def test_a_signature_of_another_key_is_refused_and_said(host: Host) -> None:
    shop = host.shop
    shop.amd("30.30.4", "6.16.13.30300400-2341068", "7.2.4", "26.2.2.70204-93~22.04", key="stranger")
    (shop.root / "amd/rocm/rocm.gpg.key").write_bytes(shop.key("amd"))
    host.stock()
    refused = " ".join(host.rocm(ok=False, driver_version="30.30.4").text.split())
    assert "The repository's signature does not fit the key on this host" in refused
    assert "take the key's file away and run again: it is fetched anew" in refused
    assert host.versions("amdgpu-dkms") == ["1:6.16.13.30300300-2327507.22.04"]
    # The declared fingerprint holds against a publisher's key that is another one.
    (shop.root / "amd/rocm/rocm.gpg.key").write_bytes(shop.key("stranger"))
    host.stock()
    given = {"driver_version": "30.30.4", "key_fingerprints": [shop.fingerprint("amd")]}
    host.sh("rm /etc/apt/keyrings/clusterkit-rocm.gpg")
    strange = " ".join(host.rocm(ok=False, **given).text.split())
    assert shop.fingerprint("stranger") in strange
    assert "only" in strange
    # Without it, what the publisher says is right.
    host.rocm(driver_version="30.30.4")
    assert host.versions("amdgpu-dkms") == ["1:6.16.13.30300400-2341068.22.04"]
    for driver, build, rocm, tools in (
        ("30.30.3", "6.16.13.30300300-2327507", "7.2.3", "26.2.2.70203-81~22.04"),
        ("30.30.4", "6.16.13.30300400-2341068", "7.2.4", "26.2.2.70204-93~22.04"),
    ):
        shop.amd(driver, build, rocm, tools)
    host.stock()
    host.rocm()


def test_a_full_disk_is_said(host: Host) -> None:
    host.sh("mount -t tmpfs -o size=16k tmpfs /var/cache/apt/archives && mkdir /var/cache/apt/archives/partial")
    host.sh("cat /dev/zero >/var/cache/apt/archives/filler", check=False)
    try:
        refused = " ".join(host.rocm(ok=False, driver_version="30.30.4").text.split())
    finally:
        host.sh("umount /var/cache/apt/archives")
    assert "The disk is full" in refused
    host.rocm()


def test_no_headers_for_the_running_kernel_names_a_kernel_that_has_them(host: Host) -> None:
    kernel = host.sh("uname -r").strip()
    host.sh(f"apt-mark unhold linux-headers-{kernel} && apt-get purge -y -q linux-headers-{kernel}")
    flavour = kernel.split("-", 1)[1] if "-" in kernel else ""
    newest = f"9.1.10-{flavour}" if flavour else "9.1.10"
    host.shop.distribution([newest, newest.replace("9.1.10", "9.1.9"), "6.1.0-27-amd64"])
    host.stock()
    refused = " ".join(host.rocm(ok=False).text.split())
    assert f"No headers for the running kernel {kernel}" in refused
    assert f"The newest kernel of its kind there is {newest}: install it with its headers" in refused
    host.shop.distribution([kernel])
    host.stock()
    assert host.rocm().changed == 1


def test_a_blacklist_of_the_sites_is_named_and_left(host: Host) -> None:
    host.write("/etc/modprobe.d/site.conf", "blacklist amdgpu\n")
    host.sh("umount /sys/module")  # nothing is loaded
    refused = " ".join(host.rocm(ok=False).text.split())
    assert "/etc/modprobe.d/site.conf keeps amdgpu away: blacklist amdgpu" in refused
    assert host.sh("cat /etc/modprobe.d/site.conf") == "blacklist amdgpu\n"
    host.sh("rm /etc/modprobe.d/site.conf")


def test_rocm_removal_takes_away_what_the_role_made(host: Host) -> None:
    made = (
        "find / -xdev -path /root -prune -o -path /proc -prune -o \\( -name '*clusterkit*' -o -name acs-off \\) -print"
    )
    before = host.sh("cat /boot/grub/grub.cfg")
    left = host.rocm(tasks="remove").text
    assert "stay: amd-smi-lib, amdgpu-dkms" in " ".join(left.split())
    assert host.held() == []
    found = [path for path in host.sh(made).split() if os.path.basename(path) not in ("clusterkit",)]
    assert found == []
    assert "iommu=pt" in before
    assert "iommu=pt" not in host.sh("cat /boot/grub/grub.cfg")
    assert host.rocm(tasks="remove").changed == 0

    # Packages go where that is asked for, at the first removal.
    host.rocm(ok=False)
    host.rocm(tasks="remove", remove_packages=True)
    listed = host.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n'")
    assert "amdgpu-dkms installed" in listed, "it was there before this run: the site's"
    host.sh("apt-get purge -y -q --allow-change-held-packages amdgpu-dkms amdgpu-dkms-firmware amd-smi-lib dkms")
    host.rocm(ok=False)
    host.rocm(tasks="remove", remove_packages=True)
    assert "amdgpu-dkms installed" not in host.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n'")
    host.sh("apt-get purge -y -q dkms amdgpu-dkms-firmware pciutils 2>/dev/null; true")


# ------------------------------------------------------------------ cuda_host


UNITS = ["clusterkit-nvidia-devices.service", "nvidia-persistenced.service", "nvidia-fabricmanager.service"]
UNITS += ["nvidia-cdi-refresh.path"]
SWITCH = "mkdir -p /root/pci/0000:07:00.0 && cd /root/pci/0000:07:00.0 && echo 0x10de >vendor && echo 0x22a3 >device"


def test_cuda_refuses_what_does_not_go_together(host: Host, os_release: None) -> None:
    closed = " ".join(host.cuda(ok=False, gpu_model="B200", open_modules=False).text.split())
    assert "Only with open modules run B200" in closed
    other = " ".join(host.cuda(ok=False, driver_version="570.10.01").text.split())
    assert "the version is of it" in other
    host.sh("sed -i 's/^VERSION_ID=.*/VERSION_ID=\"11\"/' /etc/os-release")
    refused = " ".join(host.cuda(ok=False).text.split())
    assert "There is no repository of NVIDIA's for debian 11" in refused
    assert "ubuntu-22.04, ubuntu-24.04, debian-12, debian-13, rhel-9" in refused


def test_cuda_plan_of_a_bare_host(host: Host) -> None:
    host.sh(f"{SWITCH} && echo 0x068000 >class && mount --bind /root/pci /sys/bus/pci/devices")
    before = host.packages()
    shown = host.cuda("--check", "--diff").text
    for wanted in (
        "nvidia-driver-pinning-580: missing",
        "nvidia-kernel-open-dkms: missing",
        "nvidia-fabricmanager: missing",
        "libnvidia-container1: missing",
        f"+URIs: {SHOP}/nvidia/debian12/x86_64/",
        "+blacklist nouveau",
    ):
        assert wanted in shown, wanted
    said = " ".join(shown.split())
    assert '"actual": "nothing", "disrupts": [], "name": "nvidia"' in said, "what is not loaded takes no reboot"
    assert host.packages() == before


def test_cuda_installs_the_branch_with_its_fabric_manager(host: Host) -> None:
    # Nothing can load it here, and that is what the role says.
    refused = " ".join(host.cuda(ok=False).text.split())
    assert "modprobe nvidia failed" in refused
    driver = ["580.65.06-1"] * 4
    names = ["nvidia-kernel-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced", "nvidia-fabricmanager"]
    assert host.versions(*names) == driver
    tools = ["nvidia-container-toolkit", "nvidia-container-toolkit-base"]
    tools += ["libnvidia-container-tools", "libnvidia-container1"]
    assert host.versions(*tools) == ["1.19.1-1"] * 4
    log = host.sh("cat /var/log/dpkg.log")
    assert log.rindex("install nvidia-driver-pinning-580") < log.rindex("install nvidia-kernel-open-dkms")
    assert set(names + tools) <= set(host.held())

    host.reboot("nvidia", "580.65.06")
    done = host.cuda()
    assert not done.waits_for_reboot
    for unit in UNITS:
        assert host.sh(f"systemctl is-enabled {unit}; systemctl is-active {unit}").split() == ["enabled", "active"]
    # The driver makes no device files; what CUDA opens is there before the first engine.
    assert host.sh("ls /dev/nvidia-uvm").strip() == "/dev/nvidia-uvm"
    again = host.cuda()
    assert again.changed == 0, again.text


def test_a_fabric_manager_of_another_version_is_put_right(host: Host) -> None:
    host.sh("apt-get install -y -q --allow-change-held-packages nvidia-fabricmanager=590.44.01-1")
    assert host.cuda().changed > 0
    assert host.versions("nvidia-fabricmanager") == ["580.65.06-1"]


def test_an_initramfs_older_than_the_blacklist_is_built_anew(host: Host) -> None:
    image = f"/boot/initrd.img-{host.sh('uname -r').strip()}"
    host.put({"/usr/sbin/update-initramfs": f'#!/bin/sh\necho "$@" >>/root/built\ntouch {image}\n'.encode()})
    host.sh(f"chmod 755 /usr/sbin/update-initramfs; touch -d 2001-01-01 {image}")
    assert host.cuda().changed == 1
    assert host.sh("cat /root/built").startswith("-u -k ")
    assert host.cuda().changed == 0
    host.sh(f"rm {image} /usr/sbin/update-initramfs")


def test_another_driver_waits_while_ray_runs_and_goes_by_consent(host: Host) -> None:
    host.sh("systemd-run -q --unit clusterkit-ray sleep infinity")
    before = host.versions("nvidia-kernel-open-dkms", "nvidia-persistenced")
    left = host.cuda(driver_branch="590")
    said = " ".join(left.text.split())
    assert "nvidia-kernel-open-dkms" in said
    assert "wait: Ray runs here with the driver that is loaded" in said
    assert host.versions("nvidia-kernel-open-dkms", "nvidia-persistenced") == before
    assert host.sh("systemctl is-active clusterkit-ray").strip() == "active"

    host.write("/opt/clusterkit/bin/host-agent", AGENT)
    done = host.cuda(driver_branch="590", allow_disruption=True)
    assert host.sh("cat /root/asked").splitlines() == ["drain --deadline", "stop"]
    assert (
        host.versions("nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager") == ["590.44.01-1"] * 3
    )
    assert done.waits_for_reboot, "the old one is loaded"
    assert host.cuda(driver_branch="590", allow_disruption=True).changed == 0
    # Without Ray nothing waits.
    host.cuda()
    assert host.versions("nvidia-kernel-open-dkms") == ["580.65.06-1"]


def test_a_masked_service_is_named_with_what_to_do(host: Host) -> None:
    host.sh("systemctl disable --now nvidia-persistenced && systemctl mask nvidia-persistenced")
    refused = " ".join(host.cuda(ok=False).text.split())
    assert "nvidia-persistenced" in refused
    assert "systemctl unmask" in refused
    host.sh("systemctl unmask nvidia-persistenced")
    assert host.cuda().changed == 1


def test_cuda_removal_takes_away_what_the_role_made(host: Host) -> None:
    host.cuda(tasks="remove", remove_packages=True)
    assert host.held() == []
    left = host.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n'")
    assert "nvidia" not in left.replace(" not-installed", "")
    made = host.sh("ls -R /etc/apt /etc/modprobe.d /etc/systemd/system", check=False)
    assert "clusterkit" not in made
    assert host.cuda(tasks="remove").changed == 0
