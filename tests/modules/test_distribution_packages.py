"""distribution_packages: real apt-get and dpkg, on a root of their own with a repository of tiny packages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

packages = load_module("distribution_packages")

needs_apt = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "dpkg", "dpkg-deb"))), reason="this machine has no apt"
)


# ------------------------------------------------------------------ plan


@pytest.mark.parametrize(
    ("have", "want", "expected"),
    [
        ({}, [], []),
        ({"a": ("1.0", None)}, ["a", "a=1.0", "a=1.*"], []),
        ({}, ["a"], [("a", "installed", "missing")]),
        ({}, ["a", "a"], [("a", "installed", "missing")]),
        ({"a": ("1.0", None)}, ["a=2.0"], [("a", "2.0", "1.0")]),
        ({"a": ("5:27.1-1", None)}, ["a=5:26.*"], [("a", "5:26.*", "5:27.1-1")]),
        ({"a": ("2", None, "1")}, ["a=1", "a=2", "a"], []),
        ({"a": ("2", None, "1")}, ["a=3"], [("a", "3", "2, 1")]),
        ({"a": (None, "half configured")}, ["a"], [("a", "installed", "half configured")]),
        ({"b": ("1", None)}, ["b", "a"], [("a", "installed", "missing")]),
    ],
)
def test_plan(have: Json, want: list[str], expected: list[tuple[str, str, str]]) -> None:
    told = packages.plan(have, want)
    assert [(item["name"], item["wanted"], item["actual"]) for item in told] == expected
    assert {item["what"] for item in told} <= {"package"}


# ------------------------------------------------------------------ a root of its own


class Host:
    """dpkg's database, apt's folders and a repository, all below one folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.shop, self.record = folder / "root", folder / "shop", folder / "state/packages.json"
        for name in ("var/lib/dpkg/updates", "var/lib/dpkg/info", "var/cache/apt/archives/partial", "etc/apt"):
            (self.root / name).mkdir(parents=True)
        for name in ("var/lib/apt/lists/partial", "var/log/apt", "etc/apt/preferences.d", "etc/apt/none"):
            (self.root / name).mkdir(parents=True)
        (self.root / "var/lib/dpkg/status").touch()
        self.shop.mkdir()
        self.sources(f"deb [trusted=yes] file:{self.shop} ./")
        options = ["--root=" + str(self.root), "--force-not-root", "--force-script-chrootless", "--force-bad-path"]
        self.config = folder / "apt.conf"
        self.config.write_text(
            f'Dir "{self.root}";\nDir::State::status "{self.root}/var/lib/dpkg/status";\n'
            'Dir::Bin::dpkg "/usr/bin/dpkg";\nDir::Etc::parts "none";\nDir::Etc::main "none";\n'
            'Acquire::Languages "none";\nAPT::Sandbox::User "root";\nAPT::Architecture "amd64";\n'
            "DPkg::Options { " + " ".join(f'"{option}";' for option in options) + " };\n"
        )

    def sources(self, line: str) -> None:
        (self.root / "etc/apt/sources.list").write_text(line + "\n")

    def sell(self, name: str, version: str = "1.0", postinst: str = "", more: str = "") -> Path:
        """A package in the shop, and the shop's list anew."""
        folder = self.shop / "build" / name
        (folder / "DEBIAN").mkdir(parents=True, exist_ok=True)
        fields = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@localhost>\n{more}"
        (folder / "DEBIAN/control").write_text(fields + "Description: x\n")
        if postinst:
            (folder / "DEBIAN/postinst").write_text(f"#!/bin/sh\n{postinst}\n")
            (folder / "DEBIAN/postinst").chmod(0o755)
        (folder / "usr/share" / name).mkdir(parents=True, exist_ok=True)
        (folder / "usr/share" / name / "version").write_text(version)
        file = self.shop / f"{name}_{version}_all.deb"
        build = ["dpkg-deb", "--root-owner-group", "--build", str(folder), str(file)]
        subprocess.run(build, check=True, capture_output=True)
        with (self.shop / "Packages").open("a") as index:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            index.write(f"{fields}Filename: ./{file.name}\nSize: {file.stat().st_size}\nSHA256: {digest}\n\n")
        return file

    def dpkg(self, *words: str) -> None:
        options = ["--root=" + str(self.root), "--force-not-root", "--force-script-chrootless", "--force-bad-path"]
        subprocess.run(["dpkg", *options, *words], check=True, capture_output=True)

    def installed(self, name: str) -> str:
        """The version whose files are really there."""
        file = self.root / "usr/share" / name / "version"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setenv("APT_CONFIG", str(made.config))
    monkeypatch.setenv("DPKG_ROOT", str(made.root))
    monkeypatch.setenv("DPKG_ADMINDIR", str(made.root / "var/lib/dpkg"))
    monkeypatch.setenv("DPKG_FORCE", "not-root,script-chrootless,bad-path,downgrade")
    monkeypatch.setattr(packages, "DPKG_JOURNAL", str(made.root / "var/lib/dpkg/updates"))
    return made


