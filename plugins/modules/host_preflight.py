#!/usr/bin/python
from __future__ import annotations

DOCUMENTATION = r"""
module: host_preflight
short_description: Everything that is wrong with a host, as one list
description:
  - Reads a host and compares it with what the cluster needs. Changes nothing.
  - Each finding says what is wrong and how to mend it; on Debian with the line that installs what is missing.
author:
  - clusterkit
options:
  managed:
    description: Whether root work is done here; then missing packages are no finding, they get installed.
    type: bool
    default: true
  distributions:
    description: Supported versions by distribution id, as in os-release.
    type: dict
    default: {}
  python:
    description: The interpreter of the Ray environment, as a path or a name on PATH.
    type: str
    default: python3
  pythons:
    description: Minor versions that the engine runs on.
    type: list
    elements: str
    default: []
  libraries:
    description: Shared libraries that must be there, each with the Debian package that brings it.
    type: dict
    default: {}
  memory_gib:
    description: Memory that must be there at least.
    type: float
    default: 0
  disk_gib:
    description: Free space that must be there at least, by path.
    type: dict
    default: {}
  ports:
    description: Ports that must be free, or be held by the Ray that this kit runs, by name.
    type: dict
    default: {}
  owner_path:
    description: A folder that only the kit's own processes have open; a port held by one of them is no finding.
    type: path
  environment:
    description: Where the Ray environment lies; once it is there, its disk space is not asked for again.
    type: path
  gpu_vendor:
    description: Whose GPUs the host is to have; empty where none.
    type: str
    choices: ["", amd, nvidia]
    default: ""
  gpus:
    description: How many GPUs the inventory declares.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Check the host
  host_preflight:
    memory_gib: 8
    ports: {serve: 8000}
"""

RETURN = r"""
findings:
  description: Each with C(subject), C(problem) and C(fix).
  returned: always
  type: list
  elements: dict
"""

import ctypes
import json
import os
import re
import shutil
import socket
import subprocess

from ansible.module_utils import gpus, secure_boot
from ansible.module_utils.basic import AnsibleModule

ASK_PYTHON = """
import json, sys
try:
    import ensurepip, venv
    able = True
except ImportError:
    able = False
print(json.dumps({"version": "%d.%d" % sys.version_info[:2], "venv": able}))
"""


def finding(subject, problem, fix):
    return {"subject": subject, "problem": problem, "fix": fix}


def install_line(package):
    return "apt-get install -y %s" % package


def os_release(path="/etc/os-release"):
    found = {}
    try:
        with open(path) as handle:
            for line in handle:
                key, _, value = line.strip().partition("=")
                found[key] = value.strip('"')
    except OSError:
        pass
    return found


def check_distribution(release, supported):
    if not supported:
        return []
    name, version = release.get("ID", "unknown"), release.get("VERSION_ID", "")
    if {version, version.partition(".")[0]} & set(supported.get(name, [])):
        return []
    known = "; ".join("%s %s" % (key, ", ".join(values)) for key, values in sorted(supported.items()))
    return [finding("distribution", "%s %s is not supported" % (name, version), "use one of: %s" % known)]


def check_python(name, versions, managed, environment):
    path = name if os.path.isabs(name) else shutil.which(name)
    if path is None or not os.access(path, os.X_OK):
        return [finding("python", "there is no %s" % name, install_line("python3"))]
    done = subprocess.run([path, "-I", "-c", ASK_PYTHON], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != 0:
        return [finding("python", "%s does not run" % path, "reinstall it, or set ray_env_python")]
    facts = json.loads(done.stdout.decode())
    found = []
    if versions and facts["version"] not in versions:
        wanted = ", ".join(versions)
        found.append(
            finding(
                "python",
                "%s is Python %s, and the engine runs on %s" % (path, facts["version"], wanted),
                "install one of them and set ray_env_python to it",
            )
        )
    if not facts["venv"] and not managed and not os.path.exists(os.path.join(environment or "/nonexistent", "bin")):
        found.append(
            finding("python", "%s cannot make environments (no ensurepip)" % path, install_line("python3-venv"))
        )
    return found


def check_libraries(libraries, managed):
    found = []
    for library, package in sorted(libraries.items()):
        try:
            ctypes.CDLL(library)
        except OSError:
            if not managed:
                found.append(finding("library", "%s is missing" % library, install_line(package)))
    return found


def meminfo_gib(path="/proc/meminfo"):
    with open(path) as handle:
        for line in handle:
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) / 1024.0 / 1024.0
    return 0.0


