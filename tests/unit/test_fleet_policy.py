"""Who comes next, who may go off, and what each host says of itself: pure."""

from __future__ import annotations

import asyncio
import datetime
import time
from typing import Any

import pytest

from clusterkit.fleet.config import HostConfig, Limits, PoolConfig, PowerConfig, Ssh
from clusterkit.fleet.connection import Connection
from clusterkit.fleet.explain import describe, explain
from clusterkit.fleet.host import Host
from clusterkit.fleet.policy import backoff, choose, obstacle, to_switch_off, to_wake, warm
from clusterkit.fleet.power import Switches
from clusterkit.fleet.record import RESERVE_LIMIT_S, HostRecord, Phase

NOW = time.time()
FAN = {"owner": "kim", "reason": "new fan", "since": NOW}
LIMITS = Limits()
IDLE: dict[str, Any] = {"state": "stopped", "reason": "stopped", "generation_on_disk": "g1"}
WAKE = PowerConfig(kind="wol", mac="02:00:00:00:00:02")
SWITCHES = Switches()


def host(
    name: str,
    *,
    answer: dict[str, Any] | None = IDLE,
    power: PowerConfig = WAKE,
    idle_off_s: float | None = None,
    warm: int = 0,
    warm_hours: str | None = None,
    idle_watts: int | None = None,
    error: str | None = None,
    bmc: Any = None,
    alive: bool = False,
    **record: Any,
) -> Host:
    """On and idle, unless said otherwise; `answer` None: it does not answer."""
    config = HostConfig(address=name, node_ip="192.0.2.1", pool="p", power=power)
    ssh = Ssh(identity="/x", known_hosts="/x", control_dir="/tmp")
    pool = PoolConfig(max=10, idle_off_s=idle_off_s, warm=warm, warm_hours=warm_hours, idle_watts=idle_watts)
    made = Host(name, config, pool, HostRecord(**record), Connection(name, config, ssh), SWITCHES.of(power))
    if answer is not None:
        made.view.heard(answer, 0.0)
    if answer is None or error:
        made.view.missed(error or "No route to host", alive=alive)
    made.view.power = bmc
    return made


def chosen(*hosts: Host, slots: int = 4) -> str | None:
    found = choose(hosts, LIMITS, slots, NOW)
    return found.name if found else None


def test_the_order_in_which_hosts_come() -> None:
    off = host("a", answer=None)
    assert chosen(off, host("b")) == "b", "on before off"
    assert chosen(host("a", failures=1), host("b")) == "b", "fewer failures first"
    assert chosen(host("a", failures=1), off) == "a", "on before off, even so"
    assert chosen(host("a", idle_since=200.0), host("b", idle_since=100.0)) == "b", "longest idle first"
    assert chosen(host("a", answer=None, cycles=[NOW]), host("b", answer=None)) == "b", "rested hosts first"
    assert chosen(host("b"), host("a")) == "a", "and else always the same"
    assert chosen(off, slots=0) is None
    assert chosen(host("a"), slots=0) == "a", "who is on needs no slot"
    assert chosen() is None


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"phase": Phase.BOOT, "since": 0.0}, "booting since 1970-01-01T00:00:00Z"),
        ({"instance": "w-1"}, "its node w-1 is in Ray"),
        ({"quarantine": "did not boot", "quarantine_since": 0.0}, "in quarantine since 1970-01-01T00:00:00Z: did not"),
        ({"answer": {**IDLE, "held": "in maintenance: new fan"}}, "in maintenance: new fan"),
        ({"answer": None, "held": "in maintenance: x"}, "in maintenance: x"),
        ({"answer": None, "bmc": "off", "maintenance": FAN}, "in maintenance: new fan (by kim)"),
        ({"maintenance": FAN}, "in maintenance: new fan (by kim)"),
        ({"stale": True}, "stale"),
        ({"stale": True, "answer": None}, "stale"),
        ({"reserved_by": "a deploy", "reserved_until": NOW + 60}, "kept free for a deploy until"),
        ({"not_before": NOW + 60, "failures": 2, "error": "x"}, "after 2 failures"),
        ({"answer": {"state": "degraded", "reason": "sick"}}, "its node is degraded: sick"),
        ({"answer": None, "power": PowerConfig()}, "No route to host; nothing can switch it on"),
        ({"answer": None, "bmc": "on"}, "the BMC says that it is on"),
        ({"answer": None, "alive": True}, "its sshd does not let the daemon in"),
        ({"answer": None, "cycles": [NOW - 1] * 12}, "switched on 12 times within a day"),
    ],
)
def test_who_does_not_come_says_why(made: dict[str, Any], words: str) -> None:
    record = {key: made.pop(key) for key in ("error",) if key in made and "failures" in made}
    found = host("a", **made)
    found.record.error = record.get("error")
    assert words in str(obstacle(found, LIMITS, NOW))
    assert chosen(found) is None