def run(host: Host, *names: str, **more: Any) -> Json:
    return call(packages, packages=list(names), record=str(host.record), **more)


@needs_apt
def test_what_is_missing_is_installed_once_and_noted(host: Host) -> None:
    host.sell("tool")
    host.sell("theirs")
    host.dpkg("--install", str(host.shop / "theirs_1.0_all.deb"))
    told = run(host, "tool", "theirs", check=True)
    assert [item["name"] for item in told["changes"]] == ["tool"]
    assert (host.installed("tool"), host.record.exists()) == ("", False)

    done = run(host, "tool", "theirs")
    assert (done["changed"], host.installed("tool")) == (True, "1.0")
    assert json.loads(host.record.read_text()) == {"packages": ["tool"]}, "what the site had is the site's"

    # Nothing is missing: no list is read, so it does not matter that there is none.
    host.sources("deb [trusted=yes] file:/nonexistent ./")
    assert not run(host, "tool", "theirs")["changed"]
    # One that was taken out by hand comes back into the plan.
    host.dpkg("--remove", "tool")
    assert [item["actual"] for item in run(host, "tool", check=True)["changes"]] == ["missing"]


@needs_apt
def test_the_record_names_what_is_still_there(host: Host) -> None:
    for name in ("one", "two"):
        host.sell(name)
    run(host, "one")
    run(host, "two")
    assert call(packages, state="recorded", record=str(host.record))["recorded"] == ["one", "two"]
    host.dpkg("--purge", "one")
    assert call(packages, state="recorded", record=str(host.record))["recorded"] == ["two"]
    assert call(packages, state="recorded", record="/nonexistent/record")["recorded"] == []


@needs_apt
def test_another_version_is_replaced_and_stays_the_sites(host: Host) -> None:
    new, old = host.sell("tool", "2.0"), host.sell("tool", "1.0")
    host.dpkg("--install", str(new))
    told = run(host, "tool=1.*", check=True)["changes"]
    assert [(item["wanted"], item["actual"]) for item in told] == [("1.*", "2.0")]
    assert run(host, "tool=1.*")["changed"]
    assert host.installed("tool") == "1.0"
    assert not run(host, "tool=1.*")["changed"]
    assert not host.record.exists()
    assert old.exists()


@needs_apt
def test_an_interrupted_dpkg_is_finished(host: Host) -> None:
    """A run that was killed between unpacking and configuring."""
    tool = host.sell("tool")
    host.dpkg("--unpack", str(tool))
    told = run(host, "tool", check=True)["changes"]
    assert [item["actual"] for item in told] == ["unpacked, not configured", "dpkg was interrupted at tool"]
    assert run(host, "tool")["changed"]
    assert not run(host, "tool")["changed"]


@needs_apt
def test_what_cannot_be_finished_says_where_to_look(host: Host) -> None:
    broken = host.sell("tool", postinst="echo no disk here >&2; exit 7")
    host.dpkg("--unpack", str(broken))
    failed = run(host, "tool")
    assert failed["failed"]
    assert "cannot be finished" in failed["msg"]
    assert "dpkg --configure -a" in failed["msg"]


