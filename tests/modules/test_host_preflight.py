"""host_preflight: each thing that can be wrong with a host, and all of them as one list."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

preflight = load_module("host_preflight")

SUPPORTED = {"debian": ["12", "13"], "ubuntu": ["24.04"]}


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


# ------------------------------------------------------------------ distribution, Python, libraries


@pytest.mark.parametrize(
    ("release", "ok"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, True),
        ({"ID": "ubuntu", "VERSION_ID": "24.04"}, True),
        ({"ID": "debian", "VERSION_ID": "11"}, False),
        ({"ID": "debian"}, False),
        ({"ID": "alpine", "VERSION_ID": "3.20"}, False),
        ({}, False),
    ],
)
def test_distribution(release: Json, ok: bool) -> None:
    found = preflight.check_distribution(release, SUPPORTED)
    assert (found == []) is ok
    if not ok:
        assert found[0]["fix"] == "use one of: debian 12, 13; ubuntu 24.04"


def test_any_distribution_where_none_is_asked_for() -> None:
    """This machine with an ordinary user: nobody installs packages there."""
    assert preflight.check_distribution({"ID": "alpine"}, {}) == []


def test_os_release_is_read_without_its_quotes(tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text('ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian GNU/Linux 12"\n')
    assert preflight.os_release(str(tmp_path / "os-release"))["VERSION_ID"] == "12"
    assert preflight.os_release(str(tmp_path / "absent")) == {}


def test_a_good_interpreter() -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    assert preflight.check_python(sys.executable, [version], False, None) == []


def test_an_interpreter_of_the_wrong_version() -> None:
    (found,) = preflight.check_python(sys.executable, ["2.7"], False, None)
    assert "and the engine runs on 2.7" in found["problem"]
    assert "ray_env_python" in found["fix"]


def test_no_interpreter() -> None:
    (found,) = preflight.check_python("python9.9", [], False, None)
    assert (found["problem"], found["fix"]) == ("there is no python9.9", "apt-get install -y python3")


def test_an_interpreter_that_does_not_run(tmp_path: Path) -> None:
    (found,) = preflight.check_python(program(tmp_path / "python", "exit 3"), [], False, None)
    assert "does not run" in found["problem"]


@pytest.mark.parametrize(
    ("managed", "made_already", "ok"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_an_interpreter_without_ensurepip(tmp_path: Path, managed: bool, made_already: bool, ok: bool) -> None:
    """Where root work is done it gets installed, and where the environment is there it is not needed."""
    python = program(tmp_path / "python", """echo '{"version": "3.11", "venv": false}'""")
    if made_already:
        (tmp_path / "env/bin").mkdir(parents=True)
    found = preflight.check_python(python, ["3.11"], managed, str(tmp_path / "env"))
    assert [item["fix"] for item in found] == ([] if ok else ["apt-get install -y python3-venv"])


def test_libraries() -> None:
    wanted = {"libc.so.6": "libc6", "libabsent.so.1": "libabsent1"}
    (found,) = preflight.check_libraries(wanted, False)
    assert (found["problem"], found["fix"]) == ("libabsent.so.1 is missing", "apt-get install -y libabsent1")
    # Where root work is done it gets installed.
    assert preflight.check_libraries(wanted, True) == []


# ------------------------------------------------------------------ memory, disk


def test_memory(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemFree: 1 kB\nMemTotal:       8388608 kB\n")
    assert preflight.meminfo_gib(str(tmp_path / "meminfo")) == 8
    assert preflight.check_memory(8, 8) == []
    (found,) = preflight.check_memory(7.5, 8)
    assert found["problem"] == "7.5 GiB, and at least 8.0 are needed"


def test_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    later = tmp_path / "not/yet/there"
    assert preflight.free_gib(str(later)) == pytest.approx(preflight.free_gib(str(tmp_path)), abs=1)
    assert preflight.check_disk({str(later): 0.001}, None) == []
    (found,) = preflight.check_disk({str(later): 1e9}, None)
    assert str(later) in found["problem"]
    assert "clusterkit_paths" in found["fix"]


def test_disk_is_not_asked_for_twice(tmp_path: Path) -> None:
    """What takes the space is there: a full disk would stop every later run."""
    (tmp_path / "env/bin").mkdir(parents=True)
    (tmp_path / "env/bin/ray").touch()
    assert preflight.check_disk({str(tmp_path): 1e9}, str(tmp_path / "env")) == []


# ------------------------------------------------------------------ ports


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_free_port(taken: int) -> None:
    assert preflight.in_use(taken)
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    assert not preflight.in_use(free)
    assert preflight.check_ports({"serve": free}, None) == []


def test_a_port_of_ipv6_alone() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        assert preflight.in_use(server.getsockname()[1])


def test_a_taken_port_names_its_holder(taken: int) -> None:
    (found,) = preflight.check_ports({"serve": taken}, None)
    assert found["subject"] == f"port {taken}"
    assert f"pid {os.getpid()}" in found["problem"]
    assert "clusterkit_ports.serve" in found["fix"]


def test_a_port_that_the_kits_own_ray_holds(taken: int, tmp_path: Path) -> None:
    """A process that has the kit's folder open, or names it in its command, is Ray of this kit."""
    assert len(preflight.check_ports({"serve": taken}, str(tmp_path))) == 1
    with (tmp_path / "session.log").open("w"):
        assert preflight.check_ports({"serve": taken}, str(tmp_path)) == []


