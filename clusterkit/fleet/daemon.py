"""Ties the parts together: hosts are polled, requests are served from what is known, actors do the rest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from typing import Any

from clusterkit.errors import ClusterkitError
from clusterkit.fleet.actor import RETRY_S, drive
from clusterkit.fleet.config import FleetConfig
from clusterkit.fleet.connection import Connection, Refused, Unreachable
from clusterkit.fleet.explain import describe
from clusterkit.fleet.host import Host
from clusterkit.fleet.policy import backoff, choose, obstacle, to_switch_off, to_wake
from clusterkit.fleet.power import PowerError, Switches
from clusterkit.fleet.record import RESERVE_LIMIT_S, Phase, Record, Want

QUARANTINE_TIMEOUT_S = 60.0
PLAN_EVERY_S = 0.5
SAVE_EVERY_S = 600.0
FINDING_LIMIT = 1000  # characters that the agent takes of a finding's problem

log = logging.getLogger(__name__)


class NotNow(ClusterkitError):
    """It cannot be answered, or done, at this moment: ask again. Nothing was changed."""


class Fleet:
    """Every public word answers from memory; `create`, `terminate` and `tags` once it is on disk, too."""

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        self.limits = config.limits
        self.record = Record(config.record, list(config.hosts))
        self.switches = Switches()
        # Hosts that answer and hosts that do not wait in different lines: whoever hangs delays only his like.
        lines = [asyncio.Semaphore(config.polling.parallel) for _ in range(2)]
        self._prompt, self._patient = lines
        self.hosts: dict[str, Host] = {}
        self.trouble: str | None = None  # why the record cannot be written
        self._serial = 0
        self._nudge = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    # ------------------------------------------------------------------------- life

    def prepare(self) -> None:
        """Read the record, and make the hosts of it. ClusterkitError where it cannot be trusted."""
        os.makedirs(self.config.ssh.control_dir, mode=0o700, exist_ok=True)
        self.record.load()
        for name, config in self.config.hosts.items():
            connection = Connection(name, config, self.config.ssh)
            switch = self.switches.of(config.power)
            pool = self.config.pools[config.pool]
            self.hosts[name] = Host(name, config, pool, self.record.hosts[name], connection, switch)

    async def run(self) -> None:
        """For ever; what was under way goes on."""
        await self._saved()
        for host in self.hosts.values():
            self.act(host)
            self._spawn(self._poll(host))
        saved = time.monotonic()
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self.config.polling.interval_s):
                        await self._nudge.wait()
                self._nudge.clear()
                await self._plan()
                if time.monotonic() - saved > SAVE_EVERY_S:
                    # How long hosts were off is worth a write now and then.
                    saved = time.monotonic()
                    await self._saved()
                # Hosts answer one by one; planning for each of a thousand would be all that is done.
                await asyncio.sleep(min(PLAN_EVERY_S, self.config.polling.interval_s))
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.switches.close()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task ended with an error", exc_info=error)

    # ------------------------------------------------------------------------- what Ray asks for

    def meet(self, session: str) -> None:
        """A new session ends the open requests of another: that autoscaler is gone, and the new one asks for what is
        still needed."""
        for other in [want.id for want in self.record.wants.values() if want.session != session]:
            del self.record.wants[other]

    def nodes(self, session: str | None = None) -> list[dict[str, Any]]:
        """Every instance that Ray was promised and that is not on its way out. NotNow until that is known.

        `session`: of the autoscaler that asks; others only look.
        """
        self._ready()
        if session is not None:
            self.meet(session)
            for host in self.hosts.values():
                host.record.told = host.record.instance is not None
        return [
            {
                "id": host.record.instance,
                "host": host.name,
                "type": host.config.pool,
                "ip": host.config.node_ip,
                "tags": host.record.tags,
                "running": host.view.running and host.view.instance == host.record.instance,
            }
            for host in self.hosts.values()
            if host.record.instance is not None
        ]

    def _ready(self) -> None:
        """Without a record, Ray would take every node for gone that has not answered yet."""
        if not self.record.complete:
            silent = [host.name for host in self.hosts.values() if not host.view.asked]
            if silent:
                raise NotNow(f"{len(silent)} of {len(self.hosts)} hosts have not been asked yet, such as {silent[0]}")
            self.record.complete = True
            self._spawn(self._saved())

    async def create(self, request: str, session: str, pool: str, count: int, tags: dict[str, str]) -> dict[str, Any]:
        """Promise hosts to a request: those that can come now get an instance; the rest stays open until one can.

        The same request again is answered as it was.
        """
        self._ready()
        if pool not in self.config.pools:
            raise ClusterkitError(f"there is no pool {pool}; there are {', '.join(sorted(self.config.pools))}")
        want = self.record.wants.get(request)
        if want is None:
            want = Want(request, pool, count, time.time(), session, dict(tags))
            self.record.wants[request] = want
            try:
                await self._give(want, new=True)
            except NotNow:
                self.record.wants.pop(request, None)
                raise
        answer: dict[str, Any] = {"given": list(want.given), "open": want.open}
        if want.open:
            answer["why"] = self._shortage(pool)
        return answer

    async def _give(self, want: Want, *, new: bool = False) -> None:
        """As many hosts as can come now. Only what is on disk is done; what is not is taken back."""
        taken = self._fill(want)
        if not taken and not new:
            return
        try:
            await self._commit()
        except OSError as error:
            for host in taken:
                if host.record.instance in want.given:
                    want.given.remove(host.record.instance)
                    self._take_back(host)
            raise NotNow(f"the record cannot be written: {error}") from error
        finally:
            for host in taken:
                host.noted = True
        for host in taken:
            log.info("%s is given to a request for %s, as %s", host.name, want.pool, host.record.instance)
            self.act(host)

    @staticmethod
    def _take_back(host: Host) -> None:
        if host.record.phase is Phase.POWER_ON and host.record.cycles:
            host.record.cycles.pop()
        host.record.instance, host.record.phase, host.record.tags = None, None, {}

    def _fill(self, want: Want) -> list[Host]:
        """The hosts that a request is given now; noted in memory only."""
        members = [host for host in self.hosts.values() if host.config.pool == want.pool]
        taken: list[Host] = []
        while want.open:
            now = time.time()
            slots = self._slots()
            room = self._promised(want.pool) < self.config.pools[want.pool].max
            host = choose(members, self.limits, slots, now) if room else None
            if host is None:
                break
            record = host.record
            record.phase = Phase.START if host.up else Phase.POWER_ON
            if record.phase is Phase.POWER_ON:
                record.cycles.append(now)
            record.instance, record.tags, record.told = self._fresh_id(host.name), want.tags, False
            record.since, record.error = now, None
            host.noted = False
            host.acts += 1
            want.given.append(record.instance)
            taken.append(host)
        return taken

    def _slots(self) -> int:
        """How many more hosts may be switched on now."""
        return self.limits.power_ons - sum(host.booting for host in self.hosts.values())

    def _fresh_id(self, name: str) -> str:
        """Ray must never see an id again; the agent takes 63 characters of it."""
        self._serial = max(self._serial + 1, time.time_ns() // 1_000_000)
        return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)[:48]}-{self._serial}"

    def _promised(self, pool: str) -> int:
        """Nodes of a pool that Ray counts on."""
        return sum(host.record.instance is not None for host in self.hosts.values() if host.config.pool == pool)

    def _shortage(self, pool: str) -> str:
        now, most = time.time(), self.config.pools[pool].max
        members = [host for host in self.hosts.values() if host.config.pool == pool]
        if self._promised(pool) >= most:
            return f"{pool} has as many nodes as it may ({most})"
        reasons = Counter(
            obstacle(host, self.limits, now) or "waits for its turn to be switched on" for host in members
        )
        told = "; ".join(
            f"{count} times: {reason}" if count > 1 else reason for reason, count in reasons.most_common(5)
        )
        return f"no host of {pool} can come now: {told}"

    async def terminate(self, instances: list[str]) -> dict[str, Any]:
        """Ray lets go of them: they are listed no longer, are drained and stopped, and their hosts are free then."""
        done, unknown, leaving = [], [], []
        for instance in instances:
            name = self.record.find(instance)
            if name is None:
                unknown.append(instance)  # gone already: that is what was asked for
                continue
            done.append(instance)
            leaving.append(self.hosts[name])
            self._let_go(self.hosts[name])
        # It stands in memory and is done; only a restart would forget it, and Ray asks again then.
        with contextlib.suppress(OSError):
            await self._commit()
        for host in leaving:
            self.act(host)
        return {"terminated": done, "unknown": unknown}

    def _let_go(self, host: Host) -> None:
        record = host.record
        log.info("%s: Ray lets go of %s", host.name, record.instance)
        record.instance, record.tags = None, {}
        if record.phase in (Phase.POWER_ON, Phase.BOOT):
            return  # it comes up, and is idle then
        if host.actor is not None:
            host.actor.cancel()
            host.actor = None
        record.phase, record.since, record.error = Phase.DRAIN, time.time(), None
        host.noted = True  # to be drained is safe to do, on disk or not
        host.acts += 1

    async def tags(self, instance: str, tags: dict[str, str]) -> None:
        name = self.record.find(instance)
        if name is None:
            raise ClusterkitError(f"there is no instance {instance}")
        self.record.hosts[name].tags = {**self.record.hosts[name].tags, **tags}
        try:
            await self._commit()
        except OSError as error:
            raise NotNow(f"the record cannot be written: {error}") from error

    # ------------------------------------------------------------------------- what people ask for

    def status(self) -> dict[str, Any]:
        now = time.time()
        wants = self.record.open_wants(self.limits.request_s)
        return {
            "cluster": self.config.cluster,
            "hosts": [describe(host, self.limits, now) for host in self.hosts.values()],
            "pools": {
                name: {"max": pool.max, "nodes": self._promised(name)} for name, pool in self.config.pools.items()
            },
            "open": [{"pool": want.pool, "count": want.open, "why": self._shortage(want.pool)} for want in wants],
            "trouble": self.trouble,
        }

    def _named(self, names: Iterable[str]) -> list[Host]:
        unknown = [name for name in names if name not in self.hosts]
        if unknown:
            raise ClusterkitError(f"there is no host {', '.join(unknown)}")
        return [self.hosts[name] for name in names]

    async def hold(self, name: str, owner: str, reason: str) -> dict[str, Any]:
        """Maintenance: from now on the host is neither given nor switched on, whether it is on or off."""
        (host,) = self._named([name])
        known = host.record.maintenance
        if known is not None and known["owner"] != owner:
            raise ClusterkitError(f"{name} is in maintenance already: {known['reason']} (by {known['owner']})")
        changed = known is None or known["reason"] != reason
        since = known["since"] if known is not None else time.time()
        host.record.maintenance = {"owner": owner, "reason": reason, "since": since}
        await self._saved()
        return {"changed": changed}

    async def release(self, name: str, only: str | None = None) -> dict[str, Any]:
        """Forget a host's failures, and the maintenance and quarantine that are kept here. `only` maintenance: just
        that."""
        (host,) = self._named([name])
        record = host.record
        changed = record.maintenance is not None
        record.maintenance = None
        # It has to say anew what its own agent keeps.
        record.held, record.held_as = None, None
        if only is None:
            changed = changed or bool(record.quarantine or record.failures)
            record.quarantine, record.failures, record.not_before, record.error = None, 0, 0.0, None
        host.hurry.set()
        await self._saved()
        self._nudge.set()
        return {"changed": changed}

    async def reserve(self, names: list[str], owner: str, seconds: float) -> dict[str, Any]:
        """Somebody is going to work on these hosts for so long: those that are off are switched on, in turns, and none
        is given to Ray or switched off."""
        until = time.time() + min(seconds, RESERVE_LIMIT_S)
        for host in self._named(names):
            host.record.reserved_by, host.record.reserved_until = owner, until
        await self._saved()
        self._nudge.set()
        return {}

    async def free(self, names: list[str], *, converged: bool) -> dict[str, Any]:
        """Nobody works on them any more. `converged`: they are as the inventory says."""
        hosts = self._named(names)
        changed = converged and any(host.record.stale for host in hosts)
        for host in hosts:
            host.record.reserved_by, host.record.reserved_until = None, 0.0
            host.record.stale = host.record.stale and not converged
        await self._saved()
        self._nudge.set()
        return {"changed": changed}

    async def skip(self, names: list[str]) -> dict[str, Any]:
        """A deploy leaves them out: they are not given until one has converged them."""
        hosts = self._named(names)
        changed = any(not host.record.stale for host in hosts)
        for host in hosts:
            host.record.stale = True
        await self._saved()
        return {"changed": changed}

    # ------------------------------------------------------------------------- what actors ask for

    def act(self, host: Host) -> None:
        """Go on with whatever is under way on a host; one actor at a time, and nothing that is not on disk yet."""
        if host.record.phase is not None and host.noted and (host.actor is None or host.actor.done()):
            host.actor = self._spawn(self._drive(host))

    async def _drive(self, host: Host) -> None:
        while True:
            try:
                await drive(self, host)
                return
            except Exception:
                # A mistake of ours must not leave a host half-way for ever.
                log.exception("%s: %s failed", host.name, host.record.phase)
                await asyncio.sleep(RETRY_S)

    async def enter(self, host: Host, phase: Phase | None) -> None:
        host.acts += 1
        host.record.phase, host.record.since = phase, time.time()
        log.info("%s: %s", host.name, phase or "done")
        await self._saved()
        self._nudge.set()

    async def _saved(self) -> None:
        """Once the record is on disk. A full disk holds up everything that would have to be remembered."""
        while True:
            with contextlib.suppress(OSError):
                return await self._commit()
            await asyncio.sleep(RETRY_S)

    async def _commit(self) -> None:
        """The record onto the disk; from where that fails until it works again, `status` says so, and the log once."""
        try:
            await self.record.commit()
        except OSError as error:
            if self.trouble is None:
                self.trouble = f"the record {self.record.path} cannot be written: {error}"
                log.error("%s", self.trouble)
                self._spawn(self._saved())
            raise
        if self.trouble is not None:
            self.trouble = None
            log.info("the record can be written again")

    def failed(self, host: Host, message: str, *, quarantine: bool = False) -> None:
        record = host.record
        self.record.lose(host.name)
        record.failures, record.error = record.failures + 1, message
        record.not_before = time.time() + backoff(record.failures, self.limits)
        log.warning("%s: %s (%d in a row)", host.name, message, record.failures)
        if quarantine or record.failures >= self.limits.quarantine_after:
            times = f"failed {record.failures} times in a row; last: " if record.failures > 1 else ""
            record.quarantine, record.quarantine_since = f"{times}{message}", time.time()

    def refused(self, host: Host, message: str) -> None:
        self.record.lose(host.name)
        # No failure of the host; until it was asked again, it is not given again.
        host.record.error, host.record.not_before = message, time.time() + RETRY_S

    def succeeded(self, host: Host) -> None:
        host.record.failures, host.record.not_before, host.record.error = 0, 0.0, None

    # ------------------------------------------------------------------------- polling

    async def _poll(self, host: Host) -> None:
        polling = self.config.polling
        while True:
            try:
                await self._look(host)
            except Exception:
                # A mistake of ours must not leave a host unwatched for ever.
                log.exception("%s: its answer could not be used", host.name)
                host.view.missed("its answer could not be used; the daemon's log has more")
            self._count_off(host)
            await host.tell_news()
            near = host.view.reachable or host.record.phase is not None
            with suppress(TimeoutError):
                async with asyncio.timeout(polling.interval_s if near else polling.away_interval_s):
                    await host.hurry.wait()
            host.hurry.clear()

    @staticmethod
    def _count_off(host: Host) -> None:
        now = time.monotonic()
        if host.off and host.off_seen is not None:
            host.record.off_s += now - host.off_seen
        host.off_seen = now if host.off else None

    async def _look(self, host: Host) -> None:
        acts, began = host.acts, time.monotonic()
        away = host.record.off or host.view.misses > 1
        try:
            answer = await host.connection.status(self._patient if host.view.error else self._prompt)
        except (Unreachable, Refused) as error:
            host.view.missed(str(error), alive=isinstance(error, Unreachable) and error.alive)
            await self._ask_power(host)
        else:
            if acts == host.acts:
                host.view.heard(answer, time.monotonic() - began)
                if away:
                    # Whoever switched it on has a use for it: its idle time begins anew.
                    host.record.idle_since = time.time()
        # What was said before the last act is no news.
        if acts == host.acts:
            self._observe(host)
            await self._tell_quarantine(host)

    async def _ask_power(self, host: Host) -> None:
        view = host.view
        every = self.config.polling.power_interval_s
        if not host.switch.reports or (view.power_asked and time.monotonic() - view.power_asked < every):
            return
        view.power_asked = time.monotonic()
        try:
            view.power, view.power_error = await host.switch.state(), None
        except PowerError as error:
            view.power, view.power_error = None, str(error)

    def _observe(self, host: Host) -> None:
        """What a host said changes what was noted, where nothing is under way: the host is the truth."""
        record, view = host.record, host.view
        before = (record.instance, record.phase, record.off, record.held)
        if view.reachable:
            record.off = False
            record.held = view.held
            record.held_as = None if view.held is None else "quarantined" if view.quarantined else "maintenance"
            if record.phase is None:
                self._agree(host)
        if before != (record.instance, record.phase, record.off, record.held):
            self._spawn(self._saved_and_acted(host))
        self._nudge.set()

    def _agree(self, host: Host) -> None:
        record, view = host.record, host.view
        if view.instance is not None:
            if record.instance != view.instance:
                log.info("%s: its node is %s (noted was %s)", host.name, view.instance, record.instance)
                record.instance, record.tags, record.since = view.instance, {}, time.time()
        elif view.gone:
            if record.instance is not None:
                log.info("%s: its node %s is gone: %s", host.name, record.instance, view.reason)
                self.record.lose(host.name)
                record.idle_since = time.time()
            if view.leftover:
                # `ray start --block` outlives a drain: what is left is cleared away, and the host is free.
                record.phase, record.since = Phase.STOP, time.time()
                host.acts += 1
            elif not record.idle_since:
                record.idle_since = time.time()

    async def _saved_and_acted(self, host: Host) -> None:
        await self._saved()
        self.act(host)

    async def _tell_quarantine(self, host: Host) -> None:
        """The host's own agent keeps a quarantine; the daemon only until the host can be told."""
        record = host.record
        if record.quarantine is None or record.phase is not None or not host.view.reachable:
            return
        finding = {
            "check": "fleet",
            "severity": "error",
            "subject": host.name,
            "problem": " ".join(record.quarantine.split())[:FINDING_LIMIT],
            "fix": f"see to it, then: clusterkit host release {host.name}",
        }
        given = {"owner": "fleet", "reason": finding["problem"][:200], "findings": [finding]}
        try:
            answer = await host.connection.call(("quarantine",), QUARANTINE_TIMEOUT_S, given)
        except (Unreachable, Refused) as error:
            log.warning("%s cannot be told of its quarantine: %s", host.name, error)
            return
        host.view.answer = {
            **(host.view.answer or {}),
            "quarantine": answer.get("quarantine"),
            "held": answer.get("held"),
        }
        record.quarantine = None
        self.succeeded(host)
        await self._saved()

    # ------------------------------------------------------------------------- planning

    async def _plan(self) -> None:
        """Serve requests that are open, and switch off what nobody needs."""
        wants = self.record.open_wants(self.limits.request_s)
        for want in wants:
            try:
                await self._give(want)
            except NotNow as error:
                log.error("%s", error)
        now = time.time()
        needed = {want.pool for want in wants if want.open}
        for pool in self.config.pools:
            members = [host for host in self.hosts.values() if host.config.pool == pool]
            for host in to_wake(members, self.limits, self._slots(), now):
                who = host.record.reserved_by if host.record.reserved(now) else "a warm spare"
                log.info("%s is switched on for %s", host.name, who)
                host.record.phase, host.record.since, host.record.error = Phase.POWER_ON, now, None
                host.record.cycles.append(now)
                host.acts += 1
                await self._saved_and_acted(host)
            if pool in needed:
                continue
            for host in to_switch_off(members, self.limits, now):
                log.info("%s has been idle since %s: it is switched off", host.name, host.record.idle_since)
                host.record.phase, host.record.since = Phase.POWER_OFF, now
                host.acts += 1
                await self._saved_and_acted(host)
