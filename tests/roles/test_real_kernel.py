"""kernel_parameters, gpu_driver and host_reboot against a kernel, a boot loader and a DKMS of their own.

A Debian 12 guest in qemu (no KVM, no network but its SSH port), with a module that stands for a GPU driver. The tests
go through that host's life in their order. 19 minutes on two cores that were busy with other things, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import Run

pytestmark = pytest.mark.slow

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent / "real_kernel"
TOOLS = ("qemu-system-x86_64", "mmdebstrap", "mke2fs", "ssh-keygen")
BOOT_S = 600
MARKER = "/var/lib/clusterkit/reboot.json"
# Two of one name; the kernel hands what it does not know to init, which does not know it either.
PARAMETERS = ["ckdemo=a", "ckdemo=b", "quiet"]
DRIVER: Json = {"module": "ckstandin", "version": "2.0"}
VARIABLES: Json = {
    "module": "",
    "version": "",
    "parameters": [],
    "allow_disruption": False,
    "timeout_s": BOOT_S,
    "settle_s": 10,
    "marker": MARKER,
    "bin": "/opt/clusterkit/bin",
    "config_path": "/etc/clusterkit",
}
# Stands for the host agent: writes down what it is asked for.
AGENT = """
import os, sys
word = " ".join(sys.argv[3:])
with open("/root/asked", "a") as log:
    log.write(word + "\\n")
if word == "stop":
    open("/root/stopped", "w")
print('{"state": "%s"}' % ("stopped" if os.path.exists("/root/stopped") else "running"))
"""
# An initramfs that still has the old driver does the same.
OLD_DRIVER = """
[Unit]
DefaultDependencies=no
Before=systemd-modules-load.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'insmod /var/lib/dkms/ckstandin/1.0/*/x86_64/module/ckstandin.ko'
[Install]
WantedBy=sysinit.target
"""


class Guest:
    """The guest: a shell on it, and plays against it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"]
        self.ssh = ["ssh", "-i", str(folder / "key"), "-p", str(port), "-o", "ConnectTimeout=5", *self.options]
        host = {
            "ansible_host": "127.0.0.1",
            "ansible_port": port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(folder / "key"),
            "ansible_ssh_common_args": " ".join(self.options),
        }
        (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"guest": host}}}))

    def answers(self) -> bool:
        return subprocess.run([*self.ssh, "root@127.0.0.1", "true"], capture_output=True, check=False).returncode == 0

    def sh(self, script: str) -> str:
        done = subprocess.run(
            [*self.ssh, "root@127.0.0.1", f"set -e\n{script}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{script}: {done.stdout}{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str) -> None:
        self.sh(f"mkdir -p {os.path.dirname(path)}; cat >{path} <<'END'\n{text}\nEND")

    def boots(self) -> int:
        return len(self.sh("cat /var/log/boots").split())

    def cmdline(self) -> list[str]:
        return self.sh("cat /proc/cmdline").split()

    def loaded(self) -> str:
        return self.sh("cat /sys/module/ckstandin/version 2>/dev/null || true").strip()

    def play(self, *tasks: Json, options: tuple[str, ...] = (), ok: bool = True) -> Run:
        play = {"name": "The guest", "hosts": "guest", "gather_facts": False, "tasks": list(tasks)}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.folder / "hosts.yml")]
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_HOST_KEY_CHECKING": "False",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "cp"),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            [*command, str(self.folder / "play.yml"), *options],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        text = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, text
        # The default callback wraps an error's text.
        return Run(done.returncode, re.sub(r"\s+", " ", text))


def role(**variables: Any) -> Json:
    given = {f"host_reboot_{name}": value for name, value in {**VARIABLES, **variables}.items()}
    return {"name": "Role", "vars": given, "ansible.builtin.import_role": {"name": "host_reboot"}}


