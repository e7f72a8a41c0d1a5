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

    def sell(self, name: str, version: str = "1.0", postinst: str = "") -> Path:
        """A package in the shop, and the shop's list anew."""
        folder = self.shop / "build" / name
        (folder / "DEBIAN").mkdir(parents=True, exist_ok=True)
        fields = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@localhost>\n"
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


def test_no_package_manager_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    assert "neither dpkg nor dnf" in call(packages, packages=["a"])["msg"]
