"""fleet_known_hosts: whose keys stay, and whose go; ssh-keygen reads what was written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

module = load_module("fleet_known_hosts")

A, B, C = ("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + letter * 35 for letter in "ABC")


@pytest.mark.parametrize(
    ("have", "hosts", "keys", "want"),
    [
        ({}, ["w1"], {"w1": [B, A]}, {"w1": [A, B]}),
        ({"w1": [A]}, ["w1", "w2"], {"w2": [B]}, {"w1": [A], "w2": [B]}),
        ({"w1": [A], "gone": [C]}, ["w1"], {}, {"w1": [A]}),
        ({"w1": [A]}, ["w1"], {"w1": [B]}, {"w1": [B]}),
        # One that could not be read is no reason to forget it.
        ({"w1": [A]}, ["w1"], {"w1": []}, {"w1": [A]}),
        ({}, ["w1"], {"stranger": [A]}, {}),
    ],
)
def test_plan(have: Json, hosts: list[str], keys: Json, want: Json) -> None:
    found, changes = module.plan(have, hosts, keys)
    assert found == want
    assert {change["name"] for change in changes} == {
        host for host in {*have, *want} if have.get(host) != want.get(host)
    }


def run(path: Path, **more: Any) -> Json:
    return call(module, path=str(path), **more)


def test_hosts_outside_a_run_keep_theirs_and_those_that_left_lose_theirs(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    everybody = {"w1": [A], "w2": [B], "w-3.site": [C]}
    assert run(path, hosts=[*everybody], keys=everybody, check=True)["changed"]
    assert not path.exists()
    assert run(path, hosts=[*everybody], keys=everybody)["changed"]
    assert not run(path, hosts=[*everybody], keys={"w2": [B]})["changed"]
    (change,) = run(path, hosts=["w1", "w2"], keys={"w1": [A]})["changes"]
    assert (change["name"], change["wanted"]) == ("w-3.site", "none")
    lines = path.read_text().splitlines()[1:]
    assert lines == [f"w1 {A}", f"w2 {B}"]
    assert [file.name for file in tmp_path.iterdir()] == ["known_hosts"]


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="needs ssh-keygen")
def test_openssh_finds_the_keys_by_host_name(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    run(path, hosts=["w1", "w2"], keys={"w1": [A], "w2": [B]})
    done = subprocess.run(["ssh-keygen", "-F", "w2", "-f", str(path)], capture_output=True, text=True, check=True)
    assert B in done.stdout
    assert A not in done.stdout


@pytest.mark.parametrize(
    ("hosts", "keys"), [(["w1", "*"], {}), (["w1,w2"], {}), (["w1"], {"w1": [f"{A}\nw2 {B}"]}), (["w1"], {"w1": [""]})]
)
def test_nothing_else_gets_into_the_file(tmp_path: Path, hosts: list[str], keys: Json) -> None:
    path = tmp_path / "known_hosts"
    assert run(path, hosts=hosts, keys=keys)["failed"]
    assert not path.exists()
