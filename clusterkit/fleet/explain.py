"""One line for each host: its state, since when, and why it does not come. Pure."""

from __future__ import annotations

from typing import Any, Literal

from clusterkit.fleet.config import Limits
from clusterkit.fleet.host import Host
from clusterkit.fleet.policy import DOING, STALE, clock, obstacle
from clusterkit.fleet.record import Phase

State = Literal[
    "off", "booting", "starting", "idle", "busy", "draining", "quarantined", "maintenance", "unreachable", "stale"
]
_PHASES: dict[Phase, State] = {
    Phase.POWER_ON: "booting",
    Phase.BOOT: "booting",
    Phase.START: "starting",
    Phase.DRAIN: "draining",
    Phase.STOP: "draining",
    Phase.POWER_OFF: "off",
}


def describe(host: Host, limits: Limits, now: float) -> dict[str, Any]:
    """For `status`: everything that somebody who wonders about this host wants to know."""
    state, since, why = explain(host, limits, now)
    record, age, watts = host.record, host.view.age_s, host.pool.idle_watts
    return {
        "host": host.name,
        "pool": host.config.pool,
        "gpus": host.pool.gpus,
        "state": state,
        "since": clock(since) if since else None,
        "why": why,
        "asked": host.view.asked,
        "reachable": host.view.reachable,
        "answers": host.view.reachable and record.phase is not Phase.POWER_OFF,
        "phase": record.phase,
        # Why it could not be switched on, or given, should somebody reserve it.
        "obstacle": obstacle(host, limits, now, reserved=False),
        "instance": record.instance,
        "failures": record.failures,
        "cycles_today": record.cycles_today(now),
        "stale": record.stale,
        "reserved": record.reserved_by if record.reserved(now) else None,
        "off_hours": round(record.off_s / 3600, 2),
        "saved_kwh": round(watts * record.off_s / 3.6e6, 2) if watts is not None else None,
        "power": host.config.power.kind,
        "power_error": host.view.power_error,
        "answered_s_ago": round(age, 1) if age is not None else None,
        "took_s": round(host.view.took_s, 3),
    }


def explain(host: Host, limits: Limits, now: float) -> tuple[State, float, str]:
    """(state, since, why). `idle` is on without a node; what a `busy` host does in Ray, Ray knows."""
    record, view = host.record, host.view
    if record.phase is not None:
        return _PHASES[record.phase], record.since, _doing(host)
    runs = f"; its node {record.instance} still runs" if record.instance else ""
    if record.quarantine is not None:
        return "quarantined", record.quarantine_since, f"{record.quarantine}{runs}"
    if host.held is not None:
        return _held(host, f"{host.held}{runs}")
    if record.instance is not None:
        if not view.reachable:
            said = view.error or "not asked yet"
            return "unreachable", view.error_since, f"its node {record.instance} is in Ray; no answer: {said}"
        sick = "" if view.running else f"; {view.reason}"
        return "busy", record.since, f"its node {record.instance} is in Ray{sick}"
    why = obstacle(host, limits, now)
    if record.stale and why == STALE:
        return "stale", 0.0, why
    if view.reachable:
        stays = host.switch.can_switch and record.cycles_today(now) >= limits.cycles_per_day
        limit = f"; stays on: switched on {limits.cycles_per_day} times within a day, which is the limit"
        return "idle", record.idle_since, why or f"on, and free{limit if stays else ''}"
    if host.off:
        return "off", record.since if record.off else view.error_since, why or "off, and free"
    if view.asked and host.switch.can_switch and why is None:
        return "off", view.error_since, f"does not answer, taken for off: {view.error}"
    return "unreachable", view.error_since, why or "no answer"


def _held(host: Host, why: str) -> tuple[State, float, str]:
    if host.record.maintenance is not None:
        return "maintenance", float(host.record.maintenance["since"]), why
    if host.view.reachable:
        return "quarantined" if host.view.quarantined else "maintenance", 0.0, why
    return host.record.held_as or "maintenance", 0.0, why


def _doing(host: Host) -> str:
    record, view = host.record, host.view
    text = DOING[record.phase] if record.phase else ""
    if record.phase is Phase.BOOT:
        text += f", for at most {host.pool.boot_budget_s:g} s"
    if record.phase in (Phase.DRAIN, Phase.STOP) and not view.reachable:
        text += f"; it does not answer and is asked again: {view.error}"
    elif record.error:
        text += f"; last: {record.error}"
    return text