class Lock:
    """Another package manager, as far as apt can see: it holds the lock for some seconds."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.seconds = path, seconds

    def __enter__(self) -> None:
        script = (
            "import fcntl, sys, time; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(float(sys.argv[2]))"
        )
        command = ["python3", "-c", script, str(self.path), str(self.seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@needs_apt
@pytest.mark.parametrize("lock", ["var/lib/dpkg/lock-frontend", "var/lib/apt/lists/lock"])
def test_a_package_manager_of_somebody_else_is_waited_for(host: Host, lock: str) -> None:
    host.sell("tool")
    with Lock(host.root / lock, 3):
        began = time.monotonic()
        done = run(host, "tool", lock_timeout_s=60)
    assert done["changed"], done
    assert time.monotonic() - began > 2
    assert host.installed("tool") == "1.0"


@needs_apt
@pytest.mark.parametrize("lock", ["var/lib/dpkg/lock-frontend", "var/lib/apt/lists/lock"])
def test_a_lock_that_is_never_given_back_is_named(host: Host, lock: str) -> None:
    host.sell("tool")
    with Lock(host.root / lock, 600):
        failed = run(host, "tool", lock_timeout_s=1)
    assert failed["failed"]
    assert "another process has held the package manager for 1 s" in failed["msg"]
    assert "lock" in failed["msg"]
    # By its command line: our stand-in's.
    assert "fcntl.LOCK_EX" in failed["msg"]
    # And the same again, once it has been given back:
    assert run(host, "tool")["changed"]


@needs_apt
def test_lists_that_cannot_be_read_are_named(host: Host) -> None:
    host.sources("deb [trusted=yes] file:/nonexistent/mirror ./")
    failed = run(host, "tool")
    assert failed["failed"]
    assert "the package lists of this host cannot be read" in failed["msg"]
    assert "/nonexistent/mirror" in failed["msg"]
    assert "clusterkit_proxy" in failed["msg"]


@needs_apt
def test_a_package_that_nobody_has_is_named(host: Host) -> None:
    host.sell("tool")
    failed = run(host, "tool", "no-such-tool")
    assert failed["failed"]
    assert "Unable to locate package no-such-tool" in failed["msg"]
    assert "cannot be read" not in failed["msg"]


# ------------------------------------------------------------------ pins and holds


def held(host: Host) -> list[str]:
    return subprocess.run(["apt-mark", "showhold"], check=True, capture_output=True, text=True).stdout.split()


@needs_apt
def test_a_pattern_takes_the_newest_version_that_fits(host: Host) -> None:
    """AMD names the driver in the middle of its package's version."""
    for version in ("1:6.16.13.30300300-9.22.04", "1:6.16.13.30300300-10.22.04", "1:6.16.13.30300400-11.22.04"):
        host.sell("amdgpu-dkms", version)
    assert run(host, "amdgpu-dkms=*.30300300-*")["versions"] == {"amdgpu-dkms": "1:6.16.13.30300300-10.22.04"}
    assert not run(host, "amdgpu-dkms=*.30300300-*")["changed"]
    refused = run(host, "amdgpu-dkms=*.30300900-*")
    assert "Of amdgpu-dkms there is: 1:6.16.13.30300400-11.22.04, 1:6.16.13.30300300-10.22.04" in refused["msg"]


@needs_apt
def test_a_hold_keeps_a_package_and_gives_way_to_another_pin(host: Host) -> None:
    host.sell("tool", "1.0")
    host.sell("kernel")
    host.sell("other")
    host.dpkg("--install", str(host.shop / "kernel_1.0_all.deb"))
    host.dpkg("--install", str(host.shop / "other_1.0_all.deb"))
    given: Json = {"hold": ["tool", "kern*"]}
    told = run(host, "tool=1.0", check=True, **given)["changes"]
    assert [(item["what"], item["name"]) for item in told] == [
        ("package", "tool"),
        ("hold", "kernel"),
        ("hold", "tool"),
    ]
    assert held(host) == []
    run(host, "tool=1.0", **given)
    assert held(host) == ["kernel", "tool"]
    assert not run(host, "tool=1.0", **given)["changed"]
    # One that was lifted by hand is put back.
    subprocess.run(["apt-mark", "unhold", "kernel"], check=True, capture_output=True)
    assert [item["name"] for item in run(host, "tool=1.0", **given)["changes"]] == ["kernel"]

    host.sell("tool", "2.0")
    done = run(host, "tool=2.0", **given)
    assert (host.installed("tool"), held(host)) == ("2.0", ["kernel", "tool"])
    assert [item["name"] for item in done["changes"]] == ["tool"]
    # A failed installation leaves none behind.
    assert run(host, "tool=2.5", **given)["failed"]
    assert held(host) == ["kernel", "tool"]
    # A hold of the site's stands against who holds nothing himself.
    host.record.unlink()
    host.sell("tool", "3.0")
    failed = run(host, "tool=3.0")
    assert "tool=3.0" in failed["msg"]
    assert host.installed("tool") == "2.0"