@pytest.mark.parametrize(
    "made",
    [
        {"reserved_by": "a deploy", "reserved_until": NOW - 1},
        {"reserved_by": "a deploy", "reserved_until": NOW + 10 * RESERVE_LIMIT_S},
        {"held": "in maintenance: x"},
        {"not_before": NOW - 1},
        {"not_before": NOW + 10 * LIMITS.backoff_max_s},
        {"answer": None, "cycles": [NOW - 90_000] * 12},
        {"answer": None, "bmc": "off"},
    ],
)
def test_who_comes_after_all(made: dict[str, Any]) -> None:
    """A wait that is over, a clock that jumped, and a host that says it is held no longer."""
    assert chosen(host("a", **made)) == "a"


def test_a_host_that_was_never_asked_waits() -> None:
    made = host("a")
    made.view = type(made.view)()
    assert obstacle(made, LIMITS, NOW) == "not asked yet"


def test_failures_wait_longer_and_longer_and_not_for_ever() -> None:
    waits = [backoff(count, LIMITS) for count in (1, 2, 3, 50, 10_000)]
    assert waits == [30, 60, 120, 1800, 1800]


def test_who_is_switched_off() -> None:
    def off(*hosts: Host) -> list[str]:
        return [found.name for found in to_switch_off(hosts, LIMITS, NOW)]

    long, short = NOW - 1000, NOW - 10
    assert off(host("a", idle_off_s=600, idle_since=long), host("b", idle_off_s=600, idle_since=short)) == ["a"]
    assert off(host("a", idle_since=long)) == [], "no delay: they stay on"
    kept = {"idle_off_s": 600.0, "warm": 1}
    assert off(host("a", idle_since=long, **kept)) == []
    assert off(host("a", idle_since=long, **kept), host("b", idle_since=long - 1, **kept)) == ["b"]
    each: list[dict[str, Any]] = [
        {"power": PowerConfig()},
        {"instance": "w-1"},
        {"phase": Phase.START},
        {"answer": {**IDLE, "held": "in maintenance: x"}},
        {"stale": True},
        {"maintenance": FAN},
        {"reserved_by": "a deploy", "reserved_until": NOW + 60},
        {"quarantine": "x"},
        {"cycles": [NOW] * 12},
        {"answer": {"state": "degraded", "reason": "x"}},
        {"answer": None},
    ]
    for changes in each:
        assert off(host("a", **{"idle_off_s": 600, "idle_since": long, **changes})) == [], changes


def test_who_is_woken_without_a_node() -> None:
    def woken(*hosts: Host, slots: int = 4) -> list[str]:
        return [found.name for found in to_wake(hosts, LIMITS, slots, NOW)]

    off: dict[str, Any] = {"answer": None, "bmc": "off"}
    asked: dict[str, Any] = {**off, "reserved_by": "a deploy", "reserved_until": NOW + 60}
    assert woken(host("a", **off), host("b", **asked)) == ["b"]
    assert woken(host("a", **asked), host("b", **asked), host("c", **asked), slots=2) == ["a", "b"], "in turns"
    assert woken(host("a", **asked, stale=True)) == ["a"], "to be deployed is what it waits for"
    assert woken(host("a", reserved_by="a deploy", reserved_until=NOW + 60)) == [], "it is on"
    for kept_off in ({"maintenance": FAN}, {"held": "in quarantine: x"}, {"quarantine": "x"}, {"cycles": [NOW] * 12}):
        assert woken(host("a", **asked, **kept_off)) == [], kept_off

    spare: dict[str, Any] = {**off, "warm": 1}
    assert woken(host("a", **spare), host("b", **spare)) == ["a"]
    assert woken(host("a", **spare), host("b", warm=1)) == [], "there is one"
    assert woken(host("a", **spare), host("b", warm=1, phase=Phase.BOOT)) == [], "one is coming"
    assert woken(host("a", **spare), host("b", warm=1, phase=Phase.BOOT, instance="b-1")) == ["a"], "for Ray, that one"
    assert woken(host("a", **spare), host("b", warm=1, instance="b-1")) == ["a"], "that one is taken"
    assert woken(host("a", **spare, stale=True)) == []


