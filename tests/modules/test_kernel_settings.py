"""kernel_settings: the drop-in file and the kernel, on a tree that stands for /proc/sys, and on the real one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import ROOT, load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

kernel = load_module("kernel_settings")

SETTINGS = {"net.core.somaxconn": 4096, "kernel.printk": "4 4 1 7"}


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel shows, with the kernel's own blanks."""
    for name, value in {
        "net/core/somaxconn": "128\n",
        "kernel/printk": "4\t4\t1\t7\n",
        "vm/swappiness": "60\n",
    }.items():
        (tmp_path / "proc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc" / name).write_text(value)
    monkeypatch.setattr(kernel, "PROC", str(tmp_path / "proc"))
    return tmp_path / "proc"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sysctl.d/60-clusterkit.conf"


def run(file: Path, settings: Json | None = None, **more: Any) -> Json:
    return call(kernel, path=str(file), settings=SETTINGS if settings is None else settings, **more)


def test_plan() -> None:
    have = {"a.b": "1", "c.d": "2", "e.f": None}
    assert kernel.plan(have, {"a.b": "1", "c.d": "3", "e.f": "1"}) == [
        {"what": "kernel setting", "name": "c.d", "wanted": "3", "actual": "2"},
        {"what": "kernel setting", "name": "e.f", "wanted": "1", "actual": "no such setting"},
    ]


def test_file_and_kernel_are_set_and_once(proc: Path, file: Path) -> None:
    done = run(file)
    assert [(item["what"], item.get("actual")) for item in done["changes"]] == [
        ("file", None),
        ("kernel setting", "128"),
    ]
    assert (proc / "net/core/somaxconn").read_text() == "4096"
    assert "net.core.somaxconn = 4096\n" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o644
    assert not run(file)["changed"]


def test_a_run_that_was_cut_after_the_file_converges(proc: Path, file: Path) -> None:
    """The file is right, and the kernel is not: what was changed by hand comes back, too."""
    run(file)
    (proc / "net/core/somaxconn").write_text("1\n")
    again = run(file)
    assert [item["name"] for item in again["changes"]] == ["net.core.somaxconn"]
    assert (proc / "net/core/somaxconn").read_text() == "4096"


def test_check_mode_tells_and_leaves(proc: Path, file: Path) -> None:
    told = run(file, {**SETTINGS, "vm.swappiness": 1, "no.such_thing": 1}, check=True)
    settings = {item["name"]: (item["actual"], item["wanted"]) for item in told["changes"] if item["what"] != "file"}
    assert settings == {
        "net.core.somaxconn": ("128", "4096"),
        "vm.swappiness": ("60", "1"),
        "no.such_thing": ("no such setting", "1"),
    }
    assert "vm.swappiness = 60" in told["diff"][1]["before"]
    assert not file.exists()
    assert (proc / "net/core/somaxconn").read_text() == "128\n"


def test_a_removal_sets_what_was_there_before(proc: Path, file: Path) -> None:
    run(file)
    (proc / "net/core/somaxconn").write_text("1\n")
    run(file)  # what somebody set in between is not what was there before
    assert run(file, {}, state="absent", check=True)["changed"]
    assert (proc / "net/core/somaxconn").read_text() == "4096"
    assert run(file, {}, state="absent")["changed"]
    assert (proc / "net/core/somaxconn").read_text() == "128"
    assert not file.exists()
    assert not run(file, {}, state="absent")["changed"]


def test_a_removal_leaves_what_the_site_set_since(proc: Path, file: Path) -> None:
    run(file)
    (proc / "net/core/somaxconn").write_text("9999\n")
    run(file, {}, state="absent")
    assert (proc / "net/core/somaxconn").read_text() == "9999\n"


def test_a_setting_that_is_taken_out_is_set_back(proc: Path, file: Path) -> None:
    run(file, {**SETTINGS, "vm.swappiness": 1})
    done = run(file)
    assert {"what": "kernel setting", "name": "vm.swappiness", "wanted": "60", "actual": "1"} in done["changes"]
    assert (proc / "vm/swappiness").read_text() == "60"
    assert "swappiness" not in file.read_text()
    # Without any there is no file either.
    assert run(file, {})["changed"]
    assert not file.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"no.such_thing": 1}, "the kernel has no setting no.such_thing"),
        ({"../../etc/passwd": 1}, "is no name of a kernel setting"),
        ({"nodots": 1}, "is no name of a kernel setting"),
    ],
)
def test_what_cannot_be_set_says_so(proc: Path, file: Path, settings: Json, words: str) -> None:
    failed = run(file, settings)
    assert failed["failed"]
    assert words in failed["msg"]


def test_the_real_kernel(tmp_path: Path) -> None:
    """In a network namespace of its own, whose settings are nobody else's: set, seen, refused, set back."""
    module = ROOT / "plugins/modules/kernel_settings.py"
    script = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("kernel", {str(module)!r})
kernel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
path, said = {str(tmp_path / "drop-in.conf")!r}, {{}}
name = "net.core.somaxconn"
before = kernel.read(name)
wanted = str(int(before) + 1)
said["first"] = len(kernel.converge(path, {{name: wanted}}, False))
said["set"] = kernel.read(name) == wanted
said["second"] = kernel.converge(path, {{name: wanted}}, False)
try:
    kernel.converge(path, {{name: wanted, "net.ipv4.ip_forward": "never"}}, False)
except kernel.Problem as problem:
    said["refused"] = str(problem)
kernel.converge(path, {{}}, False)
said["back"] = kernel.read(name) == before
print(json.dumps(said))
"""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare on this machine")
    done = subprocess.run([unshare, "--net", sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if "Operation not permitted" in done.stderr or "Read-only file system" in done.stderr:
        pytest.skip(f"no namespace with settings of its own can be made here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["first"], said["set"], said["second"], said["back"]) == (2, True, [], True)
    assert "the kernel refuses net.ipv4.ip_forward = never" in said["refused"]