def check_memory(have_gib, want_gib):
    if have_gib >= want_gib:
        return []
    return [finding("memory", "%.1f GiB, and at least %.1f are needed" % (have_gib, want_gib), "use a larger host")]


def free_gib(path):
    """Free space where `path` will lie: its nearest folder that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return shutil.disk_usage(path).free / 1024.0**3


def check_disk(wanted, environment):
    if environment and os.path.exists(os.path.join(environment, "bin", "ray")):
        return []
    found = []
    for path, gib in sorted(wanted.items()):
        free = free_gib(path)
        if free < float(gib):
            found.append(
                finding(
                    "disk",
                    "%.1f GiB free for %s, and %.1f are needed" % (free, path, float(gib)),
                    "free some, or set clusterkit_paths to a larger disk",
                )
            )
    return found


def in_use(port):
    """Is a TCP port taken on any address of this host?"""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == 98:
                return True
    return False


def listeners(port):
    """(pid, command) of the processes that listen on a port, as far as this user may see."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as handle:
                for line in handle.readlines()[1:]:
                    part = line.split()
                    if part[3] == "0A" and int(part[1].rsplit(":", 1)[1], 16) == port:
                        inodes.add("socket:[%s]" % part[9])
        except OSError:
            continue
    found = []
    for pid in (name for name in os.listdir("/proc") if name.isdigit()):
        if inodes & set(_open_files(pid)):
            found.append((int(pid), _command(pid)))
    return found


def _open_files(pid):
    folder = "/proc/%s/fd" % pid
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(os.path.join(folder, name))
        except OSError:
            continue


def _command(pid):
    try:
        with open("/proc/%s/cmdline" % pid, "rb") as handle:
            return handle.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return "unknown"


def check_ports(ports, owner_path):
    found = []
    for name, port in sorted(ports.items()):
        if not in_use(int(port)):
            continue
        holders = listeners(int(port))
        if holders and all(_ours(pid, command, owner_path) for pid, command in holders):
            continue
        who = ", ".join("pid %d (%s)" % (pid, command[:120]) for pid, command in holders) or "a process of another user"
        found.append(
            finding(
                "port %d" % int(port),
                "is taken by %s" % who,
                "stop it, or set clusterkit_ports.%s to another port" % name,
            )
        )
    return found


def _ours(pid, command, owner_path):
    if not owner_path:
        return False
    # The folder itself or what is in it: /tmp/clusterkit-100 is not /tmp/clusterkit-1003.
    if re.search(re.escape(owner_path) + r"(?![\w.-])", command):
        return True
    return any((path + "/").startswith(owner_path + "/") for path in _open_files(str(pid)))


BOOT_MIB = 300


def check_gpus(vendor, wanted, root="/"):
    """What the inventory declares against what is on the bus; a driver is not asked for yet."""
    if not vendor or not wanted:
        return []
    there = [address for address, device in (gpus.devices(root) or {}).items() if device["vendor"] == vendor]
    if len(there) == wanted:
        return []
    problem = "%d of %d %s GPUs are on the PCI bus%s" % (
        len(there),
        wanted,
        gpus.VENDORS[vendor]["name"],
        ": " + ", ".join(there) if there else "",
    )
    fix = (
        "set clusterkit_gpus to what the host has, or look for the missing: power off and on, reseat it, ask the vendor"
    )
    if (
        vendor == "amd"
        and 0 < len(there) < wanted
        and "pci=realloc=off" not in (gpus.read_file(root, "proc/cmdline") or "")
    ):
        fix = (
            "add pci=realloc=off to the kernel's command line and reboot: in GRUB_CMDLINE_LINUX of /etc/default/grub, "
            "then `update-grub`, or on EL `grubby --update-kernel=ALL --args=pci=realloc=off`. rocm_host sets it too, "
            "but runs after this check. Are some missing still: " + fix
        )
    return [finding("GPUs", problem, fix)]


