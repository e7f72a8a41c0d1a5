"""The roles of GPU hosts with real dnf 4, rpm and versionlock, in a Debian 12 system container dressed as Rocky 9.

Debian has the programs of EL; dpkg and apt are put aside. The repositories are stand-ins, built, signed and served in
the container; files stand for os-release, `uname`, grubby and what the kernel knows, RDMA ports with it. Streams of
modules are dnf's own, with our list of them. What that cannot show: EL's own packages and settings, kernel packages
that build an initramfs or boot entries, DKMS and dracut, grubby itself, SELinux, subscriptions and mirror lists. The
tests of each role go through one host's life in their order.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterkit import lab
from tests.roles.lonely_host import Box, lonely_host, wait_for_systemd
from tests.roles.rpm_repository import KERNEL, NEWER_KERNEL, Rpm, RpmShop
from tests.roles.test_gpu_hosts import PROXY, ROOT, SHOP, SWITCH, UNITS, Host
from tests.support import docker_client

pytestmark = [pytest.mark.docker, pytest.mark.slow]

Json = dict[str, Any]

NAME = "clusterkit-gputest-el"
IMAGE = "clusterkit-gputest-el"
RECIPE = """FROM {base}
RUN apt-get update -q && apt-get install -y -q --no-install-recommends dnf dnf-plugins-core rpm createrepo-c gnupg \\
    && rm -rf /var/lib/apt/lists/*
"""
# As the installer of Rocky 9 leaves them.
OS_RELEASE = 'ID="rocky"\nID_LIKE="rhel centos fedora"\nVERSION_ID="9.6"\nPLATFORM_ID="platform:el9"\n'
AMD = {
    "30.30.3": ("6.16.13-2327507", "7.2.3", "26.2.2.70203-81.el9"),
    "30.30.4": ("6.16.13-2341068", "7.2.4", "26.2.2.70204-93.el9"),
}
OLD = "amd/amdgpu/30.30.3/el/9.6/main/x86_64"
BUILD = "6.16.13-2327507.el9"
DNF = "[main]\ngpgcheck=1\ninstallonly_limit=3\nclean_requirements_on_remove=True\nbest=True\n"
DNF += "skip_if_unavailable=False\n"
BASE = f"[el]\nname=Stands for BaseOS, AppStream and EPEL\nbaseurl={SHOP}/el\nenabled=1\ngpgcheck=0\n"
# The kernel is the machine's: this one is what Python's programs and scripts in packages are told.
UNAME = f"""import os, platform
release, real = "{KERNEL}.x86_64", os.uname()
os.uname = lambda: os.uname_result((real.sysname, real.nodename, release, real.version, "x86_64"))
platform.release = lambda: release
"""
UNAME_PROGRAM = f"""#!/bin/sh
[ "$*" = -r ] && exec echo {KERNEL}.x86_64
exec /usr/lib/debian-bin/uname "$@"
"""
GRUBBY = f"""#!/usr/bin/python3
import sys
path = "/root/entry"
given = dict((word.lstrip("-") + "=").split("=", 1) for word in sys.argv[1:])
tokens = open(path).read().split()
if "default-kernel" in given:
    print("/boot/vmlinuz-{KERNEL}.x86_64")
if "info" in given:
    print('index=0\\nargs="%s"' % " ".join(tokens))
new = given.get("args", "").rstrip("=").split()
names = [token.split("=")[0] for token in new]
gone = given.get("remove-args", "").rstrip("=").split()
tokens = [token for token in tokens if token not in gone and token.split("=")[0] not in names]
open(path, "w").write(" ".join(tokens + new))
"""
PREPARE = f"""
set -e
mkdir -p /usr/lib/debian-bin /etc/rpm /var/lib/rpm /opt/clusterkit/bin /etc/udev/rules.d /lib/modules/{KERNEL}.x86_64
mv /usr/bin/apt* /usr/bin/dpkg* /usr/bin/uname /usr/lib/debian-bin/
mv /usr/local/bin/uname /usr/bin/uname
chmod 755 /usr/sbin/grubby /usr/bin/uname
rm -f /etc/dnf/plugins/local.conf /usr/lib/python3/dist-packages/dnf-plugins/local.py
echo '%_dbpath /var/lib/rpm' >/etc/rpm/macros
echo 'ro quiet' >/root/entry
useradd --system ray
getent group render >/dev/null || groupadd --system render
systemd-run -q --unit shop --working-directory /srv /usr/bin/python3 -m http.server 8099 --bind 127.0.0.1
until python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))' 2>/dev/null; do sleep 0.1; done
dnf -q -y install bash kernel-core rocky-release
"""


class ElHost(Host):
    """The container: plays against it, and a shell on it; the shop is in it."""

    def __init__(self, container: Any, folder: Path) -> None:
        Box.__init__(self, container, folder)  # apt's shop is none of its own
        self.rpms = RpmShop(self.sh, self.put)

    def module(self, name: str, **arguments: Any) -> Json:
        """What a module says, without a role around it."""
        command = [str(Path(sys.executable).with_name("ansible")), "-i", str(self.folder / "hosts"), "box", "-m", name]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
        command += ["-a", json.dumps(arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "=> {" in done.stdout, done.stdout + done.stderr
        told: Json = json.loads(done.stdout[done.stdout.index("=> {") + 3 :])
        return told

    def versions(self, *names: str) -> list[str]:
        return self.sh(f"rpm -q --qf '%{{VERSION}}-%{{RELEASE}}\\n' {' '.join(names)}").split()

    def held(self) -> list[str]:
        """The list of the plugin, as the plugin reads it."""
        return self.sh("dnf -q versionlock list").split()

    def packages(self) -> str:
        return self.sh("rpm -qa | sort")


@pytest.fixture(scope="module")
def host() -> Iterator[ElHost]:
    client = docker_client()
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    container = None
    try:
        with lab._lock(print):
            base = lab.ensure_image(client, mirror=None, on_progress=print)
        image, _log = client.images.build(fileobj=io.BytesIO(RECIPE.format(base=base).encode()), tag=IMAGE, rm=True)
        container = lonely_host(client, image, NAME)
        made = ElHost(container, folder)
        wait_for_systemd(made.sh)
        shop = made.rpms
        shop.distribution()
        shop.amd("30.30.3", *AMD["30.30.3"])
        shop.amd("30.30.4", *AMD["30.30.4"])
        shop.publish_key("amd", "amd/rocm/rocm.gpg.key")
        shop.nvidia(["580.65.06", "590.44.01"])
        shop.toolkit(["1.19.0"])
        made.put(
            {
                "/etc/os-release": OS_RELEASE.encode(),
                "/etc/dnf/dnf.conf": DNF.encode(),
                "/etc/yum.repos.d/el.repo": BASE.encode(),
                "/etc/python3.11/sitecustomize.py": UNAME.encode(),
                "/usr/local/bin/uname": UNAME_PROGRAM.encode(),
                "/usr/sbin/grubby": GRUBBY.encode(),
            }
        )
        made.sh(PREPARE)
        yield made
    finally:
        if container is not None:
            container.remove(v=True, force=True)
        shutil.rmtree(folder, ignore_errors=True)


def said(text: str) -> str:
    return " ".join(text.split())


# ------------------------------------------------------------------ rocm_host


def test_a_plan_of_a_bare_host_is_whole_and_changes_nothing(host: ElHost) -> None:
    before = host.packages()
    shown = host.rocm("--check", "--diff").text
    for wanted in (
        "amdgpu-dkms: missing",
        "+amdgpu-dkms-firmware: *.30300300-*",
        "kernel-core: not held",
        f"+baseurl={SHOP}/amd/amdgpu/30.30.3/el/9.6/main/x86_64/",
        f"+baseurl={SHOP}/amd/rocm/el9/7.2.3/main",
        "+gpgcheck=1",
        "Load the driver, or find out",
    ):
        assert wanted in shown, wanted
    assert host.packages() == before
    assert host.sh("ls /etc/yum.repos.d").split() == ["el.repo"]


def test_without_epel_it_says_where_dkms_comes_from(host: ElHost) -> None:
    host.rpms.distribution(without=("dkms",))
    refused = said(host.rocm(ok=False).text)
    assert f"nothing provides dkms needed by amdgpu-dkms-1:{BUILD}" in refused
    assert "dkms comes from EPEL, which this host does not have: enable EPEL and CRB" in refused
    assert "amdgpu-dkms" not in host.packages().replace("amdgpu-dkms-firmware", "")
    host.rpms.distribution()


def test_from_bare_rocky_to_the_pinned_driver_and_again(host: ElHost) -> None:
    host.write("/etc/dnf/plugins/versionlock.list", "site-0:1.0-1.*\n")
    first = host.rocm()
    names = ["amdgpu-dkms", "amdgpu-dkms-firmware", "amd-smi-lib", "kernel-devel"]
    assert host.versions(*names) == [
        BUILD,
        "30.30.3.0.30300300-2327507.el9",
        "26.2.2.70203-81.el9",
        KERNEL,
    ]
    assert host.held() == [
        "site-0:1.0-1.*",
        "amd-smi-lib-0:26.2.2.70203-81.el9.*",
        f"amdgpu-dkms-1:{BUILD}.*",
        "amdgpu-dkms-firmware-0:30.30.3.0.30300300-2327507.el9.*",
        *(f"{name}-0:{KERNEL}.*" for name in ("kernel-core", "kernel-devel", "kernel-headers")),
    ]
    assert "amd <amd@example.com>" in host.sh("rpm -q --qf '%{SUMMARY}\\n' gpg-pubkey")
    assert set(host.sh("id -nG ray").split()) >= {"render", "video"}
    assert "pci=realloc=off pci=bfsort iommu=pt" in host.sh("cat /root/entry")
    assert first.waits_for_reboot
    again = host.rocm()
    assert again.changed == 0, again.text


def test_after_the_reboot_the_driver_fits(host: ElHost) -> None:
    host.reboot("amdgpu", "6.16.13", host.sh("cat /root/entry").strip())
    run = host.rocm()
    assert run.changed == 0, run.text
    assert not run.waits_for_reboot


def test_an_upgrade_of_the_host_leaves_driver_and_kernel_and_without_holds_it_does_not(host: ElHost) -> None:
    host.rpms.distribution((KERNEL, NEWER_KERNEL))
    host.rpms.amd("30.30.4", *AMD["30.30.4"], folder="30.30.3")
    host.sh("dnf -y -q --refresh upgrade")
    assert host.versions("amdgpu-dkms", "kernel-core") == [BUILD, KERNEL]

    assert host.rocm(hold_packages=[]).changed == 1
    assert host.held() == ["site-0:1.0-1.*"]
    host.sh("dnf -y -q upgrade")
    assert host.versions("amdgpu-dkms") == ["6.16.13-2341068.el9"]
    assert set(host.versions("kernel-core")) == {KERNEL, NEWER_KERNEL}
    host.sh(f"dnf -y -q remove kernel-core-{NEWER_KERNEL} kernel-devel-{NEWER_KERNEL}")
    host.rpms.distribution()
    host.rpms.amd("30.30.3", *AMD["30.30.3"])
    host.sh("dnf -y -q --refresh downgrade kernel-headers")
    host.rocm()
    assert host.versions("amdgpu-dkms", "amdgpu-dkms-firmware") == [BUILD, "30.30.3.0.30300300-2327507.el9"]


def test_another_pin_lifts_the_hold_for_itself(host: ElHost) -> None:
    done = host.rocm("--diff", driver_version="30.30.4")
    assert f"-amdgpu-dkms: {BUILD}" in done.text
    assert host.versions("amdgpu-dkms", "amdgpu-dkms-firmware") == [
        "6.16.13-2341068.el9",
        "30.30.4.0.30300400-2341068.el9",
    ]
    assert "amdgpu-dkms-1:6.16.13-2341068.el9.*" in host.held()
    assert done.waits_for_reboot, "another build is loaded than the one on the disk"
    assert host.rocm(driver_version="30.30.4").changed == 0
    # And back, to an older one.
    host.rocm()
    assert host.versions("amdgpu-dkms") == [BUILD]


def test_a_driver_that_is_not_published_is_named_with_its_address(host: ElHost) -> None:
    refused = said(host.rocm(ok=False, driver_version="30.30.9").text)
    assert f"Status code: 404 for {SHOP}/amd/amdgpu/30.30.9/el/9.6/main/x86_64/repodata/repomd.xml" in refused
    assert "is that version published for this distribution? Check the pin and the address, or the mirror" in refused
    assert host.versions("amdgpu-dkms") == [BUILD]
    # A mirror with another driver in that folder.
    host.rpms.amd("30.30.4", *AMD["30.30.4"], folder="30.30.9")
    refused = said(host.rocm(ok=False, driver_version="30.30.9").text)
    assert "dnf cannot install amdgpu-dkms-firmware=*.30300900-*" in refused
    assert "Of amdgpu-dkms-firmware there is: 30.30.4.0.30300400-2341068.el9" in refused
    host.rocm()


def test_packages_of_another_key_are_refused_and_said(host: ElHost) -> None:
    shop = host.rpms
    shop.amd("30.30.4", *AMD["30.30.4"], key="")
    unsigned = said(host.rocm(ok=False, driver_version="30.30.4").text)
    assert "amdgpu-dkms-firmware-30.30.4.0.30300400-2341068.el9.noarch.rpm is not signed" in unsigned

    shop.amd("30.30.4", *AMD["30.30.4"], key="stranger")
    refused = said(host.rocm(ok=False, driver_version="30.30.4").text)
    assert "GPG check FAILED" in refused
    assert "The repository's signature does not fit the key on this host" in refused
    assert host.versions("amdgpu-dkms") == [BUILD]
    # It is the check that refuses it.
    trial = "dnf -y -q --setopt=clusterkit-amdgpu.gpgcheck=0 --disableplugin=versionlock install amdgpu-dkms"
    host.sh(
        f"{trial} amdgpu-dkms-firmware && dnf -y -q --repofrompath=old,{SHOP}/{OLD} --setopt=old.gpgcheck=0"
        " --disablerepo=clusterkit-amdgpu downgrade amdgpu-dkms amdgpu-dkms-firmware"
    )

    # As the message says: the publisher has changed the key.
    shop.publish_key("stranger", "amd/rocm/rocm.gpg.key")
    host.sh("rm /etc/pki/rpm-gpg/RPM-GPG-KEY-clusterkit-rocm")
    host.rocm(driver_version="30.30.4")
    assert host.versions("amdgpu-dkms") == ["6.16.13-2341068.el9"]
    shop.publish_key("amd", "amd/rocm/rocm.gpg.key")
    shop.amd("30.30.4", *AMD["30.30.4"])
    host.rocm()
    assert host.versions("amdgpu-dkms") == [BUILD]


def test_another_dnf_is_waited_for_and_named(host: ElHost) -> None:
    """A real one: it installs a package whose script waits."""
    wait = "touch /root/begun\nwhile [ -e /root/hold ]; do sleep 0.2; done"
    host.rpms.publish("slow", [Rpm("slow", "1-1", post=wait), *(Rpm("tool", f"1-{n}") for n in (9, 10))])
    host.write("/etc/yum.repos.d/slow.repo", f"[slow]\nname=Slow\nbaseurl={SHOP}/slow\ngpgcheck=0\n")
    host.sh("touch /root/hold; systemd-run -q --unit slow dnf -y install slow")
    host.sh("timeout 60 sh -c 'until [ -e /root/begun ]; do sleep 0.1; done'")
    failed = host.module("distribution_packages", packages=["tool"], lock_timeout_s=1)
    assert "another process has held the package manager for 1 s" in failed["msg"]
    assert "install slow" in failed["msg"], "the holder, by its command line"
    host.sh("systemd-run -q sh -c 'sleep 4; rm /root/hold'")
    done = host.module("distribution_packages", packages=["tool=1-*"], lock_timeout_s=60)
    assert done["changed"], done
    # Of what fits the pattern the newest.
    assert host.versions("slow", "tool") == ["1-1", "1-10"]
    host.sh("dnf -y -q remove slow tool && rm /etc/yum.repos.d/slow.repo")


def test_rhel_takes_headers_of_the_running_kernel_or_names_a_kernel_that_has_them(host: ElHost) -> None:
    host.sh("sed -i.rocky 's/rocky/rhel/' /etc/os-release")
    host.sh("dnf -y -q remove kernel-devel")
    host.rpms.distribution((NEWER_KERNEL,))
    refused = said(host.rocm(ok=False).text)
    assert f"No headers for the running kernel {KERNEL} are in the sources" in refused
    assert f"The newest kernel of its kind there is {NEWER_KERNEL}" in refused
    host.rpms.distribution((KERNEL, NEWER_KERNEL))
    host.rocm()
    assert host.versions("kernel-headers", "kernel-devel", "kernel-devel-matched") == [KERNEL] * 3
    host.sh("mv /etc/os-release.rocky /etc/os-release")


def test_rocm_removal_takes_away_what_the_role_made(host: ElHost) -> None:
    left = said(host.rocm(tasks="remove").text)
    assert "stay: amd-smi-lib, amdgpu-dkms, amdgpu-dkms-firmware" in left
    assert host.held() == ["site-0:1.0-1.*"]
    made = "ls /etc/yum.repos.d /etc/pki/rpm-gpg /etc/systemd/system /etc/udev/rules.d /etc/security/limits.d"
    assert "clusterkit" not in host.sh(made)
    assert host.sh("cat /root/entry") == "ro quiet"
    assert host.rocm(tasks="remove").changed == 0
    host.sh("dnf -y -q remove amdgpu-dkms")
    host.rocm()
    host.rocm(tasks="remove", remove_packages=True)
    there = host.packages()
    assert "amdgpu-dkms-6" not in there
    assert "amd-smi-lib" in there, "it was there before that run: the site's"
    assert f"kernel-core-{KERNEL}" in there


# ------------------------------------------------------------------ cuda_host

TOOLKIT = ["nvidia-container-toolkit", "nvidia-container-toolkit-base"]
TOOLKIT += ["libnvidia-container-tools", "libnvidia-container1"]
DRIVER = ["kmod-nvidia-open-dkms", "nvidia-driver-cuda", "nvidia-persistenced", "nvidia-fabricmanager"]


def test_cuda_installs_the_branch_of_its_stream_with_its_fabric_manager(host: ElHost) -> None:
    host.sh(f"umount /sys/module; {SWITCH} && echo 0x068000 >class && mount --bind /root/pci /sys/bus/pci/devices")
    refused = said(host.cuda(ok=False, toolkit_version="1.19.0").text)
    assert "modprobe nvidia failed" in refused, "nothing can load it here, and that is what the role says"
    assert host.versions(*DRIVER) == ["580.65.06-1.el9"] * 4
    assert host.versions(*TOOLKIT) == ["1.19.0-1"] * 4
    assert {"kmod-nvidia-open-dkms-3:580.65.06-1.el9.*", f"kernel-core-0:{KERNEL}.*"} <= set(host.held())
    host.reboot("nvidia", "580.65.06")
    host.cuda(toolkit_version="1.19.0")
    for unit in UNITS:
        assert host.sh(f"systemctl is-enabled {unit}; systemctl is-active {unit}").split() == ["enabled", "active"]
    again = host.cuda(toolkit_version="1.19.0")
    assert again.changed == 0, again.text


def test_without_its_stream_dnf_sees_no_driver(host: ElHost) -> None:
    query = "dnf -q repoquery --qf '%{version}' kmod-nvidia-open-dkms"
    assert host.sh(query).split() == ["580.65.06"]
    host.sh("mv /etc/dnf/modules.d/nvidia-driver.module /root/")
    assert host.sh(query).split() == []
    host.sh("mv /root/nvidia-driver.module /etc/dnf/modules.d/")


def test_another_branch_is_another_stream(host: ElHost) -> None:
    done = host.cuda(driver_branch="590", toolkit_version="1.19.0")
    assert host.versions(*DRIVER) == ["590.44.01-1.el9"] * 4
    assert done.waits_for_reboot, "the old one is loaded"
    assert host.cuda(driver_branch="590", toolkit_version="1.19.0").changed == 0
    host.cuda(toolkit_version="1.19.0")
    assert host.versions(*DRIVER) == ["580.65.06-1.el9"] * 4


def test_what_was_published_since_is_found(host: ElHost) -> None:
    host.rpms.toolkit(["1.19.0", "1.19.1"])
    found = host.sh("dnf -q repoquery --qf '%{version}' nvidia-container-toolkit").split()
    assert found == ["1.19.0"], "dnf by itself believes what it has"
    host.cuda()
    assert host.versions(*TOOLKIT) == ["1.19.1-1"] * 4


def test_lists_of_another_key_are_refused_and_said(host: ElHost) -> None:
    host.rpms.toolkit(["1.19.0", "1.19.1"], key="stranger")
    refused = said(host.cuda(ok=False, toolkit_version="1.19.0").text)
    assert "the package lists of this host cannot be read" in refused
    assert "repomd.xml GPG signature verification error: Bad GPG signature" in refused
    assert "The repository's signature does not fit the key on this host" in refused
    assert host.versions(*TOOLKIT) == ["1.19.1-1"] * 4
    host.rpms.publish_key("stranger", "toolkit/gpgkey")
    host.sh("rm /etc/pki/rpm-gpg/RPM-GPG-KEY-clusterkit-nvidia-container-toolkit")
    host.cuda(toolkit_version="1.19.0")
    assert host.versions(*TOOLKIT) == ["1.19.0-1"] * 4


def test_cuda_removal_takes_away_what_the_role_made(host: ElHost) -> None:
    host.cuda(tasks="remove", remove_packages=True)
    assert host.held() == ["site-0:1.0-1.*"]
    assert "nvidia" not in host.packages()
    made = host.sh("ls /etc/yum.repos.d /etc/pki/rpm-gpg /etc/dnf/modules.d /etc/modprobe.d", check=False)
    assert "clusterkit" not in made
    assert "nvidia-driver" not in made
    assert host.cuda(tasks="remove").changed == 0


# ------------------------------------------------------------------ rdma_fabric

FABRIC: Json = {
    "rdma_fabric_interface": "lo",
    "rdma_fabric_accelerator": "rocm",
    "rdma_fabric_rocm": "7.2.3",
    "rdma_fabric_user": "ray",
    "rdma_fabric_config_path": "/etc/clusterkit",
    "rdma_fabric_package_record": "/var/lib/clusterkit/packages.json",
    "rdma_fabric_proxy": PROXY,
}
# Of EL's BaseOS and AppStream; rdma-core.spec has the first three.
TOOLS = ["rdma-core", "libibverbs-utils", "infiniband-diags", "perftest", "ethtool"]
FILES = "ls /etc/clusterkit/fabric.json /etc/security/limits.d/60-clusterkit-rdma.conf"
# A port whose address is the loopback's; laid out as the kernel's Documentation/ABI/stable/sysfs-class-infiniband.
PORT = "/root/class/infiniband/mlx5_0/ports/1"
RDMA = f"""
set -e
mkdir -p /etc/clusterkit /root/class/net /root/class/infiniband/mlx5_0/device {PORT}/gids \
    {PORT}/gid_attrs/types {PORT}/gid_attrs/ndevs
cd {PORT}
echo '4: ACTIVE' >state; echo '5: LinkUp' >phys_state; echo '400 Gb/sec (4X NDR)' >rate; echo Ethernet >link_layer
echo 0000:0000:0000:0000:0000:ffff:7f00:0001 >gids/0; echo 'RoCE v2' >gid_attrs/types/0; echo lo >gid_attrs/ndevs/0
ln -sfn ../../../../bus/pci/drivers/mlx5_core /root/class/infiniband/mlx5_0/device/driver
mount --bind /sys/class/net /root/class/net
mount --rbind /root/class /sys/class
"""


@pytest.fixture(scope="module")
def fabric(host: ElHost) -> Iterator[ElHost]:
    """The host with an RDMA card, and with the tools in its repositories."""
    host.rpms.publish("appstream", [Rpm(name, "1-1.el9") for name in TOOLS])
    source = f"[appstream]\nname=Stands for AppStream\nbaseurl={SHOP}/appstream\nenabled=1\ngpgcheck=0\n"
    host.write("/etc/yum.repos.d/appstream.repo", source)
    host.sh("rm -f /var/lib/clusterkit/packages.json")
    host.sh(RDMA)
    yield host
    host.sh("umount -l /sys/class; rm /etc/yum.repos.d/appstream.repo", check=False)


def test_rdma_plan_of_a_bare_host_names_els_packages_and_changes_nothing(fabric: ElHost) -> None:
    before = fabric.packages()
    shown = fabric.play("rdma_fabric", "--check", "--diff", given=FABRIC).text
    for wanted in (*(f"{name}: missing" for name in TOOLS), '"NCCL_IB_GID_INDEX": "0"', "ray hard memlock unlimited"):
        assert wanted in shown, wanted
    assert "ibverbs-utils: missing" not in shown.replace("libibverbs-utils: missing", ""), "Debian's name"
    assert fabric.packages() == before
    assert "No such file" in fabric.sh(f"{FILES} 2>&1", check=False)


def test_rdma_tools_come_from_els_repositories_and_a_second_run_changes_nothing(fabric: ElHost) -> None:
    assert fabric.play("rdma_fabric", given=FABRIC).changed == 2
    assert fabric.versions(*TOOLS) == ["1-1.el9"] * len(TOOLS)
    written = json.loads(fabric.sh("cat /etc/clusterkit/fabric.json"))
    assert (written["NCCL_IB_HCA"], written["NCCL_IB_GID_INDEX"]) == ("=mlx5_0:1", "0")
    assert sorted(json.loads(fabric.sh("cat /var/lib/clusterkit/packages.json"))["packages"]) == sorted(TOOLS)
    # Converged, it asks no repository.
    fabric.sh("rm -rf /var/cache/dnf; mv /etc/yum.repos.d/appstream.repo /root/")
    again = fabric.play("rdma_fabric", given=FABRIC)
    assert again.changed == 0, again.text
    fabric.sh("mv /root/appstream.repo /etc/yum.repos.d/")


def test_a_repository_without_one_of_the_tools_is_told_by_its_name(fabric: ElHost) -> None:
    fabric.sh("dnf -y -q remove perftest")
    fabric.rpms.publish("appstream", [Rpm(name, "1-1.el9") for name in TOOLS if name != "perftest"])
    refused = said(fabric.play("rdma_fabric", ok=False, given=FABRIC).text)
    assert "dnf cannot install perftest: " in refused
    assert "Unable to find a match: perftest" in refused
    fabric.rpms.publish("appstream", [Rpm(name, "1-1.el9") for name in TOOLS])
    assert fabric.play("rdma_fabric", given=FABRIC).changed == 1


def test_rdma_removal_takes_files_and_leaves_packages_that_can_be_named(fabric: ElHost) -> None:
    assert fabric.play("rdma_fabric", tasks="remove", given=FABRIC).changed == 1
    assert "No such file" in fabric.sh(f"{FILES} 2>&1", check=False)
    assert fabric.versions(*TOOLS) == ["1-1.el9"] * len(TOOLS)
    assert fabric.play("rdma_fabric", tasks="remove", given=FABRIC).changed == 0
    # As the removal of the whole cluster says them.
    named = fabric.module("distribution_packages", state="recorded", record=FABRIC["rdma_fabric_package_record"])
    assert sorted(named["recorded"]) == sorted(TOOLS)


def test_a_card_that_is_gone_takes_its_files_along(fabric: ElHost) -> None:
    fabric.play("rdma_fabric", given=FABRIC)
    fabric.sh("mv /root/class/infiniband/mlx5_0 /root/mlx5_0")
    # The interface stays declared; without a card that is no matter.
    assert fabric.play("rdma_fabric", given=FABRIC).changed == 1
    assert "No such file" in fabric.sh(f"{FILES} 2>&1", check=False)