def parameters(*tokens: str, **more: Any) -> Json:
    return {"name": "Parameters", "kernel_parameters": {"parameters": list(tokens), **more}}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    lacking = [name for name in TOOLS if shutil.which(name) is None]
    if lacking or os.geteuid() != 0:
        pytest.skip(
            f"needs root, and {', '.join(lacking or TOOLS)} (qemu-system-x86 mmdebstrap e2fsprogs openssh-client)"
        )
    # Short, for ssh's control sockets.
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    disk, port = folder / "disk.img", free_port()
    qemu = None
    try:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        # A lab may run beside it.
        made = subprocess.run(
            ["nice", "-n", "19", HERE / "make_image", disk, folder / "key.pub"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stdout + made.stderr
        network = f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"
        qemu = subprocess.Popen(
            f"nice -n 10 qemu-system-x86_64 -accel tcg -cpu max -m 1024 -display none -serial file:{folder}/serial.log"
            f" -drive file={disk},format=raw,if=virtio -netdev {network} -device virtio-net-pci,netdev=net".split()
        )
        found = Guest(folder, port)
        deadline = time.monotonic() + BOOT_S
        while not found.answers():
            assert qemu.poll() is None, "qemu ended"
            assert time.monotonic() < deadline, (folder / "serial.log").read_text(errors="replace")[-2000:]
        yield found
    finally:
        if qemu is not None:
            qemu.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                qemu.wait(30)
            qemu.kill()
        shutil.rmtree(folder)


def test_a_plan_changes_nothing(guest: Guest) -> None:
    """The site's own file is read after 60-..., and sets all anew."""
    guest.write("/etc/default/grub.d/70-site.cfg", 'GRUB_CMDLINE_LINUX="console=ttyS0 site=1"')
    told = guest.play(parameters(*PARAMETERS), role(parameters=PARAMETERS), options=("--check", "--diff"))
    assert "+ckdemo=a: at every boot" in told.text
    assert guest.boots() == 1
    assert guest.sh("grep -rl ckdemo /boot/grub/grub.cfg /etc/default /var/lib || true") == ""


def test_parameters_take_one_reboot(guest: Guest) -> None:
    assert "ckdemo=a" not in guest.cmdline()
    assert guest.play(parameters(*PARAMETERS), role(parameters=PARAMETERS)).changed > 0
    assert guest.boots() == 2
    assert {"ckdemo=a", "ckdemo=b", "site=1", "console=ttyS0"} <= set(guest.cmdline())
    assert guest.cmdline().count("quiet") == 1
    again = guest.play(parameters(*PARAMETERS), role(parameters=PARAMETERS))
    assert (again.changed, guest.boots()) == (0, 2)
    assert guest.sh(f"ls {MARKER} 2>/dev/null || true") == ""


def test_a_running_node_is_left_without_consent(guest: Guest) -> None:
    """The driver is upgraded for real: DKMS builds it in the guest."""
    guest.write("/opt/clusterkit/bin/host-agent", AGENT)
    guest.write("/opt/clusterkit/bin/ray-node", "")
    assert guest.play(role(module="ckstandin", version="1.0")).changed == 0
    guest.sh("dkms install ckstandin/2.0")
    left = guest.play(role(**DRIVER))
    assert "ckstandin 1.0 is loaded, and 2.0 is installed. Its node is running" in left.text
    assert (left.changed, guest.boots(), guest.loaded()) == (0, 2, "1.0")
    assert guest.sh("cat /root/asked").split() == ["status"]


def test_a_new_driver_takes_one_reboot(guest: Guest) -> None:
    assert guest.play(role(**DRIVER, allow_disruption=True)).changed > 0
    assert (guest.boots(), guest.loaded()) == (3, "2.0")
    assert guest.sh("cat /root/asked").splitlines() == ["status", "status", "drain --deadline", "stop"]
    again = guest.play(role(**DRIVER, allow_disruption=True))
    assert (again.changed, guest.boots()) == (0, 3)


def test_a_reboot_that_does_not_help_is_not_repeated(guest: Guest) -> None:
    guest.write("/etc/systemd/system/old-driver.service", OLD_DRIVER)
    guest.sh("rmmod ckstandin; systemctl daemon-reload; systemctl -q enable --now old-driver")
    failed = guest.play(role(**DRIVER), ok=False)
    assert "The host was rebooted, and that did not help" in failed.text
    assert "loaded: ckstandin 1.0; wanted: ckstandin 2.0" in failed.text
    assert guest.boots() == 4
    assert json.loads(guest.sh(f"cat {MARKER}"))["wanted"]["version"] == "2.0"
    again = guest.play(role(**DRIVER), ok=False)
    assert "the host was rebooted once for this already" in again.text
    assert guest.boots() == 4
    # With the marker taken away it would go on for ever.
    look = {"name": "Look", "gpu_driver": DRIVER, "register": "found"}
    say = {"name": "Say", "ansible.builtin.debug": {"msg": "it is {{ found.state }}"}}
    assert "it is broken" in guest.play(look, say).text
    guest.sh(f"mv {MARKER} /root/marker")
    assert "it is reboot" in guest.play(look, say).text
    guest.sh(f"mv /root/marker {MARKER}")
    # Mended by hand: the marker goes, and that is all.
    guest.sh("systemctl -q disable old-driver; rmmod ckstandin; modprobe ckstandin")
    assert guest.play(role(**DRIVER)).changed == 1
    assert guest.sh(f"ls {MARKER} 2>/dev/null || true") == ""
    assert (guest.play(role(**DRIVER)).changed, guest.boots()) == (0, 4)


def test_no_reboot_for_a_driver_that_is_kept_away(guest: Guest) -> None:
    guest.write("/etc/modprobe.d/leftover.conf", "blacklist ckstandin")
    guest.sh("rmmod ckstandin")
    failed = guest.play(role(**DRIVER), ok=False)
    assert "/etc/modprobe.d/leftover.conf keeps ckstandin away: blacklist ckstandin" in failed.text
    assert guest.boots() == 4
    guest.sh("rm /etc/modprobe.d/leftover.conf")
    assert guest.play({"name": "Load", "gpu_driver": {**DRIVER, "load": True}}).changed == 1
    assert guest.loaded() == "2.0"


def test_parameters_are_taken_away_again(guest: Guest) -> None:
    say = {"name": "Say", "ansible.builtin.debug": {"msg": "reasons: {{ taken.reasons | join(', ') }}"}}
    taken = guest.play({**parameters(state="absent"), "register": "taken"}, say)
    assert taken.changed == 1
    assert "the kernel was booted with ckdemo=a, which is not wanted any more" in taken.text
    lines = [line.split() for line in guest.sh("grep vmlinuz /boot/grub/grub.cfg | grep root=").splitlines()]
    assert lines
    assert all("site=1" in line and "ckdemo=a" not in line and "ckdemo=b" not in line for line in lines)
    assert guest.play(parameters(state="absent")).changed == 0
