"""fleet_hosts, against the daemon itself with hosts that are programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module, run_module
from tests.unit.test_fleet_daemon import Lab, lab, until  # noqa: F401 (a fixture)

pytestmark = pytest.mark.slow

module = load_module("fleet_hosts")
Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(lab: Lab) -> Ask:  # noqa: F811
    def asked(verb: str = "status", *, check: bool = False, **more: Any) -> dict[str, Any]:
        return run_module(module, check=check, socket=lab.config["socket"], verb=verb, **more)

    return asked


def test_a_head_without_a_daemon(tmp_path: Path) -> None:
    said = run_module(module, socket=str(tmp_path / "no.sock"), verb="reserve", hosts=["w1"], owner="a deploy")
    assert said["running"] is False
    assert said["changed"] is False


def test_a_daemon_that_was_killed_is_no_daemon_that_was_never_there(lab: Lab, ask: Ask) -> None:  # noqa: F811
    lab.start()
    lab.kill()
    said = ask()
    assert said["failed"]
    assert "systemctl status clusterkit-fleet" in said["msg"]


def test_a_run_has_its_hosts_on_and_for_itself(lab: Lab, ask: Ask) -> None:  # noqa: F811
    w1, w2, w3 = (lab.host(name, off=name != "w1", bmc=True) for name in ("w1", "w2", "w3"))
    lab.config["limits"]["power_ons"] = 1
    lab.start()
    names = ["w1", "w2", "w3", "new"]
    assert set(ask(hosts=names)["off"]) == {"w2", "w3"}
    assert set(ask("reserve", check=True, hosts=names, owner="a deploy")["off"]) == {"w2", "w3"}
    assert w2.has("off"), "a plan switches nothing on"
    lab.ask("hold", host="w3", owner="kim", reason="new fan")
    said = ask("reserve", hosts=names, owner="a deploy")
    assert said["changed"] is False
    assert said["off"] == {"w3": "in maintenance: new fan (by kim)"}
    assert not w2.has("off")
    assert w3.has("off")
    assert lab.create(2)["given"] == [], "what is worked on is not given"
    assert ask("converged", hosts=["w1", "w2"])["changed"] is False
    until(lambda: set(lab.running()) == {"w1", "w2"})
    assert w1.has("node")


def test_who_is_skipped_waits_for_the_next_deploy(lab: Lab, ask: Ask) -> None:  # noqa: F811
    w1, w2 = (lab.host(name, off=name == "w2", bmc=True) for name in ("w1", "w2"))
    lab.start()
    said = ask("skip", hosts=["w1", "w2"], owner="a deploy")
    assert set(said["off"]) == {"w2"}
    ask("converged", hosts=["w1"])
    assert lab.create(2)["open"] == 1
    until(lambda: set(lab.running()) == {"w1"})
    assert w2.has("off")
    assert lab.state("w2") == "stale"
    ask("reserve", hosts=["w1", "w2"], owner="a deploy")
    ask("converged", hosts=["w1", "w2"])
    until(lambda: set(lab.running()) == {"w1", "w2"})
    assert not w1.has("off")


def test_maintenance_comes_and_goes_once(lab: Lab, ask: Ask) -> None:  # noqa: F811
    lab.host("w1")
    lab.start()
    held = {"hosts": ["w1"], "owner": "kim", "reason": "new fan"}
    assert ask("hold", check=True, **held)["hosts"]["w1"]["state"] == "idle"
    assert [ask("hold", **held)["changed"] for _ in range(2)] == [True, False]
    assert ask()["hosts"]["w1"]["state"] == "maintenance"
    assert [ask("release", hosts=["w1"], only="maintenance")["changed"] for _ in range(2)] == [True, False]
    other = ask("hold", hosts=["w1"], owner="kim")
    assert other["failed"], "a reason is missing"
