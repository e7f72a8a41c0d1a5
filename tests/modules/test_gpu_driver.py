"""gpu_driver: the decision as a table; the reading on trees that stand for a host, with tools that print what real ones
printed; modinfo for real."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

from tests.modules.conftest import load_module

Json = dict[str, Any]

driver = load_module("gpu_driver")

KERNEL, NEXT = "6.8.0-60-generic", "6.8.0-71-generic"
BUILD = "6.16.13.30300400-2341068"
OLD = "6.16.13-2327507.24.04"
NEW = "6.16.13-2341068.24.04"


def disk(version: str | None = "6.16.13", src: str = "NEW", **more: Any) -> Json:
    path = f"/lib/modules/{KERNEL}/updates/dkms/amdgpu.ko.zst"
    return {"path": path, "version": version, "srcversion": src, "signer": "host key", **more}


def loaded(version: str | None = "6.16.13", src: str = "NEW", initialising: bool = False) -> Json:
    return {"version": version, "srcversion": src, "initialising": initialising}


def built(version: str = NEW, kernel: str | None = KERNEL, state: str = "installed", module: str = "amdgpu") -> Json:
    return {"module": module, "version": version, "kernel": kernel, "state": state}


SECURE = {"enabled": True, "key": "/var/lib/dkms/mok.pub", "enrolled": False, "pending": False}
INBOX = disk(None, "INBOX", path=f"/lib/modules/{KERNEL}/kernel/drivers/gpu/drm/amd/amdgpu/amdgpu.ko")
BLACKLIST = {"where": "/etc/modprobe.d/blacklist-amdgpu.conf", "line": "blacklist amdgpu"}
WANTED: Json = {
    "module": "amdgpu",
    "version": "30.30.4",
    "builds": [BUILD],
    "dkms": True,
    "parameters": [],
    "reasons": [],
    "forget_reasons": False,
    "load": False,
}
FITS: Json = {
    "boot_id": "this boot",
    "running_kernel": KERNEL,
    "next_kernel": KERNEL,
    "cmdline": ["BOOT_IMAGE=/vmlinuz", "ro", "pci=bfsort"],
    "dkms": [built()],
    "make_log": None,
    "headers": [KERNEL, NEXT],
    "on_disk": {KERNEL: disk()},
    "loaded": loaded(),
    "blacklists": [],
    "nouveau": None,
    "secure_boot": {"enabled": False, "key": None, "enrolled": None, "pending": False},
    "marker": None,
    "marker_path": "/state/reboot.json",
}
OTHER_LOADED: Json = {"loaded": loaded(src="OLD")}


def marker(boot_id: str = "boot before", **wanted: Any) -> Json:
    wish = driver.marked({**WANTED, **wanted})
    return {"marker": {"boot_id": boot_id, "wanted": wish, "reasons": ["x"], "at": "2026-11-20T08:00:00Z"}}


# what it is called, facts, wanted, state, words that have to stand in the summary
TABLE: list[tuple[str, Json, Json, str, list[str]]] = [
    ("as wanted", {}, {}, "fits", []),
    ("any of AMD's where no build is named", {}, {"builds": []}, "fits", []),
    ("a beginning of the build", {}, {"builds": ["6.16"]}, "fits", []),
    ("nothing loaded, and it may be", {"loaded": None}, {"load": True}, "load", ["loaded: nothing"]),
    ("nothing loaded, and it may not be", {"loaded": None}, {}, "reboot", ["amdgpu is not loaded"]),
    ("still initialising", {"loaded": loaded(initialising=True)}, {}, "load", []),
    ("initialising, and the wrong one", {"loaded": loaded("6.12.12", "OLD", True)}, {}, "reboot", ["6.12.12"]),
    (
        "an older one is loaded",
        {"loaded": loaded("6.12.12", "OLD")},
        {},
        "reboot",
        ["loaded: amdgpu 6.12.12", f"wanted: amdgpu 30.30.4 ({BUILD})"],
    ),
    ("the same version of another build", OTHER_LOADED, {}, "reboot", ["another build of amdgpu 6.16.13"]),
    ("the kernel's own is loaded", {"loaded": loaded(None)}, {}, "reboot", ["the kernel's own amdgpu is loaded"]),
    ("as amd-smi names it", {"loaded": loaded("Linuxver6.8.0")}, {}, "reboot", ["the kernel's own amdgpu is loaded"]),
    # What is on the disk.
    ("nothing installed", {"dkms": [], "on_disk": {KERNEL: INBOX}}, {}, "not_installed", ["is not installed"]),
    ("no module at all", {"dkms": [], "on_disk": {KERNEL: None}}, {}, "not_installed", []),
    ("an older build is installed", {"dkms": [built(OLD)]}, {}, "not_installed", [f"not installed, {OLD} is"]),
    (
        "DKMS did not build",
        {
            "dkms": [built(OLD), built(kernel=None, state="added")],
            "make_log": {"path": f"/var/lib/dkms/amdgpu/{NEW}/build/make.log", "tail": "error: too many arguments"},
        },
        {},
        "broken",
        [
            f"DKMS has not installed amdgpu/{NEW} for the kernel {KERNEL}",
            "too many arguments",
            f"dkms install -m amdgpu/{NEW}",
        ],
    ),
    (
        "DKMS could not build without headers",
        {"dkms": [built(kernel=None, state="added")], "headers": []},
        {},
        "broken",
        ["headers are not there", f"linux-headers-{KERNEL}", f"kernel-devel-{KERNEL}"],
    ),
    ("built and not installed", {"dkms": [built(state="built")]}, {}, "broken", ["has not installed"]),
    ("as a weak module", {"dkms": [built(state="installed-weak from 6.8.0-59")]}, {}, "fits", []),
    ("the original module exists", {"dkms": [built(state="installed (original_module exists)")]}, {}, "fits", []),
    ("DKMS says yes, modinfo the kernel's own", {"on_disk": {KERNEL: INBOX}}, {}, "broken", ["depmod -a"]),
    ("DKMS says yes, modinfo nothing", {"on_disk": {KERNEL: None}}, {}, "broken", ["would load no amdgpu"]),
    ("another file is in its place", {"on_disk": {KERNEL: disk("6.12.12")}}, {}, "broken", ["there is amdgpu 6.12.12"]),
    # Kernels.
    (
        "built only for the kernel that boots next",
        {"next_kernel": NEXT, "dkms": [built(kernel=NEXT)], "on_disk": {KERNEL: INBOX, NEXT: disk()}, "loaded": None},
        {"load": True},
        "reboot",
        [f"for the kernel {NEXT}, which boots next, not for the running {KERNEL}"],
    ),
    (
        "the next kernel would have no driver, and now it fits",
        {"next_kernel": NEXT, "on_disk": {KERNEL: disk(), NEXT: INBOX}},
        {},
        "fits",
        [f"DKMS has not installed amdgpu/{NEW} for the kernel {NEXT}"],
    ),
    (
        "no reboot into a kernel without the driver",
        {"next_kernel": NEXT, "on_disk": {KERNEL: disk(), NEXT: INBOX}, **OTHER_LOADED},
        {},
        "broken",
        [f"DKMS has not installed amdgpu/{NEW} for the kernel {NEXT}"],
    ),
    ("nobody knows which kernel boots next", {"next_kernel": None, **OTHER_LOADED}, {}, "reboot", []),
    # What keeps it away.
    (
        "blacklisted",
        {"loaded": None, "blacklists": [BLACKLIST]},
        {"load": True},
        "broken",
        [
            "/etc/modprobe.d/blacklist-amdgpu.conf keeps amdgpu away",
            "take that out of /etc/modprobe.d/blacklist-amdgpu.conf",
        ],
    ),
    ("blacklisted, a reboot would leave nothing", {**OTHER_LOADED, "blacklists": [BLACKLIST]}, {}, "broken", []),
    ("blacklisted, and loaded all the same", {"blacklists": [BLACKLIST]}, {}, "fits", ["keeps amdgpu away"]),
    (
        "on the kernel's command line",
        {"loaded": None, "blacklists": [{"where": "/proc/cmdline", "line": "modprobe.blacklist=amdgpu"}]},
        {},
        "broken",
        ["take that out of the boot loader's configuration"],
    ),
    (
        "on purpose",
        {
            "loaded": None,
            "blacklists": [{"where": "/proc/cmdline", "line": "modprobe.blacklist=amdgpu"}],
            "cmdline": ["modprobe.blacklist=amdgpu"],
        },
        {"load": True, "parameters": ["modprobe.blacklist=amdgpu"]},
        "load",
        [],
    ),
    (
        "Secure Boot, key not enrolled",
        {"loaded": None, "secure_boot": SECURE},
        {"load": True},
        "broken",
        ["the key /var/lib/dkms/mok.pub is not enrolled", "mokutil --import /var/lib/dkms/mok.pub", "at the console"],
    ),
    (
        "Secure Boot, enrolment pending",
        {**OTHER_LOADED, "secure_boot": {**SECURE, "pending": True}},
        {},
        "broken",
        ["waits"],
    ),
    (
        "Secure Boot, not signed",
        {**OTHER_LOADED, "on_disk": {KERNEL: disk(signer=None)}, "secure_boot": {**SECURE, "enrolled": True}},
        {},
        "broken",
        ["it is not signed"],
    ),
    ("Secure Boot, enrolled", {**OTHER_LOADED, "secure_boot": {**SECURE, "enrolled": True}}, {}, "reboot", []),
    ("Secure Boot, nobody can tell", {**OTHER_LOADED, "secure_boot": {**SECURE, "enrolled": None}}, {}, "reboot", []),
    ("Secure Boot, loaded", {"secure_boot": SECURE}, {}, "fits", ["is not enrolled"]),
    # Parameters and other reasons.
    ("booted with them", {}, {"parameters": ["pci=bfsort"]}, "fits", []),
    ("whole tokens", {}, {"parameters": ["pci=bf"]}, "reboot", ["was not booted with pci=bf"]),
    ("a parameter is missing", {}, {"parameters": ["iommu=pt"]}, "reboot", ["was not booted with iommu=pt"]),
    (
        "nothing loaded, and a reboot is needed anyway",
        {"loaded": None},
        {"load": True, "parameters": ["x"]},
        "reboot",
        [],
    ),
    ("somebody else's reason", {}, {"reasons": ["new firmware"]}, "reboot", ["new firmware"]),
    ("only parameters", {}, {"module": None, "parameters": ["iommu=pt"]}, "reboot", ["iommu=pt"]),
    ("only parameters, in force", {}, {"module": None, "parameters": ["ro"]}, "fits", []),
    ("not installed stays so", {"dkms": []}, {"parameters": ["iommu=pt"]}, "not_installed", []),
    # The guard.
    (
        "rebooted for it, and no better",
        {**OTHER_LOADED, **marker()},
        {},
        "broken",
        [
            "rebooted once for this already, at 2026-11-20T08:00:00Z",
            "another build",
            "remove the marker /state/reboot.json",
        ],
    ),
    ("killed between the marker and the reboot", {**OTHER_LOADED, **marker("this boot")}, {}, "reboot", []),
    ("rebooted for another version", {**OTHER_LOADED, **marker(version="30.30.3")}, {}, "reboot", []),
    ("nobody can read the marker", {**OTHER_LOADED, "marker": {}}, {}, "reboot", []),
    ("loading needs no reboot", {"loaded": None, **marker(load=True)}, {"load": True}, "load", []),
    (
        "somebody else's reason, again",
        marker(reasons=["firmware 2"]),
        {"reasons": ["firmware 2"]},
        "broken",
        ["firmware 2"],
    ),
    ("somebody else's next reason", marker(reasons=["firmware 2"]), {"reasons": ["firmware 3"]}, "reboot", []),
]


@pytest.mark.parametrize(
    ("facts", "wanted", "state", "words"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE]
)
def test_decide(facts: Json, wanted: Json, state: str, words: list[str]) -> None:
    have, want = {**FITS, **facts}, {**WANTED, **wanted}
    decided = driver.decide(have, want)
    summary = driver.summary(have, want, decided)
    assert decided["state"] == state, summary
    assert all(word in summary for word in words), summary
    # Whoever reads the state finds out why.
    assert bool(decided["reasons"]) or state != "reboot"
    assert bool(decided["problems"]) or state not in ("broken", "not_installed")
    assert state != "reboot" or all("host" in change["disrupts"] for change in decided["changes"])
    assert bool(decided["changes"]) == (state != "fits")


@pytest.mark.parametrize("facts", [OTHER_LOADED, {"loaded": None}], ids=["another is loaded", "nothing is loaded"])
def test_without_the_marker_it_would_reboot_for_ever(facts: Json) -> None:
    """The same host after a reboot that did not help: with the marker, and with it taken away."""
    after = {**FITS, **facts, "boot_id": "boot after"}
    mine = {"marker": {**marker()["marker"], "boot_id": "this boot"}}
    assert driver.decide({**after, **mine}, WANTED)["state"] == "broken"
    assert driver.decide(after, WANTED)["state"] == "reboot"


@pytest.mark.parametrize(
    ("facts", "wanted", "forget"),
    [
        (marker(), {}, True),
        (marker(version="30.30.3"), {}, True),
        ({"marker": {}}, {}, True),
        ({}, {}, False),
        ({**marker(), **OTHER_LOADED}, {}, False),
        # Whether that reboot helped is not known here.
        (marker(reasons=["new firmware"]), {}, False),
        # It is known to who asks.
        (marker(reasons=["new firmware"]), {"forget_reasons": True}, True),
        ({**marker(reasons=["new firmware"]), **OTHER_LOADED}, {"forget_reasons": True}, False),
        (marker(reasons=["new firmware"]), {"forget_reasons": True, "reasons": ["new firmware"]}, False),
        ({}, {"forget_reasons": True}, False),
    ],
)
def test_the_marker_goes_once_it_fits(facts: Json, wanted: Json, forget: bool) -> None:
    assert driver.decide({**FITS, **facts}, {**WANTED, **wanted})["forget"] is forget


def test_nvidia_waits_for_nouveau_to_go() -> None:
    wanted = {**WANTED, "module": "nvidia", "version": "580.95.05", "builds": ["580.95.05"]}
    facts = {
        **FITS,
        "dkms": [built("580.95.05", module="nvidia-open")],
        "on_disk": {KERNEL: disk("580.95.05")},
        "loaded": None,
        "nouveau": {"blocked": True},
    }
    decided = driver.decide(facts, {**wanted, "load": True})
    assert (decided["state"], decided["reasons"][0].split(" and ")[0]) == ("reboot", "nouveau is loaded,")
    decided = driver.decide({**facts, "nouveau": {"blocked": False}}, wanted)
    assert decided["state"] == "broken"
    assert "blacklist nouveau" in decided["problems"][0]["fix"]
    # Precompiled modules: nobody asks DKMS.
    loaded_one = {**facts, "nouveau": None, "dkms": [], "loaded": loaded("580.95.05")}
    assert driver.decide(loaded_one, {**wanted, "dkms": False})["state"] == "fits"
    assert driver.decide({**loaded_one, "loaded": loaded("570.133.20")}, {**wanted, "dkms": False})["state"] == "reboot"


@pytest.mark.parametrize(
    ("found", "build", "same"),
    [
        # hosts: the module's, DKMS's and the package's version of one build; apt's with epoch and suffix.
        ("6.16.13", BUILD, True),
        (NEW, BUILD, True),
        ("1:6.16.13.30300400-2341068.24.04", BUILD, True),
        (OLD, BUILD, False),
        ("6.16.1", BUILD, False),
        ("6.16.130", "6.16.13", False),
        ("580.95.05", "580.95.05", True),
        ("580.95.05", "580.95", True),
        ("580.95.5", "580.95.05", False),
        ("3.0", "2", False),
    ],
)
def test_versions_of_one_build(found: str, build: str, same: bool) -> None:
    assert driver.matches(found, [build]) is same


# --------------------------------------------------------------------------- reading


# dkms 2 on CentOS 7, as ROCm/legacy-rocm-build issue 774 quotes it.
DKMS_2 = """amdgpu, 18.50-756341.el7: added
amdgpu, 2.3-14.el7, 5.0.8-1.el7.elrepo.x86_64, x86_64: installed (original_module exists)
"""
# dkms 3.0.10 on Debian 12, recorded in the guest of tests/roles/test_real_kernel.py.
DKMS_3 = """ckstandin/1.0, 6.1.0-56-cloud-amd64, x86_64: built
ckstandin/2.0, 6.1.0-56-cloud-amd64, x86_64: installed
"""
# After AMD's documentation (amdgpu/6.14.14-2204008.24.04, ...), with dkms-project/dkms' own remarks (0415426, dkms.in).
CONSTRUCTED_DKMS_3 = """amdgpu/6.14.14-2204008.24.04, 6.14.0-29-generic, x86_64: installed
amdgpu/6.14.14-2204008.24.04, 6.14.0-30-generic, x86_64: installed (Differences between built and installed modules)
amdgpu/6.16.13-2341068.24.04: added
amdgpu, 6.14.14-2204008.24.04, 6.14.0-31-generic, x86_64: installed-weak from 6.14.0-29-generic
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with amdgpu 6.16.13 installed and loaded, the running kernel being this machine's."""
    kernel = os.uname().release
    root = tmp_path / "root"
    for name, text in {
        "proc/cmdline": "BOOT_IMAGE=/vmlinuz ro pci=bfsort\n",
        "proc/sys/kernel/random/boot_id": "11111111-2222-3333-4444-555555555555\n",
        "sys/module/amdgpu/initstate": "live\n",
        "sys/module/amdgpu/version": "6.16.13\n",
        "sys/module/amdgpu/srcversion": "D2F2F3C0B0D0D0D0D0D0D0D\n",
        f"lib/modules/{kernel}/vmlinuz": "",
        f"lib/modules/{kernel}/build/Makefile": "",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr(driver, "ROOT", str(root))
    (tmp_path / "bin").mkdir()
    # Of the machine's own tools none may answer for the host.
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(driver, "SBIN", "")
    tool(root, "dkms", f"amdgpu/{NEW}, {kernel}, x86_64: installed\n")
    tool(
        root,
        "modinfo",
        "filename:       /lib/modules/x/updates/dkms/amdgpu.ko.zst\nversion:        6.16.13\n"
        "srcversion:     D2F2F3C0B0D0D0D0D0D0D0D\nalias:          pci:v00001002d\nsigner:         host key\n",
    )
    tool(root, "mokutil", "SecureBoot disabled\n", code=1)
    return root


def tool(root: Path, name: str, out: str = "", error: str = "", code: int = 0, does: str = "") -> None:
    """A program that writes down its arguments and prints what it is told to."""
    path = root.parent / "bin" / name
    (root.parent / f"{name}.out").write_text(out)
    (root.parent / f"{name}.err").write_text(error)
    path.write_text(
        f'#!/bin/sh\necho {name} "$@" >>{root.parent}/asked\n{does}\n'
        f'while IFS= read -r line; do printf "%s\\n" "$line"; done <{root.parent}/{name}.out\n'
        f'while IFS= read -r line; do printf "%s\\n" "$line" >&2; done <{root.parent}/{name}.err\nexit {code}\n'
    )
    path.chmod(0o755)


def asked(root: Path) -> str:
    path = root.parent / "asked"
    return path.read_text() if path.exists() else ""


def run(**more: Any) -> Json:
    given: Json = {
        "module": "amdgpu",
        "version": "30.30.4",
        "builds": {"30.30.4": BUILD},
        "marker": "/state/reboot.json",
    }
    if more.pop("check", False):
        given["_ansible_check_mode"] = True
    out = io.StringIO()
    with patch_module_args({**given, **more}), contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        driver.main()
    result: Json = json.loads(out.getvalue())
    return result


def test_a_host_that_fits_is_left_alone(host: Path) -> None:
    done = run(mark=True, load=True)
    assert (done["state"], done["changed"], done["changes"], done["problems"]) == ("fits", False, [], [])
    assert done["running_kernel"] == done["next_kernel"] == os.uname().release
    assert done["loaded"]["version"] == "6.16.13"
    assert not (host / "state").exists()
    assert "modprobe" not in asked(host)


def test_the_marker_is_written_and_stops_the_second_reboot(host: Path) -> None:
    (host / "sys/module/amdgpu/srcversion").write_text("OLD\n")
    told = run(mark=True, check=True)
    assert (told["state"], told["changed"], told["changes"][0]["disrupts"]) == ("reboot", True, ["host"])
    assert not (host / "state").exists()
    assert not run()["changed"]
    assert run(mark=True)["changed"]
    written = json.loads((host / "state/reboot.json").read_text())
    assert written["boot_id"].startswith("11111111-")
    assert written["reasons"] == told["reasons"]
    # Killed before the reboot: it may go on.
    assert run(mark=True)["state"] == "reboot"
    # Rebooted, and no better.
    boot = host / "proc/sys/kernel/random/boot_id"
    boot.write_text("66666666-2222-3333-4444-555555555555\n")
    broken = run(mark=True)
    assert (broken["state"], broken["changed"]) == ("broken", False)
    assert written["at"] in broken["problems"][0]["problem"]
    # Without the marker nothing would stop it.
    (host / "state/reboot.json").rename(host / "state/away")
    assert run()["state"] == "reboot"
    (host / "state/away").rename(host / "state/reboot.json")
    # It fits at last.
    (host / "sys/module/amdgpu/srcversion").write_text("D2F2F3C0B0D0D0D0D0D0D0D\n")
    assert run(check=True)["changed"]
    done = run()
    assert (done["state"], done["changed"]) == ("fits", True)
    assert not (host / "state/reboot.json").exists()
    assert not run()["changed"]


def test_the_same_reason_may_come_again_once_it_was_seen_to_be_done(host: Path) -> None:
    """Partition modes: set at one boot, and another time after they were changed back."""
    file, boot = host / "state/reboot.json", host / "proc/sys/kernel/random/boot_id"
    given: Json = {"reasons": ["not partitioned: card0"], "mark": True}
    assert run(**given)["state"] == "reboot"
    boot.write_text("66666666-2222-3333-4444-555555555555\n")
    refused = run(**given)
    assert refused["state"] == "broken"
    assert "then remove the marker /state/reboot.json" in refused["summary"]
    # The reboot helped. Who cannot know leaves the marker, and later the same reason would be refused for ever.
    assert not run()["changed"]
    assert run(**given)["state"] == "broken"
    assert run(forget_reasons=True, check=True)["changed"]
    assert file.exists()
    assert run(forget_reasons=True)["changed"]
    assert not file.exists()
    assert not run(forget_reasons=True)["changed"]
    assert run(**given)["state"] == "reboot"


def test_without_consent_it_is_listed_and_left(host: Path) -> None:
    done = run(parameters=["iommu=pt"], mark=True, consent=False)
    assert (done["state"], done["changed"]) == ("reboot", False)
    assert [(change["name"], change["left"]) for change in done["changes"]] == [("iommu=pt", True)]
    assert not (host / "state").exists()


def test_loading_is_enough_on_a_fresh_host(host: Path) -> None:
    shutil.rmtree(host / "sys/module/amdgpu")
    (host / "loads").mkdir()
    for name, text in {"initstate": "live", "version": "6.16.13", "srcversion": "D2F2F3C0B0D0D0D0D0D0D0D"}.items():
        (host / "loads" / name).write_text(text + "\n")
    tool(host, "modprobe", does=f"/bin/mv {host}/loads {host}/sys/module/amdgpu")
    assert run(load=True, check=True)["state"] == "load"
    assert (host / "loads").exists()
    done = run(load=True)
    assert (done["state"], done["changed"], done["changes"][0]["actual"]) == ("fits", True, "nothing")
    assert not run(load=True)["changed"]
    assert asked(host).count("modprobe amdgpu") == 1


def test_a_rejected_module_says_so(host: Path) -> None:
    """The words are the kernel's, as awesometic/realtek-r8126-dkms issue 3 quotes them for its module."""
    shutil.rmtree(host / "sys/module/amdgpu")
    error = "modprobe: ERROR: could not insert 'amdgpu': Key was rejected by service\n"
    tool(host, "modprobe", error=error, code=1)
    done = run(load=True)
    assert (done["state"], done["changed"]) == ("broken", False)
    assert "Key was rejected by service" in done["summary"]


def test_what_keeps_it_away_is_named(host: Path) -> None:
    shutil.rmtree(host / "sys/module/amdgpu")
    for name, text in {
        "usr/lib/modprobe.d/a.conf": "blacklist amdgpu\n",
        # A file in /etc hides the one of the same name.
        "etc/modprobe.d/a.conf": "# blacklist amdgpu\nblacklist amdgpu_not\n",
        "run/modprobe.d/b.conf": "  blacklist  amdgpu # of the GPU operator\n",
        "etc/modprobe.d/c.conf": "install amdgpu /bin/false\n",
        "etc/modprobe.d/readme.txt": "blacklist amdgpu\n",
        "proc/cmdline": "ro modprobe.blacklist=ast,amdgpu\n",
    }.items():
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_text(text)
    done = run(load=True)
    assert done["state"] == "broken"
    assert [problem["problem"].split(" keeps ")[0] for problem in done["problems"]] == [
        "/etc/modprobe.d/c.conf",
        "/run/modprobe.d/b.conf",
        "/proc/cmdline",
    ]
    assert "modprobe " not in asked(host)


@pytest.mark.parametrize(
    ("said", "enabled"),
    [
        # mokutil 0.6 (lcp/mokutil, src/mokutil.c, 9c277b5), and what the variable says where mokutil is not there.
        ("SecureBoot enabled\n", True),
        ("SecureBoot enabled\nSecureBoot validation is disabled in shim\n", False),
        ("SecureBoot disabled\nPlatform is in Setup Mode\n", False),
        (None, True),
    ],
)
def test_secure_boot(host: Path, said: str | None, enabled: bool) -> None:
    (host / "sys/firmware/efi/efivars").mkdir(parents=True)
    variable = host / "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    variable.write_bytes(b"\x06\x00\x00\x00\x01")
    tool(host, "mokutil", said or "")
    if said is None:
        (host.parent / "bin/mokutil").unlink()
    assert run()["secure_boot"]["enabled"] is enabled
    variable.write_bytes(b"\x06\x00\x00\x00\x00")
    assert run()["secure_boot"]["enabled"] is (enabled if said else False)


@pytest.mark.parametrize(
    ("words", "code", "enrolled", "pending"),
    [
        ("is not enrolled", 0, False, False),
        # The same words with the exit code of later releases.
        ("is not enrolled", 1, False, False),
        ("is already enrolled", 1, True, False),
        ("is already in the enrollment request", 0, False, True),
        ("is already in the built-in trusted keyring", 255, True, False),
    ],
)
def test_the_key_of_dkms(host: Path, words: str, code: int, enrolled: bool, pending: bool) -> None:
    (host / "var/lib/dkms").mkdir(parents=True)
    (host / "var/lib/dkms/mok.pub").write_text("")
    tool(host, "mokutil", f"SecureBoot enabled\n/var/lib/dkms/mok.pub {words}\n", code=code)
    found = run()["secure_boot"]
    assert (found["key"], found["enrolled"], found["pending"]) == ("/var/lib/dkms/mok.pub", enrolled, pending)
    assert f"--test-key {host}/var/lib/dkms/mok.pub" in asked(host)


def test_both_formats_of_dkms(host: Path) -> None:
    tool(host, "dkms", DKMS_2)
    assert [(entry["version"], entry["kernel"], entry["state"]) for entry in run()["dkms"]] == [
        ("18.50-756341.el7", None, "added"),
        ("2.3-14.el7", "5.0.8-1.el7.elrepo.x86_64", "installed (original_module exists)"),
    ]
    tool(host, "dkms", DKMS_3)
    assert [(entry["version"], entry["state"]) for entry in run(module="ckstandin", builds=[])["dkms"]] == [
        ("1.0", "built"),
        ("2.0", "installed"),
    ]
    tool(host, "dkms", CONSTRUCTED_DKMS_3)
    assert [(entry["version"], entry["kernel"], entry["state"].split(" ")[0]) for entry in run()["dkms"]] == [
        ("6.14.14-2204008.24.04", "6.14.0-29-generic", "installed"),
        ("6.14.14-2204008.24.04", "6.14.0-30-generic", "installed"),
        ("6.16.13-2341068.24.04", None, "added"),
        ("6.14.14-2204008.24.04", "6.14.0-31-generic", "installed-weak"),
    ]


def test_the_end_of_a_failed_build(host: Path) -> None:
    log = host / f"var/lib/dkms/amdgpu/{NEW}/build/make.log"
    log.parent.mkdir(parents=True)
    log.write_text("DKMS make.log\nlots\nerror: too many arguments\nmake: *** [all] Error 2\n")
    tool(host, "dkms", f"amdgpu/{NEW}: added\n")
    done = run()
    assert done["state"] == "broken"
    assert f"/var/lib/dkms/amdgpu/{NEW}/build/make.log ends: lots / error: too many" in done["problems"][0]["problem"]


def test_a_dkms_that_fails_is_not_taken_for_an_empty_one(host: Path) -> None:
    """Its words are those of ROCm/legacy-rocm-build issue 3701."""
    tool(host, "dkms", error="Error! Could not locate dkms.conf file.\n", code=4)
    failed = run()
    assert failed["failed"]
    assert "Could not locate dkms.conf" in failed["msg"]


# After what update-grub of Debian 12 wrote in that guest; the names are shorter.
CONSTRUCTED_GRUB = """
set default="{default}"
if [ x"${{feature_menuentry_id}}" = xy ]; then
menuentry 'Debian GNU/Linux' --class gnu-linux --class os $menuentry_id_option 'gnulinux-simple-1' {{
	linux	/boot/vmlinuz-6.1.0-13-amd64 root=UUID=1 ro quiet
}}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-1' {{
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-9-amd64' --class os $menuentry_id_option 'gnulinux-6.1.0-9-1' {{
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1 ro quiet
	}}
}}
"""


@pytest.mark.parametrize(
    ("default", "environment", "kernel"),
    [
        ("0", "", "6.1.0-13-amd64"),
        ("gnulinux-advanced-1>gnulinux-6.1.0-9-1", "", "6.1.0-9-amd64"),
        ("Debian GNU/Linux, with Linux 6.1.0-9-amd64", "", "6.1.0-9-amd64"),
        ("${saved_entry}", "saved_entry=gnulinux-advanced-1>gnulinux-6.1.0-9-1\n", "6.1.0-9-amd64"),
        ("0", "next_entry=gnulinux-6.1.0-9-1\n", "6.1.0-9-amd64"),
        # A number inside a menu: which one that is, only GRUB knows.
        ("1>2", "", None),
    ],
)
def test_the_kernel_that_grub_boots_next(host: Path, default: str, environment: str, kernel: str | None) -> None:
    (host / "boot/grub").mkdir(parents=True)
    (host / "boot/grub/grub.cfg").write_text(CONSTRUCTED_GRUB.format(default=default))
    (host / "boot/grub/grubenv").write_text(f"# GRUB Environment Block\n{environment}####")
    assert run()["next_kernel"] == kernel


def test_the_newest_kernel_boots_next_where_no_boot_loader_says_otherwise(host: Path) -> None:
    shutil.rmtree(host / "lib/modules")
    for name in ("6.1.0-9-amd64", "6.1.0-13-amd64", "6.1.0-20-amd64"):
        (host / "lib/modules" / name).mkdir(parents=True)
    (host / "boot").mkdir()
    # Without an image a kernel's folder is a leftover.
    for name in ("6.1.0-9-amd64", "6.1.0-13-amd64"):
        (host / f"boot/vmlinuz-{name}").write_text("")
    assert run()["next_kernel"] == "6.1.0-13-amd64"
    tool(host, "grubby", "/boot/vmlinuz-5.14.0-570.el9.x86_64\n")
    assert run()["next_kernel"] == "5.14.0-570.el9.x86_64"


@pytest.mark.skipif(
    not (shutil.which("modinfo") and shutil.which("cc")), reason="needs modinfo (kmod) and a C compiler"
)
def test_modinfo_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real tool reads a file that has what a module says of itself."""
    kernel = os.uname().release
    folder = tmp_path / "lib/modules" / kernel / "updates/dkms"
    folder.mkdir(parents=True)
    said = "".join(
        f'static const char {name}[] __attribute__((section(".modinfo"), used)) = "{name}={value}";\n'
        for name, value in {"version": "2.0", "srcversion": "0A1B2C3D", "license": "GPL"}.items()
    )
    subprocess.run(["cc", "-c", "-x", "c", "-o", folder / "standin.ko", "-"], input=said, text=True, check=True)
    subprocess.run(["depmod", "-b", tmp_path, kernel], check=True)
    monkeypatch.setattr(driver, "ROOT", str(tmp_path))
    found = driver.modinfo("standin", kernel)
    assert {key: found[key] for key in ("version", "srcversion", "signer")} == {
        "version": "2.0",
        "srcversion": "0A1B2C3D",
        "signer": None,
    }
    assert found["path"].endswith("updates/dkms/standin.ko")
    assert driver.modinfo("no_such_module", kernel) is None