def test_a_port_of_a_command_that_names_the_kits_folder(tmp_path: Path) -> None:
    listen = "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True)"
    command = [sys.executable, "-c", f"{listen}; sys.stdin.read()", f"--temp-dir={tmp_path}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert preflight.check_ports({"gcs": port}, str(tmp_path)) == []
        assert len(preflight.check_ports({"gcs": port}, str(tmp_path / "other"))) == 1
        # Another user's folder, of which this one's name is the beginning.
        assert len(preflight.check_ports({"gcs": port}, str(tmp_path)[:-1])) == 1
        process.communicate("")


# ------------------------------------------------------------------ the whole module


def test_a_host_that_is_ready(tmp_path: Path) -> None:
    result = call(preflight, python=sys.executable, memory_gib=0.1, disk_gib={str(tmp_path): 0.001})
    assert (result["changed"], result["findings"]) == (False, [])


@pytest.mark.parametrize("check", [False, True])
def test_all_that_is_wrong_comes_at_once(tmp_path: Path, taken: int, check: bool) -> None:
    result = call(
        preflight,
        check=check,
        managed=False,
        distributions={"plan9": ["4"]},
        python="python9.9",
        libraries={"libabsent.so.1": "libabsent1"},
        memory_gib=1e6,
        disk_gib={str(tmp_path): 1e9},
        ports={"serve": taken},
    )
    assert result["failed"]
    subjects = [item["subject"] for item in result["findings"]]
    assert subjects == ["distribution", "python", "library", "memory", "disk", f"port {taken}"]
    for item in result["findings"]:
        assert f"{item['subject']}: {item['problem']}. Fix: {item['fix']}" in result["msg"]


# ------------------------------------------------------------------ GPUs, before there is a driver


def pci(root: Path, *devices: tuple[str, str, str], command_line: str = "") -> str:
    """A tree like /sys and /proc with these devices: (address, vendor, class)."""
    for address, vendor, kind in devices:
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(vendor + "\n")
        (folder / "class").write_text(kind + "\n")
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/cmdline").write_text(command_line)
    return str(root)


MI300X = ("0x1002", "0x120000")
H100 = ("0x10de", "0x030200")


def test_as_many_gpus_as_declared(tmp_path: Path) -> None:
    root = pci(
        tmp_path,
        *((f"0000:{bus:02x}:00.0", *MI300X) for bus in range(8)),
        # A bridge of the same vendor, the board's graphics, and the processor's.
        ("0000:60:00.0", "0x1002", "0x060400"),
        ("0000:61:00.0", "0x1a03", "0x030000"),
        ("0000:62:00.0", "0x1002", "0x030000"),
    )
    assert preflight.check_gpus("amd", 8, root) == []
    assert preflight.check_gpus("", 0, root) == []
    (found,) = preflight.check_gpus("nvidia", 8, root)
    assert found["problem"] == "0 of 8 NVIDIA GPUs are on the PCI bus"


def test_a_gpu_that_is_gone_from_the_bus(tmp_path: Path) -> None:
    root = pci(tmp_path, *((f"0000:{bus:02x}:00.0", *MI300X) for bus in range(7)))
    (found,) = preflight.check_gpus("amd", 8, root)
    assert found["problem"].startswith("7 of 8 AMD GPUs are on the PCI bus: 0000:00:00.0, ")
    # Something to do on the host: no role gets to run there before this check is content.
    assert found["fix"].startswith("add pci=realloc=off to the kernel's command line and reboot: in GRUB_CMDLINE_LINUX")
    assert "grubby --update-kernel=ALL" in found["fix"]
    (tmp_path / "proc/cmdline").write_text("ro pci=realloc=off quiet")
    (found,) = preflight.check_gpus("amd", 8, root)
    assert "realloc" not in found["fix"]


def test_more_gpus_than_declared_are_a_finding_too(tmp_path: Path) -> None:
    root = pci(tmp_path, *((f"0000:{bus:02x}:00.0", *H100) for bus in range(8)))
    assert preflight.check_gpus("nvidia", 8, root) == []
    (found,) = preflight.check_gpus("nvidia", 4, root)
    assert "8 of 4 NVIDIA" in found["problem"]


@pytest.mark.parametrize(("enrolled", "findings"), [(True, 0), (False, 1)])
def test_secure_boot_without_an_enrolled_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enrolled: bool, findings: int
) -> None:
    variables = tmp_path / "sys/firmware/efi/efivars"
    variables.mkdir(parents=True)
    (tmp_path / "var/lib/dkms").mkdir(parents=True)
    (tmp_path / "var/lib/dkms/mok.pub").write_bytes(b"")
    said = "is already enrolled" if enrolled else "is not enrolled"
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/mokutil", f'echo "$2 {said}"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    switch = variables / "SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    switch.write_bytes(b"\x06\0\0\0\x01")
    found = preflight.check_secure_boot("amd", str(tmp_path))
    assert len(found) == findings
    assert all("mokutil --import" in item["fix"] for item in found)
    assert preflight.check_secure_boot("", str(tmp_path)) == [], "a host without GPUs loads no driver"
    switch.write_bytes(b"\x06\0\0\0\x00")
    assert preflight.check_secure_boot("amd", str(tmp_path)) == []


