"""The record of intents: what is not on disk is not done."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from clusterkit.errors import ClusterkitError
from clusterkit.fleet import record as records
from clusterkit.fleet.config import FleetConfig
from clusterkit.fleet.daemon import Fleet, NotNow
from clusterkit.fleet.record import HostRecord, Phase, Record, Want

SSH = """#!/bin/sh
echo "$*" >> FOLDER/calls
echo '{"state": "running", "instance_id": "x"}'
"""
IDLE = {"state": "stopped", "reason": "stopped", "instance_id": None, "held": None, "generation_on_disk": "g1"}


def fleet_of(folder: Path, hosts: int = 1) -> Fleet:
    ssh = folder / "ssh"
    ssh.write_text(SSH.replace("FOLDER", str(folder)))
    ssh.chmod(0o755)
    (folder / "control").mkdir(exist_ok=True)
    config = FleetConfig.model_validate(
        {
            "cluster": "test",
            "socket": str(folder / "fleet.sock"),
            "record": str(folder / "record.json"),
            "ssh": {"command": [str(ssh)], "identity": "/x", "known_hosts": "/x", "control_dir": "/tmp"},
            "pools": {"gpus": {"max": 100}},
            "hosts": {f"w{n}": {"address": f"w{n}", "node_ip": "192.0.2.1", "pool": "gpus"} for n in range(hosts)},
        }
    )
    fleet = Fleet(config)
    fleet.prepare()
    fleet.record.complete = True
    for host in fleet.hosts.values():
        host.view.heard(IDLE, 0.0)
    return fleet


class Disk:
    """The real one, with a door in front of each write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.write = records.write_file
        self.entered = threading.Semaphore(0)
        self.doors: list[tuple[threading.Event, list[OSError]]] = []
        monkeypatch.setattr(records, "write_file", self)

    def __call__(self, path: str, text: str) -> None:
        door: tuple[threading.Event, list[OSError]] = (threading.Event(), [])
        self.doors.append(door)
        self.entered.release()
        assert door[0].wait(60)
        for error in door[1]:
            raise error
        self.write(path, text)

    async def someone_waits(self) -> None:
        await asyncio.to_thread(self.entered.acquire)

    def open(self, number: int, error: OSError | None = None) -> None:
        event, errors = self.doors[number]
        errors += [error] if error else []
        event.set()


def test_what_is_not_on_disk_yet_is_not_done_even_if_somebody_else_s_write_ends_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        fleet, disk = fleet_of(tmp_path), Disk(monkeypatch)
        host = fleet.hosts["w0"]
        # The write of an observation is under way, as a request comes in.
        observed = asyncio.create_task(fleet._saved_and_acted(host))
        await disk.someone_waits()
        asked = asyncio.create_task(fleet.create("r1", "s1", "gpus", 1, {}))
        while host.record.phase is None:
            await asyncio.sleep(0)
        disk.open(0)
        await observed
        await disk.someone_waits()
        assert host.actor is None, "the request's own write has not ended"
        disk.open(1, OSError(28, "No space left on device"))
        with pytest.raises(NotNow, match="No space left"):
            await asked
        assert (host.record.phase, host.record.instance, fleet.record.wants) == (None, None, {})
        assert not (tmp_path / "calls").exists()

        # It tries again by itself, until there is no trouble to tell of.
        await disk.someone_waits()
        assert "No space left" in str(fleet.status()["trouble"])
        disk.open(2)
        while fleet.status()["trouble"]:
            await asyncio.sleep(0)

        again = asyncio.create_task(fleet.create("r2", "s1", "gpus", 1, {}))
        await disk.someone_waits()
        disk.open(3)
        assert len((await again)["given"]) == 1
        assert host.actor is not None
        host.actor.cancel()

    asyncio.run(run())


def test_one_write_serves_all_who_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        fleet, disk = fleet_of(tmp_path, 50), Disk(monkeypatch)
        first = asyncio.create_task(fleet.record.commit())
        await disk.someone_waits()
        others = [asyncio.create_task(fleet.record.commit()) for _ in range(50)]
        await asyncio.sleep(0)
        disk.open(0)
        await disk.someone_waits()
        disk.open(1)
        await asyncio.gather(first, *others)
        assert len(disk.doors) == 2

    asyncio.run(run())


def test_all_of_it_is_read_again(tmp_path: Path) -> None:
    async def run() -> None:
        path = str(tmp_path / "record.json")
        written = Record(path, ["w1", "w2"])
        written.complete = True
        written.hosts["w1"] = HostRecord("w1-1", True, {"a": "b"}, Phase.BOOT, 12.5, 2, 99.0, "no", cycles=[1.0])
        written.wants["r1"] = Want("r1", "gpus", 2, time.time(), "s1", {"a": "b"}, ["w1-1"])
        await written.commit()
        assert Path(path).stat().st_mode & 0o777 == 0o600
        read = Record(path, ["w1", "w2"])
        read.load()
        assert (read.hosts, read.wants, read.complete) == (written.hosts, written.wants, True)
        assert read.hosts["w1"].phase is Phase.BOOT
        assert read.find("w1-1") == "w1"
        assert read.find("w1-2") is None
        assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
        # A host that left the inventory, and one that came.
        other = Record(path, ["w2", "w3"])
        other.load()
        assert list(other.hosts) == ["w2", "w3"]

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2, "complete": true, "hosts": {}, "wants": []}', '{"version": 1}']
)
def test_a_record_that_cannot_be_trusted_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)

    async def run() -> None:
        with pytest.raises(ClusterkitError, match="cannot read the record"):
            Record(str(path), ["w1"]).load()

    asyncio.run(run())
    assert path.read_text() == text


def test_a_write_that_fails_leaves_the_old_record_and_no_scrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    records.write_file(str(path), "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        records.write_file(str(path), "new")
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]


def test_ids_are_never_used_twice_whatever_the_clock_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[str]:
        fleet = fleet_of(tmp_path)
        monkeypatch.setattr(time, "time_ns", lambda: 5_000_000)
        return [fleet._fresh_id("w0") for _ in range(3)] + [fleet._fresh_id("x" * 100 + "/y")]

    found: list[Any] = asyncio.run(run())
    assert len(set(found)) == 4
    assert all(len(name) <= 63 for name in found)
    assert json.dumps(found[0]) == '"w0-5"'
