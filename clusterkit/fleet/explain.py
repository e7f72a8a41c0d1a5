"""One line for each host: its state, since when, and why it does not come. Pure."""

from __future__ import annotations

from typing import Any, Literal

from clusterkit.fleet.config import Limits
from clusterkit.fleet.host import Host
from clusterkit.fleet.policy import DOING, clock, obstacle
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
    age = host.view.age_s
    return {
        "host": host.name,
        "pool": host.config.pool,
        "gpus": host.pool.gpus,
        "state": state,
        "since": clock(since) if since else None,
        "why": why,
        "instance": host.record.instance,
        "failures": host.record.failures,
        "cycles_today": host.record.cycles_today(now),
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
    if view.quarantined or view.maintained:
        state: State = "quarantined" if view.quarantined else "maintenance"
        return state, 0.0, f"{view.held}{runs}"
    if record.instance is not None:
        if not view.reachable:
            said = view.error or "not asked yet"
            return "unreachable", view.error_since, f"its node {record.instance} is in Ray; no answer: {said}"
        sick = "" if view.running else f"; {view.reason}"
        return "busy", record.since, f"its node {record.instance} is in Ray{sick}"
    if host.stale:
        return "stale", 0.0, "it was off when a newer generation was deployed; deploy it"
    why = obstacle(host, limits, now)
    if view.reachable:
        return "idle", record.idle_since, why or "on, and free"
    if record.off or view.power == "off":
        return "off", record.since if record.off else view.error_since, why or "off, and free"
    if view.asked and host.switch.can_switch and why is None:
        return "off", view.error_since, f"does not answer, taken for off: {view.error}"
    return "unreachable", view.error_since, why or "no answer"


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
