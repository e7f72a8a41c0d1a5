"""`clusterkit status`: what stands on the screen of an autoscaled cluster."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from clusterkit.cli.status import screen
from clusterkit.operations import Status


def host(name: str, state: str, why: str, **more: Any) -> dict[str, Any]:
    about = {"host": name, "pool": "gpus", "gpus": 8, "state": state, "since": "2026-11-20T10:00:00Z", "why": why}
    return {**about, "off_hours": 0.0, "saved_kwh": None, **more}


def shown(*demands: str, **fleet: Any) -> str:
    pools = {"gpus": {"nodes": 1, "max": 3}}
    running = {"running": True, "hosts": {}, "pools": pools, "open": [], "trouble": None, **fleet}
    nodes = [{"host": "w1", "alive": True, "node_ip": "192.0.2.11", "resources": {"GPU": 8}}]
    replicas = [
        {"node_ip": "192.0.2.11", "state": "RUNNING"},
        {"node_ip": "192.0.2.11", "state": "STARTING"},
        {"node_ip": "192.0.2.12", "state": "RUNNING"},
    ]
    apps = [{"name": "chat", "state": "RUNNING", "replicas": replicas, "base_url": "http://192.0.2.10:8000/v1"}]
    agents = [{"host": "head", "state": "running", "held": None}]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen(Status(True, None, nodes, apps, agents, running, list(demands))))
    return console.export_text()


def test_each_host_with_its_state_and_why() -> None:
    text = shown(
        hosts={
            "w1": host("w1", "busy", "its node w1-1 is in Ray"),
            "w2": host("w2", "off", "off, and free", off_hours=10.0, saved_kwh=12.0),
            "w3": host("w3", "maintenance", "in maintenance: new [board]", off_hours=2.0, saved_kwh=2.4),
        }
    )
    assert re.search(r"^w1 +gpus +busy +8 +1 +2026-11-20T10:00:00Z +its node w1-1 is in Ray", text, re.M), text
    assert re.search(r"^w2 +gpus +off +8 +0 ", text, re.M)
    assert "in maintenance: new [board]" in text
    assert "hosts were off for 12.0 hours altogether: about 14.4 kWh saved" in text
    assert re.search(r"^chat +RUNNING +2/3 ", text, re.M)


def test_what_is_asked_for_and_cannot_come() -> None:
    want = {"pool": "gpus", "count": 2, "why": "no host of gpus can come now: w2 has failed"}
    text = shown(open=[want], trouble="the record /r cannot be written: no space")
    assert "2 more of gpus are asked for: no host of gpus can come now: w2 has failed" in text
    assert "cannot be written: no space" in text
    assert "hosts were off for 0.0 hours altogether\n" in text


def test_what_ray_waits_for() -> None:
    line = "{'GPU': 8.0}: 1+ pending tasks/actors"
    assert f"Ray waits for {line}: Ray asks for a host within seconds, or no pool's hosts offer that" in shown(line)
    full = {"gpus": {"nodes": 3, "max": 3}}
    assert f"Ray waits for {line}: gpus has as many nodes as it may (3)" in shown(line, pools=full)
    coming = {"w1": host("w1", "booting", "booting, for at most 600 s")}
    assert f"Ray waits for {line}: hosts are asked for" in shown(line, hosts=coming)


def test_a_daemon_that_is_not_there_yet() -> None:
    assert "deploy the cluster" in shown(running=False)
