"""What was promised to Ray, and what is under way on each host: on disk before it is done.

Whatever the daemon was doing when it was killed, the next one reads this and the hosts, and goes on. Times are
seconds since the epoch; a clock that jumped makes a wait shorter or longer by at most its own length, never endless.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Literal

from clusterkit.errors import ClusterkitError

VERSION = 1
DAY_S = 86400.0
RESERVE_LIMIT_S = DAY_S

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """What is being done to a host. Each can be done again from its start, by the same daemon or the next."""

    POWER_ON = "power_on"
    BOOT = "boot"
    START = "start"
    DRAIN = "drain"
    STOP = "stop"
    POWER_OFF = "power_off"


@dataclass
class HostRecord:
    """One host. `instance` is what Ray knows it by; None where Ray is told of none.

    told                          Ray has had it in a list
    failures, not_before, error   in a row; when it may be tried again; what the last one said
    quarantine                    kept here while the host cannot be told: it does not boot
    maintenance                   owner, reason and since, as somebody told the daemon; the host may be off
    held, held_as                 what its own agent said last: a host that was held stays so while it is off
    reserved_by, reserved_until   somebody works on it for a while: it is switched on, and not given
    stale                         it was left out by a deploy
    off                           we switched it off, and it has not answered since
    off_s                         how long it has been off, altogether
    cycles                        when it was powered on, for a day
    """

    instance: str | None = None
    told: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    phase: Phase | None = None
    since: float = 0.0
    failures: int = 0
    not_before: float = 0.0
    error: str | None = None
    quarantine: str | None = None
    quarantine_since: float = 0.0
    maintenance: dict[str, Any] | None = None
    held: str | None = None
    held_as: Literal["quarantined", "maintenance"] | None = None
    reserved_by: str | None = None
    reserved_until: float = 0.0
    stale: bool = False
    off: bool = False
    off_s: float = 0.0
    idle_since: float = 0.0
    cycles: list[float] = field(default_factory=list)

    @property
    def leaving(self) -> bool:
        """Ray has let go of it, or never had it: whatever runs there is on its way out."""
        return self.phase in (Phase.DRAIN, Phase.STOP, Phase.POWER_OFF)

    def reserved(self, now: float) -> bool:
        """A clock that jumped back does not make it longer than it was asked for."""
        return self.reserved_by is not None and now < self.reserved_until <= now + RESERVE_LIMIT_S

    def cycles_today(self, now: float) -> int:
        self.cycles = [at for at in self.cycles if abs(now - at) < DAY_S]
        return len(self.cycles)


@dataclass
class Want:
    """One request of Ray: hosts it asked for, and those it was given. What is open is given as hosts come free."""

    id: str
    pool: str
    count: int
    at: float
    session: str
    tags: dict[str, str] = field(default_factory=dict)
    given: list[str] = field(default_factory=list)

    @property
    def open(self) -> int:
        return self.count - len(self.given)


class Record:
    """All of it, in one file. Changes are made in memory, and `commit` returns once they are on disk."""

    def __init__(self, path: str, names: Iterator[str] | list[str]) -> None:
        self.path = path
        self.hosts = {name: HostRecord() for name in names}
        self.wants: dict[str, Want] = {}
        self.complete = False  # without a record, what runs on the hosts has yet to be read
        self._asked = 0
        self._written = 0
        self._lock = asyncio.Lock()

    def load(self) -> None:
        """ClusterkitError where there is a file that cannot be read: guessing would start nodes twice."""
        try:
            with open(self.path, encoding="utf-8") as handle:
                data = json.load(handle)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']!r} is not {VERSION}")
            known = {item.name for item in fields(HostRecord)}
            for name, values in data["hosts"].items():
                if name not in self.hosts:
                    log.warning("%s is not in the configuration any more; its record is dropped", name)
                    continue
                found = HostRecord(**{key: value for key, value in values.items() if key in known})
                found.phase = Phase(found.phase) if found.phase else None
                self.hosts[name] = found
            self.wants = {item["id"]: Want(**item) for item in data["wants"]}
            self.complete = bool(data["complete"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ClusterkitError(
                f"cannot read the record {self.path}: {error}",
                hint=f"if it cannot be mended: mv {self.path} {self.path}.bad; what runs is then read from the hosts",
            ) from error

    async def commit(self) -> None:
        """OSError where it cannot be written: then nothing that was noted may be done."""
        self._asked += 1
        mine = self._asked
        async with self._lock:
            if self._written >= mine:
                return  # the write before took it along
            covers = self._asked
            await asyncio.to_thread(write_file, self.path, self._text())
            self._written = covers

    def _text(self) -> str:
        # No indent: with one, json leaves its fast path, and a thousand hosts take a while.
        data: dict[str, Any] = {
            "version": VERSION,
            "complete": self.complete,
            "hosts": {name: vars(host) for name, host in self.hosts.items()},
            "wants": [vars(want) for want in self.wants.values()],
        }
        return json.dumps(data) + "\n"

    def find(self, instance: str) -> str | None:
        """The host that Ray knows by this id."""
        return next((name for name, host in self.hosts.items() if host.instance == instance), None)

    def lose(self, name: str) -> None:
        """A promise is broken. Ray asks again for what it had in a list and misses; what it never heard of would be
        waited for in silence, so that is open again."""
        host = self.hosts[name]
        for want in self.wants.values():
            if host.instance in want.given and not host.told:
                want.given.remove(host.instance)
        host.instance, host.tags, host.told = None, {}, False

    def open_wants(self, lifetime_s: float) -> list[Want]:
        """Oldest first. Those that Ray has given up on by itself are dropped."""
        now = time.time()
        for want in list(self.wants.values()):
            if abs(now - want.at) > lifetime_s:
                del self.wants[want.id]
        return sorted((want for want in self.wants.values() if want.open > 0), key=lambda want: want.at)


def write_file(path: str, text: str) -> None:
    """All or nothing, for its owner only, and on the disk when this returns."""
    folder = os.path.dirname(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