def check_secure_boot(vendor, root="/"):
    """DKMS signs what it builds with its own key: where that is not enrolled, the kernel refuses the driver."""
    if not vendor:
        return []
    found = secure_boot.read(root)
    if not found["enabled"] or found["enrolled"]:
        return []
    keys = [secure_boot.under(root, key) for key in secure_boot.KEYS]
    enrol = "`mokutil --import %s`, reboot, confirm in MokManager at the console"
    if found["key"]:
        fix = "enrol the key: " + enrol % secure_boot.under(root, found["key"])
    else:
        # dkms-project/dkms #424; before it, DKMS makes its key at its first build, which comes after this check.
        fix = (
            "make a key and enrol it: on Ubuntu install shim-signed and run `update-secureboot-policy --new-key`, then "
            "%s; elsewhere install dkms (3.1 or newer) and run `dkms generate_mok`, then %s. With an older dkms switch "
            "Secure Boot off for the installation" % (enrol % keys[0], enrol % keys[1])
        )
    return [
        finding(
            "Secure Boot",
            "is on, and the key that DKMS signs drivers with is not enrolled: the kernel would refuse the driver",
            "switch Secure Boot off in the firmware, or " + fix,
        )
    ]


def check_boot_space(vendor, root="/"):
    """A driver's initramfs lies in /boot; where it does not fit, the next boot has none."""
    boot = os.path.join(root, "boot")
    if (
        not vendor
        or not os.path.isdir(boot)
        or os.path.isdir(os.path.join(root, "sys/module", gpus.VENDORS[vendor]["module"]))
    ):
        return []
    free = shutil.disk_usage(boot).free // 1024**2
    if free >= BOOT_MIB:
        return []
    return [
        finding(
            "disk",
            "%d MiB free in /boot, and the driver's initramfs needs up to %d" % (free, BOOT_MIB),
            "remove kernels that are no longer used: apt-get autoremove --purge, or dnf remove --oldinstallonly",
        )
    ]


def main():
    module = AnsibleModule(
        argument_spec={
            "managed": {"type": "bool", "default": True},
            "distributions": {"type": "dict", "default": {}},
            "python": {"type": "str", "default": "python3"},
            "pythons": {"type": "list", "elements": "str", "default": []},
            "libraries": {"type": "dict", "default": {}},
            "memory_gib": {"type": "float", "default": 0},
            "disk_gib": {"type": "dict", "default": {}},
            "ports": {"type": "dict", "default": {}},
            "owner_path": {"type": "path"},
            "environment": {"type": "path"},
            "gpu_vendor": {"type": "str", "choices": ["", "amd", "nvidia"], "default": ""},
            "gpus": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    given = module.params
    findings = (
        check_distribution(os_release(), given["distributions"])
        + check_python(given["python"], given["pythons"], given["managed"], given["environment"])
        + check_libraries(given["libraries"], given["managed"])
        + check_memory(meminfo_gib(), given["memory_gib"])
        + check_disk(given["disk_gib"], given["environment"])
        + check_ports(given["ports"], given["owner_path"])
        + check_gpus(given["gpu_vendor"], given["gpus"])
        + (check_secure_boot(given["gpu_vendor"]) + check_boot_space(given["gpu_vendor"]) if given["managed"] else [])
    )
    lines = "\n".join("  %(subject)s: %(problem)s. Fix: %(fix)s" % item for item in findings)
    if findings:
        module.fail_json(msg="This host is not ready:\n%s" % lines, findings=findings)
    module.exit_json(changed=False, findings=[])


if __name__ == "__main__":
    main()