@needs_apt
def test_a_held_package_makes_place_for_the_one_that_replaces_it(host: Host) -> None:
    """As the pinning packages of two branches do."""
    host.sell("pin-580", more="Provides: pin\nConflicts: pin\n")
    host.sell("pin-590", more="Provides: pin\nConflicts: pin\n")
    run(host, "pin-580", hold=["pin-*"])
    run(host, "pin-590", hold=["pin-*"])
    assert (host.installed("pin-580"), host.installed("pin-590"), held(host)) == ("", "1.0", ["pin-590"])


@needs_apt
def test_removal_lifts_our_holds_and_no_others(host: Host) -> None:
    for name in ("ours", "theirs"):
        host.sell(name)
    host.dpkg("--install", str(host.shop / "theirs_1.0_all.deb"))
    subprocess.run(["apt-mark", "hold", "theirs"], check=True, capture_output=True)
    run(host, "ours", hold=["*s"])
    assert held(host) == ["ours", "theirs"]
    record = str(host.record)
    told = call(packages, state="absent", record=record, check=True)
    assert [item["name"] for item in told["changes"]] == ["ours"]
    assert call(packages, state="absent", record=record)["recorded"] == ["ours"]
    assert (held(host), host.installed("ours")) == (["theirs"], "1.0")
    assert not call(packages, state="absent", record=record)["changed"]


@needs_apt
def test_removal_takes_packages_where_they_are_named(host: Host) -> None:
    for name in ("tool", "theirs"):
        host.sell(name)
    host.dpkg("--install", str(host.shop / "theirs_1.0_all.deb"))
    run(host, "tool", "theirs", hold=["tool"])
    assert call(packages, state="absent", packages=["*"], record=str(host.record))["recorded"] == []
    assert (host.installed("tool"), host.installed("theirs")) == ("", "1.0")


@needs_apt
def test_what_goes_first_and_what_has_to_be_alike(host: Host) -> None:
    for version in ("1.0-1", "2.0-1"):
        host.sell("driver", version)
    for version in ("1.0-5", "2.0-7"):
        host.sell("manager", version)
    host.sell("pinning", postinst=f"[ ! -e {host.root}/usr/share/driver ]")
    given: Json = {"first": ["pinning"], "alike": {"manager": "driver"}}
    run(host, "driver=1.*", **given)
    assert [host.installed(name) for name in ("pinning", "driver", "manager")] == ["1.0", "1.0-1", "1.0-5"]
    assert not run(host, "driver=1.*", **given)["changed"]
    run(host, "driver=2.*", **given)
    assert host.installed("manager") == "2.0-7"


@needs_apt
def test_what_was_built_together_stays_together(host: Host) -> None:
    """As AMD's driver and its firmware: their versions differ, the number of the build does not."""
    for name, version in (
        ("firmware", "30.1-100"),
        ("firmware", "30.2-200"),
        ("driver", "6.1-100"),
        ("driver", "6.1-200"),
    ):
        host.sell(name, version)
    given: Json = {"built_with": {"driver": "firmware"}}
    assert run(host, "firmware=30.1-*", **given)["versions"] == {"firmware": "30.1-100", "driver": "6.1-100"}
    assert not run(host, "firmware=30.1-*", **given)["changed"]
    told = run(host, "firmware=30.2-*", check=True, **given)["changes"]
    assert [(item["name"], item["actual"]) for item in told] == [("firmware", "30.1-100"), ("driver", "6.1-100")]
    run(host, "firmware=30.2-*", **given)
    assert host.installed("driver") == "6.1-200"


@needs_apt
def test_optional_packages_come_along_where_there_are_any(host: Host) -> None:
    for name in ("tool", "extra", "more"):
        host.sell(name)
    run(host, "tool", optional=["extra", "no-such-extra"])
    assert host.installed("extra") == "1.0"
    # Alone, they are no reason to ask the package manager.
    host.sources("deb [trusted=yes] file:/nonexistent ./")
    assert not run(host, "tool", optional=["more"])["changed"]