@pytest.mark.parametrize(
    ("hours", "at", "kept"),
    [
        (None, "03:00", 2),
        ("07:00-19:00", "07:00", 2),
        ("07:00-19:00", "18:59", 2),
        ("07:00-19:00", "19:00", 0),
        ("07:00-19:00", "06:59", 0),
        ("22:00-06:00", "23:00", 2),
        ("22:00-06:00", "05:59", 2),
        ("22:00-06:00", "12:00", 0),
    ],
)
def test_spares_are_kept_within_their_hours(hours: str | None, at: str, kept: int) -> None:
    moment = datetime.datetime.strptime(f"2026-11-20 {at}", "%Y-%m-%d %H:%M").timestamp()
    assert warm(host("a", warm=2, warm_hours=hours).pool, moment) == kept


def test_what_was_saved_is_said_where_the_site_knows_its_watts() -> None:
    told = describe(host("a", answer=None, off=True, off_s=7200.0, idle_watts=1500), LIMITS, NOW)
    assert (told["off_hours"], told["saved_kwh"]) == (2.0, 3.0)
    assert describe(host("a", off_s=7200.0), LIMITS, NOW)["saved_kwh"] is None


@pytest.mark.parametrize(
    ("made", "state", "words"),
    [
        ({}, "idle", "on, and free"),
        ({"cycles": [NOW - 1] * 12}, "idle", "stays on: switched on 12 times within a day"),
        ({"answer": None, "off": True}, "off", "off, and free"),
        ({"answer": None, "bmc": "off"}, "off", "off, and free"),
        ({"answer": None}, "off", "taken for off: No route to host"),
        ({"answer": None, "power": PowerConfig()}, "unreachable", "nothing can switch it on"),
        ({"answer": None, "alive": True}, "unreachable", "its sshd does not let the daemon in"),
        ({"answer": None, "alive": True, "off": True}, "unreachable", "its sshd does not let the daemon in"),
        ({"phase": Phase.POWER_ON}, "booting", "being switched on"),
        ({"phase": Phase.BOOT}, "booting", "for at most 600 s"),
        ({"phase": Phase.START}, "starting", "its node is starting"),
        ({"phase": Phase.DRAIN}, "draining", "being drained"),
        ({"phase": Phase.STOP, "answer": None}, "draining", "asked again: No route to host"),
        ({"instance": "w-1", "answer": {"state": "running", "instance_id": "w-1"}}, "busy", "w-1 is in Ray"),
        ({"instance": "w-1", "answer": {"state": "degraded", "reason": "sick"}}, "busy", "w-1 is in Ray; sick"),
        ({"instance": "w-1", "answer": None}, "unreachable", "w-1 is in Ray; no answer: No route"),
        ({"quarantine": "did not boot"}, "quarantined", "did not boot"),
        ({"answer": {**IDLE, "quarantine": {"x": 1}, "held": "in quarantine: ECC"}}, "quarantined", "ECC"),
        (
            {"instance": "w-1", "answer": {"state": "running", "maintenance": {"x": 1}, "held": "in maintenance: fan"}},
            "maintenance",
            "in maintenance: fan; its node w-1 still runs",
        ),
        ({"answer": None, "held": "in quarantine: ECC", "held_as": "quarantined"}, "quarantined", "ECC"),
        ({"answer": None, "off": True, "maintenance": FAN}, "maintenance", "new fan (by kim)"),
        ({"stale": True}, "stale", "deploy it"),
    ],
)
def test_every_state_says_why(made: dict[str, Any], state: str, words: str) -> None:
    found, _, why = explain(host("a", **made), LIMITS, NOW)
    assert found == state
    assert words in why


def test_news_is_waited_for_and_not_for_ever() -> None:
    async def run() -> None:
        made = host("a")
        began = time.monotonic()
        await made.next_news(0.05)
        assert time.monotonic() - began < 30
        waiting = asyncio.create_task(made.next_news(600))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await made.tell_news()
        await asyncio.wait_for(waiting, 30)

    asyncio.run(run())
