"""Carries one host from phase to phase. A phase is on disk before anything of it is done, and doing it twice is
doing it once: a daemon that was killed anywhere begins the phase again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from clusterkit.fleet.connection import Refused, Unreachable
from clusterkit.fleet.host import Host
from clusterkit.fleet.power import PowerError
from clusterkit.fleet.record import Phase

LOOK_S = 60.0  # what is left of a budget after a restart of the daemon, at the least
STOP_TIMEOUT_S = 400.0  # above the unit's own TimeoutStopSec
POWER_OFF_S = 300.0
CUT_S = 60.0
RETRY_S = 5.0
RETRY_MAX_S = 60.0

log = logging.getLogger(__name__)


class Keeper(Protocol):
    """What an actor may ask of the daemon."""

    async def enter(self, host: Host, phase: Phase | None) -> None:
        """Note the next phase, and return once that is on disk."""

    def failed(self, host: Host, message: str, *, quarantine: bool = False) -> None:
        """Note a failure: Ray hears that the instance is gone, and the host backs off."""

    def refused(self, host: Host, message: str) -> None:
        """The host may not run a node now: another may take its place."""

    def succeeded(self, host: Host) -> None:
        """Whatever failed before is forgotten."""


async def drive(keeper: Keeper, host: Host) -> None:
    """Until nothing is under way that is on disk."""
    while host.record.phase is not None and host.noted:
        await _STEPS[host.record.phase](keeper, host)
    host.hurry.set()


def left(host: Host, budget_s: float) -> float:
    """Seconds that the phase may still take. The clock may have jumped while nobody watched."""
    elapsed = min(max(time.time() - host.record.since, 0.0), budget_s)
    return max(budget_s - elapsed, min(budget_s, LOOK_S))


async def _power_on(keeper: Keeper, host: Host) -> None:
    if not host.view.reachable:
        try:
            await host.switch.on()
        except PowerError as error:
            keeper.failed(host, f"cannot be switched on: {error}")
            await keeper.enter(host, None)
            return
    host.record.off = False
    await keeper.enter(host, Phase.BOOT)


async def _boot(keeper: Keeper, host: Host) -> None:
    end = time.monotonic() + left(host, host.pool.boot_budget_s)
    while not host.view.reachable and time.monotonic() < end:
        await host.next_news(end - time.monotonic())
    if not host.view.reachable:
        keeper.failed(host, f"did not boot in {host.pool.boot_budget_s:g} s: {host.view.error}", quarantine=True)
        await keeper.enter(host, None)
        return
    host.record.idle_since = time.time()
    # Without an instance, Ray changed its mind meanwhile: the host stays on, for as long as idle hosts do.
    await keeper.enter(host, Phase.START if host.record.instance else None)


async def _start(keeper: Keeper, host: Host) -> None:
    """The same words again are no second start: the agent answers that it runs already, as this instance."""
    instance, end = host.record.instance, time.monotonic() + left(host, host.pool.start_timeout_s)
    while instance is not None and (patience := end - time.monotonic()) > 0:
        try:
            host.view.heard(await host.connection.call(("start", instance), patience), 0.0)
        except Refused as no:
            await _not_started(keeper, host, no)
            return
        except Unreachable as error:
            host.record.error = f"start: {error}"
            await host.next_news(min(RETRY_S, end - time.monotonic()))
            continue
        keeper.succeeded(host)
        await keeper.enter(host, None)
        return
    keeper.failed(host, host.record.error or "the node did not start in time")
    # Nobody knows what came of it. Ray was told that it is gone, so it has to go.
    await keeper.enter(host, Phase.STOP)


async def _not_started(keeper: Keeper, host: Host, no: Refused) -> None:
    if no.by_policy == "instance" and no.answer.get("instance_id"):
        # Somebody else started it: that is what Ray hears of from now on.
        host.record.instance = str(no.answer["instance_id"])
        await keeper.enter(host, None)
    elif no.by_policy:
        keeper.refused(host, str(no))
        await keeper.enter(host, None)
    else:
        keeper.failed(host, f"start: {no}")
        await keeper.enter(host, Phase.STOP)


async def _drain(keeper: Keeper, host: Host) -> None:
    """What has not moved when the grace is over is stopped: Ray has let go of the node long before."""
    grace = max(1, int(left(host, host.pool.drain_grace_s)))
    end = time.monotonic() + grace
    while (patience := end - time.monotonic()) > 0:
        try:
            await host.connection.call(("drain", "--timeout", str(max(1, int(patience)))), patience + CUT_S)
            break
        except Refused as no:
            log.warning("%s: %s", host.name, no)
            break
        except Unreachable as error:
            host.record.error = f"drain: {error}"
            await host.next_news(min(RETRY_S, patience))
    await keeper.enter(host, Phase.STOP)


async def _stop(keeper: Keeper, host: Host) -> None:
    """Until it is done: a node that Ray was told is gone must not live on."""
    began, pause = time.monotonic(), RETRY_S
    while True:
        try:
            answer = await host.connection.call(("stop",), STOP_TIMEOUT_S)
        except (Refused, Unreachable) as error:
            host.record.error = f"stop: {error}"
            # Off means that nothing runs; one that only a packet can wake is woken by the next request.
            unknown = isinstance(error, Unreachable) and host.switch.can_switch and not host.switch.reports
            if host.view.power == "off" or (unknown and time.monotonic() - began > host.pool.boot_budget_s):
                break
            await host.next_news(pause)
            pause = min(2 * pause, RETRY_MAX_S)
            continue
        host.view.heard(answer, 0.0)
        break
    host.record.idle_since = time.time()
    await keeper.enter(host, None)


async def _power_off(keeper: Keeper, host: Host) -> None:
    """The system is asked to; the BMC cuts the power only where it does not, and no node is there any more."""
    try:
        await host.connection.call(("poweroff",), CUT_S)
    except Refused as no:
        # Its node runs again, or somebody holds it.
        host.record.error, host.record.idle_since = f"poweroff: {no}", time.time()
        await keeper.enter(host, None)
        return
    except Unreachable:
        pass  # it may be on its way down
    gone = await _is_off(host, POWER_OFF_S)
    if not gone and host.switch.reports:
        try:
            await host.switch.off()
        except PowerError as error:
            host.record.error = str(error)
        gone = await _is_off(host, CUT_S)
    if not gone:
        keeper.failed(host, f"does not go off: {host.record.error or 'it still answers'}")
    host.record.off = gone
    host.record.idle_since = time.time()
    await keeper.enter(host, None)


async def _is_off(host: Host, patience_s: float) -> bool:
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if host.switch.reports:
            try:
                if await host.switch.state() == "off":
                    host.view.missed("it was switched off")
                    host.view.power = "off"
                    return True
            except PowerError as error:
                host.record.error = str(error)
            await asyncio.sleep(min(RETRY_S, max(0.0, end - time.monotonic())))
        else:
            await host.next_news(min(RETRY_S, end - time.monotonic()))
            if host.view.misses > 1:
                return True
    return False


_STEPS: dict[Phase, Callable[[Keeper, Host], Awaitable[None]]] = {
    Phase.POWER_ON: _power_on,
    Phase.BOOT: _boot,
    Phase.START: _start,
    Phase.DRAIN: _drain,
    Phase.STOP: _stop,
    Phase.POWER_OFF: _power_off,
}