@needs_apt
def test_a_guarded_package_waits_for_what_runs(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program stands for systemctl: `active` decides whether the unit runs."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/systemctl").write_text(f"#!/bin/sh\n[ -e {tmp_path}/active ]\n")
    (tmp_path / "bin/systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name in ("nvidia-driver", "tool"):
        host.sell(name)
    (tmp_path / "active").touch()
    given: Json = {"guard": ["*nvidia*"], "busy_unit": "ray.service"}
    left = run(host, "nvidia-driver", "tool", **given)
    assert left["waiting"] == ["nvidia-driver"]
    told = {item["name"]: (item.get("left"), item.get("disrupts")) for item in left["changes"]}
    assert told == {"tool": (None, None), "nvidia-driver": (True, ["node"])}
    assert (host.installed("tool"), host.installed("nvidia-driver")) == ("1.0", "")
    assert not run(host, "nvidia-driver", "tool", **given)["changed"], "what is left is no change"
    agreed = run(host, "nvidia-driver", check=True, consent=True, **given)
    assert [(item.get("left"), item["disrupts"]) for item in agreed["changes"]] == [(None, ["node"])]

    (tmp_path / "active").unlink()
    assert run(host, "nvidia-driver", "tool", **given)["waiting"] == []
    assert host.installed("nvidia-driver") == "1.0"


@needs_apt
def test_space_is_asked_for_before_anything_is_installed(host: Host) -> None:
    host.sell("tool")
    refused = run(host, "tool", free_mib={str(host.root / "boot"): 1 << 40})
    assert f"are free in {host.root}/boot, and {1 << 40} are needed" in refused["msg"]
    assert not host.record.exists()
    run(host, "tool")
    assert not run(host, "tool", free_mib={"/boot": 1 << 40})["changed"], "nothing is to be installed"


@needs_apt
def test_headers_that_nobody_has_name_the_newest_kernel(host: Host) -> None:
    for kernel in ("6.1.0-9-amd64", "6.1.0-27-amd64", "6.1.0-30-cloud-amd64", "6.1.0-31-rt-amd64"):
        host.sell(f"linux-headers-{kernel}")
    failed = run(host, "linux-headers-6.1.0-13-amd64")
    assert "No headers for the running kernel 6.1.0-13-amd64 are in the sources" in failed["msg"]
    assert "The newest kernel of its kind there is 6.1.0-27-amd64: install it" in failed["msg"]
    lone = run(host, "linux-headers-5.4.0-1-odd")
    assert "nor for another of its kind" in lone["msg"]


@pytest.mark.parametrize(
    ("said", "advice"),
    [
        # Recorded from apt 2.6.1 (Debian 12).
        ("E: The repository 'http://x/30.30.9 jammy Release' does not have a Release file.", "nothing at that address"),
        (
            "W: GPG error: http://x jammy InRelease: The following signatures couldn't be verified",
            "does not fit the key",
        ),
        ("E: You don't have enough free space in /var/cache/apt/archives/.", "disk is full"),
        # Recorded from dnf 4.14.
        (
            "Error: Failed to download metadata for repo 'x': repomd.xml GPG signature verification error: "
            "Bad GPG signature",
            "does not fit the key",
        ),
        ("  - Status code: 404 for http://x/30.30.9/repodata/repomd.xml (IP: 127.0.0.1)", "nothing at that address"),
        ("  - nothing provides dkms needed by amdgpu-dkms-1:6.16.13-2327507.el9.noarch", "dkms comes from EPEL"),
        # Constructed from systemd's and dkms's sources.
        (
            "Failed to start nvidia-persistenced.service: Unit nvidia-persistenced.service is masked.",
            "systemctl unmask",
        ),
        ("Error! Bad return status for module build on kernel: 6.17.0 (x86_64)", "does not build against this kernel"),
        ("E: Unable to locate package x", ""),
    ],
)
def test_advice(said: str, advice: str) -> None:
    told = packages.advice(said)
    assert advice in told
    assert bool(told) == bool(advice)


# ------------------------------------------------------------------ dnf, where this machine has none


@pytest.fixture
def dnf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that stand for rpm and dnf: a file is the database, the words that dnf was given are kept."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "database").write_text("bash\t5.1-1.el9\n")
    rpm = f"#!/bin/sh\ncat {tmp_path}/database\n"
    install = (
        f'#!/bin/sh\necho "$@" >> {tmp_path}/words\n'
        f"[ -e {tmp_path}/error ] && {{ cat {tmp_path}/error >&2; exit 1; }}\n"
        'for word; do [ "$word" != makecache ] || exit 0; done\n'
        f"printf 'numactl-libs\\t2.0-1.el9\\n' >> {tmp_path}/database\n"
    )
    for name, text in {"rpm": rpm, "dnf": install}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.defpath}")
    which = shutil.which
    monkeypatch.setattr(packages.shutil, "which", lambda name: None if name == "dpkg-query" else which(name))
    return tmp_path


