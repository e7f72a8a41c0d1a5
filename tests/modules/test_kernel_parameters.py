"""kernel_parameters on trees that stand for a host; the drop-in is read by a real shell, as grub-mkconfig reads it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

kernel = load_module("kernel_parameters")

TWO = ["pci=realloc=off", "pci=bfsort"]
DROP_IN = "etc/default/grub.d/zz-clusterkit.cfg"
# Lines as Debian 12's grub-mkconfig writes them (seen in the guest of tests/roles/test_real_kernel.py); the rest of its
# grub.cfg says nothing about parameters.
CONSTRUCTED_UPDATE_GRUB = """#!/bin/sh
set -e
echo update-grub >>{log}
[ ! -e {root}/fail ] || {{ echo "grub-probe: error: cannot find a device for /." >&2; exit 1; }}
GRUB_CMDLINE_LINUX= GRUB_CMDLINE_LINUX_DEFAULT=
. {root}/etc/default/grub
for x in {root}/etc/default/grub.d/*.cfg; do if [ -e "$x" ]; then . "$x"; fi; done
cat >{root}/boot/grub/grub.cfg <<END
### BEGIN /etc/grub.d/10_linux ###
menuentry 'Debian GNU/Linux' --class debian {{
	linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1 ro ${{GRUB_CMDLINE_LINUX}} ${{GRUB_CMDLINE_LINUX_DEFAULT}}
}}
submenu 'Advanced options' {{
	menuentry 'with Linux 6.1.0-9-amd64 (recovery mode)' {{
		linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1 ro single ${{GRUB_CMDLINE_LINUX}}
	}}
}}
### END /etc/grub.d/10_linux ###
### BEGIN /etc/grub.d/30_os-prober ###
menuentry 'Another system' {{
	linux	/boot/vmlinuz-5.4.0 root=/dev/sdb1 ro
}}
### END /etc/grub.d/30_os-prober ###
END
"""
# grubby as a tool that keeps one argument of a name, which is what rhboot/grubby's grubby-bls (526e39e) does, or, with
# `keep`, all that are handed over together.
CONSTRUCTED_GRUBBY = """#!/usr/bin/python3
import json, sys
path, keep = {root!r} + "/entries.json", {keep}
open({log!r}, "a").write("grubby " + " ".join(sys.argv[1:]) + chr(10))
entries = json.load(open(path))
given = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
if "info" in given:
    for number, entry in enumerate(entries):
        print('index=%d\\nkernel="/boot/vmlinuz-5.14.0-%d.el9"\\nargs="%s"' % (number, number, " ".join(entry)))
for place, entry in enumerate(entries):
    entry = [token for token in entry if token not in given.get("remove-args", "").split()]
    new = given.get("args", "").split()
    entry = [token for token in entry if token.split("=")[0] not in [one.split("=")[0] for one in new]]
    if not keep:
        new = list({{one.split("=")[0]: one for one in new}}.values())
    entries[place] = entry + new
json.dump(entries, open(path, "w"))
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cloud image of Debian's: the provider's own drop-in, and parameters of the site's."""
    root = tmp_path / "root"
    for name, text in {
        "proc/cmdline": "BOOT_IMAGE=/boot/vmlinuz-6.1.0-9-amd64 root=UUID=1 ro quiet console=ttyS0\n",
        "etc/default/grub": 'GRUB_CMDLINE_LINUX_DEFAULT="quiet"\nGRUB_CMDLINE_LINUX="rootdelay=10"\n',
        "etc/default/grub.d/50-cloudimg-settings.cfg": 'GRUB_CMDLINE_LINUX_DEFAULT="console=tty1 console=ttyS0"\n',
        "boot/grub/grub.cfg": "",
        "bin/grub-mkconfig": "for x in ${sysconfdir}/default/grub.d/*.cfg ; do\n",
        "bin/update-grub": CONSTRUCTED_UPDATE_GRUB.format(root=root, log=tmp_path / "log"),
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name in ("grub-mkconfig", "update-grub"):
        (root / "bin" / name).chmod(0o755)
    monkeypatch.setattr(kernel, "ROOT", str(root))
    monkeypatch.setattr(kernel, "SBIN", "")
    monkeypatch.setenv("PATH", f"{root}/bin:/usr/bin:/bin")
    if kernel.program("grubby"):
        pytest.skip("this machine has a grubby of its own")
    subprocess.run([root / "bin/update-grub"], check=True)
    (tmp_path / "log").unlink()
    return root


def run(*parameters: str, **more: Any) -> Json:
    return call(kernel, parameters=list(parameters), **more)


def booted(host: Path) -> list[str]:
    """What the first entry hands over."""
    found = re.search(r"linux\t\S+ (.*)", (host / "boot/grub/grub.cfg").read_text())
    assert found
    return found.group(1).split()


def updates(host: Path) -> int:
    log = host.parent / "log"
    return log.read_text().count("update-grub") if log.exists() else 0


def boot(host: Path) -> None:
    (host / "proc/cmdline").write_text("BOOT_IMAGE=x " + " ".join(booted(host)) + "\n")


def test_plan() -> None:
    have = {"entries": [["ro", "a=1", "c"], ["ro", "a=1", "b"]], "cmdline": ["ro", "c"], "ours": ["a=1", "c", "d"]}
    assert kernel.plan(have, ["a=1", "b", "a=2"]) == {
        "add": ["b", "a=2"],
        "take": ["c"],
        "missing": ["a=1", "b", "a=2"],
        "leftover": ["c"],
    }


def test_added_beside_the_sites_own_and_once(host: Path) -> None:
    done = run("iommu=pt", *TWO, "iommu=pt", "console=ttyS0")
    assert [change["name"] for change in done["changes"]] == ["/" + DROP_IN, "iommu=pt", *TWO]
    assert booted(host) == ["root=UUID=1", "ro", "rootdelay=10", "iommu=pt", *TWO, "console=tty1", "console=ttyS0"]
    assert (done["reboot_needed"], done["running"]) == (True, ["iommu=pt", *TWO])
    again = run("iommu=pt", *TWO, "iommu=pt", "console=ttyS0")
    assert (again["changed"], again["reboot_needed"], updates(host)) == (False, True, 1)
    boot(host)
    assert not run("iommu=pt", *TWO)["reboot_needed"]


def test_a_token_is_no_part_of_another(host: Path) -> None:
    """rootdelay=1 is not there because rootdelay=10 is."""
    run("rootdelay=1")
    assert booted(host)[2:4] == ["rootdelay=10", "rootdelay=1"]
    assert run("rootdelay=1")["running"] == ["rootdelay=1"]


def test_check_mode_tells_and_leaves(host: Path) -> None:
    told = run("iommu=pt", check=True)
    assert [change["name"] for change in told["changes"]] == ["/" + DROP_IN, "iommu=pt"]
    assert "iommu=pt" in told["diff"][0]["after"]
    assert (updates(host), (host / DROP_IN).exists(), (host / "var").exists()) == (0, False, False)


def test_killed_between_the_file_and_update_grub(host: Path) -> None:
    """The file is right and grub.cfg is not: adding, and taking away."""
    run("iommu=pt")
    (host / "fail").write_text("")
    assert "cannot find a device" in run("iommu=pt", *TWO)["msg"]
    assert "pci=bfsort" in (host / DROP_IN).read_text()
    (host / "fail").unlink()
    assert [change["name"] for change in run("iommu=pt", *TWO)["changes"]] == TWO
    assert booted(host)[3:6] == ["iommu=pt", *TWO]
    (host / "fail").write_text("")
    assert run(state="absent")["failed"]
    assert not (host / DROP_IN).exists()
    (host / "fail").unlink()
    assert [change["wanted"] for change in run(state="absent")["changes"]] == ["gone"] * 3
    assert booted(host)[2:4] == ["rootdelay=10", "console=tty1"]


def test_a_removal_takes_only_ours(host: Path) -> None:
    run("iommu=pt", "rootdelay=10")
    boot(host)
    assert run(state="absent", check=True)["changed"]
    assert "iommu=pt" in booted(host)
    done = run(state="absent")
    assert booted(host)[2:] == ["rootdelay=10", "console=tty1", "console=ttyS0"]
    # The running kernel still has it, and that is not forgotten until it has booted without.
    assert (done["leftover"], done["reboot_needed"]) == (["iommu=pt"], True)
    again = run(state="absent")
    assert (again["changed"], again["leftover"]) == (False, ["iommu=pt"])
    boot(host)
    again = run(state="absent")
    assert (again["changed"], again["reboot_needed"]) == (False, False)
    assert not (host / "var/lib/clusterkit/kernel-parameters.json").exists()


def test_what_leaves_the_list_leaves_the_command_line(host: Path) -> None:
    run("iommu=pt", *TWO)
    boot(host)
    done = run("pci=bfsort")
    assert booted(host)[2:4] == ["rootdelay=10", "pci=bfsort"]
    assert done["leftover"] == ["iommu=pt", "pci=realloc=off"]
    assert done["reasons"][0] == "the kernel was booted with iommu=pt, which is not wanted any more"


def test_a_later_file_of_the_sites_does_not_defeat_it(host: Path) -> None:
    (host / "etc/default/grub.d/90-site.cfg").write_text('GRUB_CMDLINE_LINUX="mitigations=auto"\n')
    run("iommu=pt")
    assert booted(host)[2:4] == ["mitigations=auto", "iommu=pt"]
    # Under a name that sorts before the site's it would: said, with the file that does it.
    failed = run("iommu=on", path="/etc/default/grub.d/60-clusterkit.cfg")
    assert "still lacks iommu=on. /etc/default/grub.d/90-site.cfg, " in failed["msg"]


def test_a_host_that_boots_otherwise(host: Path) -> None:
    (host / "boot/grub/grub.cfg").unlink()
    assert "does not boot by GRUB" in run("iommu=pt")["msg"]
    (host / "bin/grub-mkconfig").write_text("# as upstream has it\n")
    assert "does not read /etc/default/grub.d" in run("iommu=pt")["msg"]
    (host / "bin/update-grub").unlink()
    assert "neither update-grub nor grubby" in run("iommu=pt")["msg"]
    # Where nothing is asked for, that is no fault.
    assert not run()["changed"]
    assert not run(state="absent")["changed"]


@pytest.mark.parametrize("token", ["iommu=pt quiet", "a=$(reboot)", "x='", "a;b", "", "--", 'dyndbg="file x +p"'])
def test_what_is_no_token_is_refused(host: Path, token: str) -> None:
    assert "is no kernel parameter" in run(token)["msg"]
    assert not (host / DROP_IN).exists()


# --------------------------------------------------------------------------- grubby


def el(host: Path, *entries: list[str], keep: bool = True) -> None:
    (host / "bin/update-grub").unlink()
    (host / "entries.json").write_text(json.dumps(entries))
    (host / "bin/grubby").write_text(CONSTRUCTED_GRUBBY.format(root=str(host), log=str(host.parent / "log"), keep=keep))
    (host / "bin/grubby").chmod(0o755)


def el_entries(host: Path) -> list[list[str]]:
    found: list[list[str]] = json.loads((host / "entries.json").read_text())
    return found


def test_grubby_keeps_the_sites_own(host: Path) -> None:
    el(host, ["ro", "quiet", "pci=nomsi"], ["ro", "pci=nomsi", "quiet"])
    done = run("iommu=pt", *TWO, "quiet")
    assert [change["name"] for change in done["changes"]] == ["iommu=pt", *TWO]
    assert all(set(entry) == {"ro", "quiet", "pci=nomsi", "iommu=pt", *TWO} for entry in el_entries(host))
    assert not run("iommu=pt", *TWO, "quiet")["changed"]
    # Of ours alone: quiet and pci=nomsi were there before.
    done = run(state="absent")
    assert [change["name"] for change in done["changes"]] == ["iommu=pt", *TWO]
    assert [sorted(entry) for entry in el_entries(host)] == [["pci=nomsi", "quiet", "ro"]] * 2
    assert not run(state="absent")["changed"]


def test_a_new_kernel_without_them_is_found(host: Path) -> None:
    el(host, ["ro"])
    run("iommu=pt")
    el_now = [*el_entries(host), ["ro"]]
    (host / "entries.json").write_text(json.dumps(el_now))
    assert [change["name"] for change in run("iommu=pt")["changes"]] == ["iommu=pt"]
    assert el_entries(host) == [["ro", "iommu=pt"]] * 2


def test_a_grubby_that_keeps_one_of_a_name_is_found_out(host: Path) -> None:
    el(host, ["ro", "pci=nomsi"], keep=False)
    failed = run("pci=bfsort")
    assert "grubby dropped pci=nomsi. Before it ran there was: ro pci=nomsi" in failed["msg"]


def test_a_boot_entry_less_grubby(host: Path) -> None:
    el(host)
    assert "names no boot entry" in run("iommu=pt")["msg"]
