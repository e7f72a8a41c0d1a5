"""Which host comes next, and which may go off. Pure: it reads, and decides nothing else."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence

from clusterkit.fleet.config import Limits, PoolConfig
from clusterkit.fleet.host import Host
from clusterkit.fleet.record import Phase


def obstacle(host: Host, limits: Limits, now: float, *, reserved: bool = True) -> str | None:
    """Why this host cannot be given to Ray now; None where it can. `now`: epoch. `reserved` False: leaves that out."""
    record, view = host.record, host.view
    if record.phase is not None:
        return f"{DOING[record.phase]} since {clock(record.since)}"
    if record.instance is not None:
        return f"its node {record.instance} is in Ray"
    if record.quarantine is not None:
        return f"in quarantine since {clock(record.quarantine_since)}: {record.quarantine}"
    if host.held is not None:
        return host.held
    if reserved and record.reserved(now):
        return f"kept free for {record.reserved_by} until {clock(record.reserved_until)}"
    if reserved and record.stale:
        return STALE
    if now < record.not_before <= now + limits.backoff_max_s:
        return f"tried again from {clock(record.not_before)} on, after {record.failures} failures; last: {record.error}"
    if view.reachable:
        return None if view.stopped else f"its node is {view.answer and view.answer.get('state')}: {view.reason}"
    if not view.asked:
        return "not asked yet"
    return _unreachable(host, limits, now)


def _unreachable(host: Host, limits: Limits, now: float) -> str | None:
    since = f"no answer since {clock(host.view.error_since)}: {host.view.error}"
    if not host.switch.can_switch:
        return f"{since}; nothing can switch it on"
    if host.view.alive:
        return f"{since}; it is on, and its sshd does not let the daemon in"
    if host.view.power == "on":
        return f"{since}; the BMC says that it is on"
    if host.record.cycles_today(now) >= limits.cycles_per_day:
        return f"off, and was switched on {limits.cycles_per_day} times within a day, which is the limit"
    return None


def choose(hosts: Iterable[Host], limits: Limits, slots: int, now: float) -> Host | None:
    """The best one: already on, fewest failures, fewest times switched on today, longest idle.

    `slots`: how many more may be switched on at the same time.
    """
    able = [host for host in hosts if obstacle(host, limits, now) is None and (host.up or slots > 0)]
    return min(
        able,
        key=lambda host: (
            not host.up,
            host.record.failures,
            0 if host.up else host.record.cycles_today(now),
            host.record.idle_since,
            host.name,
        ),
        default=None,
    )


def to_wake(hosts: Sequence[Host], limits: Limits, slots: int, now: float) -> list[Host]:
    """Of one pool: hosts that are off and are to be switched on without a node: first those that somebody has
    reserved, then warm spares that are missing. `slots`: how many more may boot at the same time."""
    asleep = [host for host in hosts if not host.up and obstacle(host, limits, now, reserved=False) is None]
    asleep.sort(key=lambda host: (host.record.failures, host.record.cycles_today(now), host.name))
    asked = [host for host in asleep if host.record.reserved(now)]
    spares = [host for host in asleep if obstacle(host, limits, now) is None]
    ready = sum(
        (host.up and obstacle(host, limits, now) is None) or (host.booting and host.record.instance is None)
        for host in hosts
    )
    missing = max(0, warm(hosts[0].pool, now) - ready) if hosts else 0
    return [*asked, *spares[:missing]][: max(0, slots)]


def warm(pool: PoolConfig, now: float) -> int:
    """How many spares the pool keeps on at this time of its day."""
    if pool.warm_hours is None:
        return pool.warm
    begin, end = pool.warm_hours.split("-")
    time_of_day = datetime.datetime.fromtimestamp(now).strftime("%H:%M")
    within = begin <= time_of_day < end if begin <= end else (time_of_day >= begin or time_of_day < end)
    return pool.warm if within else 0


def to_switch_off(hosts: Sequence[Host], limits: Limits, now: float) -> list[Host]:
    """Of one pool: hosts that have been idle for long enough, but for the warm spares.

    Whoever is held, reserved, stale or quarantined stays on: somebody works on it, or wants to. Whoever could not be
    switched on again today stays on, too.
    """
    idle = [host for host in hosts if host.up and obstacle(host, limits, now) is None]
    idle.sort(key=lambda host: (host.record.idle_since, host.name))
    spare = idle[: max(0, len(idle) - warm(idle[0].pool, now))] if idle else []
    return [
        host
        for host in spare
        if host.switch.can_switch
        and host.pool.idle_off_s is not None
        and now - host.record.idle_since >= host.pool.idle_off_s
        and host.record.cycles_today(now) < limits.cycles_per_day
    ]


def backoff(failures: int, limits: Limits) -> float:
    """Seconds until a host that failed so many times in a row is tried again."""
    return float(min(limits.backoff_max_s, limits.backoff_s * 2 ** min(failures - 1, 20)))


def clock(epoch: float) -> str:
    return datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


STALE = "stale: a deploy left it out; deploy it"
DOING = {
    Phase.POWER_ON: "being switched on",
    Phase.BOOT: "booting",
    Phase.START: "its node is starting",
    Phase.DRAIN: "its node is being drained",
    Phase.STOP: "its node is being stopped",
    Phase.POWER_OFF: "being switched off",
}