def test_the_enterprise_family(dnf: Path) -> None:
    assert call(packages, packages=["bash", "numactl-libs"])["changed"]
    words = (dnf / "words").read_text()
    assert "install numactl-libs" in words
    assert "exit_on_lock=True" in words
    assert "install_weak_deps=False" in words
    assert not call(packages, packages=["bash", "numactl-libs"])["changed"]


def test_a_mirror_that_dnf_cannot_reach_is_named(dnf: Path) -> None:
    (dnf / "error").write_text("Error: Failed to download metadata for repo 'baseos': Cannot download repomd.xml\n")
    failed = call(packages, packages=["numactl-libs"])
    assert "the package lists of this host cannot be read" in failed["msg"]
    assert "baseos" in failed["msg"]


def test_dnf_holds_by_versionlock_and_leaves_the_sites_lines(dnf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = dnf / "versionlock.list"
    lock.write_text("mine-0:1.0-1.*\n")
    monkeypatch.setattr(packages, "VERSIONLOCK", str(lock))
    (dnf / "database").write_text("kernel-core\t5.14.0-1.el9\t0\nkernel-core\t5.14.0-2.el9\t0\nbash\t5.1-1.el9\t0\n")
    given: Json = {"packages": ["numactl-libs"], "hold": ["kernel-*", "numactl*"], "record": str(dnf / "record")}
    assert call(packages, **given)["changed"]
    assert lock.read_text() == (
        "mine-0:1.0-1.*\n# Begin: held by clusterkit\nkernel-core-0:5.14.0-1.el9.*\nkernel-core-0:5.14.0-2.el9.*\n"
        "numactl-libs-0:2.0-1.el9.*\n# End: held by clusterkit\n"
    )
    assert not call(packages, **given)["changed"]
    # A version of its own accord: locked anew.
    (dnf / "database").write_text("kernel-core\t5.14.0-3.el9\t0\nnumactl-libs\t2.0-1.el9\t0\n")
    assert [item["name"] for item in call(packages, **given)["changes"]] == ["kernel-core"]
    call(packages, state="absent", record=str(dnf / "record"))
    assert lock.read_text() == "mine-0:1.0-1.*\n"


@pytest.mark.parametrize("record", ["none yet", "notes packages"])
def test_a_call_that_holds_nothing_leaves_the_holds_of_another_alone(
    dnf: Path, monkeypatch: pytest.MonkeyPatch, record: str
) -> None:
    """The host's own packages come with one call, the driver and its holds with another: run after run."""
    lock = dnf / "versionlock.list"
    monkeypatch.setattr(packages, "VERSIONLOCK", str(lock))
    (dnf / "database").write_text("kernel-core\t5.14.0-1.el9\t0\nbash\t5.1-1.el9\t0\n")
    driver: Json = {"packages": ["bash"], "hold": ["kernel-*"], "record": str(dnf / "driver")}
    base: Json = {"packages": ["numactl-libs"], "record": str(dnf / "base")}
    if record == "notes packages":
        assert call(packages, **base)["changed"]
    assert call(packages, **driver)["changed"]
    written = lock.read_text()
    assert "kernel-core-0:5.14.0-1.el9.*" in written
    # Its own installation lifts no hold of others, and notes none.
    assert call(packages, **base)["changed"] is (record == "none yet")
    assert lock.read_text() == written
    assert "held" not in json.loads((dnf / "base").read_text())
    for given in (base, driver, base):
        assert not call(packages, **given)["changed"]
    # Not even where a line of theirs is of an older version.
    (dnf / "database").write_text("kernel-core\t5.14.0-2.el9\t0\nbash\t5.1-1.el9\t0\n")
    assert [item["what"] for item in call(packages, **base)["changes"]] == ["package"]
    assert lock.read_text() == written
    # Who has put them lifts them, with its own record in hand.
    assert call(packages, **driver)["changed"]
    assert [item["wanted"] for item in call(packages, **{**driver, "hold": []})["changes"]] == ["not held"]
    assert "kernel-core" not in lock.read_text()
    assert not call(packages, **{**driver, "hold": []})["changed"]


@pytest.mark.parametrize("order", [("1", "2"), ("2", "1")])
def test_of_several_installed_versions_any_counts(dnf: Path, order: tuple[str, str]) -> None:
    """dnf keeps kernel-devel of other kernels, and rpm lists them in any order."""
    lines = [f"kernel-devel\t5.14.0-{number}.el9\t0\n" for number in order]
    (dnf / "database").write_text("".join(lines))
    told = call(packages, packages=["kernel-devel=5.14.0-1.el9"])
    assert (told["changed"], told["versions"]) == (False, {"kernel-devel": "5.14.0-1.el9"})
    # Without the wanted one: it is missed, and what is there is named.
    missed = call(packages, packages=["kernel-devel=5.14.0-3.el9"], check=True)["changes"]
    assert {item["name"] for item in missed} == {"kernel-devel"}
    assert "5.14.0-1.el9" in missed[0]["actual"]


def test_another_dnf_is_waited_for(dnf: Path) -> None:
    """Its words are recorded from dnf 4.14; a real one: tests/roles/test_gpu_hosts_el.py."""
    pid = os.getpid()
    (dnf / "error").write_text(f"metadata already locked by {pid}\n  The application with PID {pid} is: dnf\n")
    failed = call(packages, packages=["numactl-libs"], lock_timeout_s=1)
    assert "another process has held the package manager for 1 s: metadata already locked by" in failed["msg"]
    assert "pytest" in failed["msg"], "the holder's command line: ours"


def test_dnf_is_asked_for_one_version(dnf: Path) -> None:
    """dnf's own star would take amdgpu-dkms-firmware for amdgpu-dkms=*.30300300-*."""
    query = f"""#!/bin/sh
case "$*" in
*latest-limit*) echo 580.65.06-10.el9 ;;
*repoquery*) printf '580.65.06-10.el9\\n580.65.06-9.el9\\n590.44.01-1.el9\\n' ;;
*install*) echo "$@" >{dnf}/words; printf 'driver\\t580.65.06-10.el9\\n' >>{dnf}/database ;;
esac
"""
    (dnf / "bin/dnf").write_text(query)
    assert call(packages, packages=["driver=580.*"])["versions"] == {"driver": "580.65.06-10.el9"}
    assert (dnf / "words").read_text().split()[-1] == "driver-580.65.06-10.el9"
    refused = call(packages, packages=["driver=570.*"])
    assert "Of driver there is: 580.65.06-10.el9, 580.65.06-9.el9, 590.44.01-1.el9" in refused["msg"]
    # A site's dnf that passes over repositories it cannot read says so, and goes on.
    passed = "Status code: 404 for http://x/repodata/repomd.xml\\nError: Failed to download metadata for repo x"
    (dnf / "bin/dnf").write_text(f"#!/bin/sh\ncase \"$*\" in *makecache) printf '{passed}\\n' >&2 ;; esac\n")
    skipped = call(packages, packages=["driver=590.*"])["msg"]
    assert "Of driver there is: none. Status code: 404 for http://x/repodata/repomd.xml" in skipped
    assert "The repository has nothing at that address" in skipped


def test_dnf_names_the_newest_kernel_with_headers(dnf: Path) -> None:
    """Recorded from dnf 4.14."""
    (dnf / "error").write_text("Error: Unable to find a match: kernel-headers-5.14.0-1.el9 kernel-devel-5.14.0-1.el9\n")
    query = "#!/bin/sh\nfor word; do [ $word = repoquery ] && echo 5.14.0-570.el9.x86_64 && exit; done\n"
    (dnf / "bin/dnf").write_text(query + f"cat {dnf}/error >&2; exit 1\n")
    failed = call(packages, packages=["kernel-devel=5.14.0-1.el9"])
    assert "No headers for the running kernel 5.14.0-1.el9 are" in failed["msg"]
    assert "The newest kernel of its kind there is 5.14.0-570.el9.x86_64" in failed["msg"]


def test_no_package_manager_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert "neither dpkg nor dnf" in call(packages, packages=["a"])["msg"]