@pytest.mark.parametrize("key", ["", "var/lib/dkms/mok.pub", "var/lib/shim-signed/mok/MOK.der"])
def test_secure_boot_names_a_key_that_is_there_or_how_to_make_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "sys/firmware/efi/efivars").mkdir(parents=True)
    switch = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    (tmp_path / switch).write_bytes(b"\x06\0\0\0\x01")
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin/mokutil", 'echo "$2 is not enrolled"')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    if key:
        (tmp_path / key).parent.mkdir(parents=True)
        (tmp_path / key).touch()
    (found,) = preflight.check_secure_boot("amd", str(tmp_path))
    assert "switch Secure Boot off" in found["fix"]
    if key:
        assert f"mokutil --import {tmp_path}/{key}`" in found["fix"]
        assert "dkms generate_mok" not in found["fix"]
    else:
        # A key that DKMS would make at a build that this check prevents is no way out.
        for made, where in (
            ("`update-secureboot-policy --new-key`", "var/lib/shim-signed/mok/MOK.der"),
            ("`dkms generate_mok`", "var/lib/dkms/mok.pub"),
        ):
            assert f"run {made}, then `mokutil --import {tmp_path}/{where}`" in found["fix"]


def test_too_little_room_for_the_initramfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "boot").mkdir()
    monkeypatch.setattr(preflight, "BOOT_MIB", 10**12)
    (found,) = preflight.check_boot_space("nvidia", str(tmp_path))
    assert "in /boot" in found["problem"]
    (tmp_path / "sys/module/nvidia").mkdir(parents=True)
    assert preflight.check_boot_space("nvidia", str(tmp_path)) == [], "the driver is there already"
    monkeypatch.setattr(preflight, "BOOT_MIB", 0)
    assert preflight.check_boot_space("amd", str(tmp_path)) == []
