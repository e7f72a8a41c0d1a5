"""The daemon, as a process of its own, with hosts that are programs: an `ssh` and an `ipmitool` that only pretend."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterkit.node_provider.client import FleetAway, FleetClient, FleetRefused
from tests.support import PATIENCE_S, until

ROOT = Path(__file__).resolve().parents[2]
PYTHON = getattr(sys, "_base_executable", sys.executable)
# Hundreds of processes and deadlines of seconds: a busy machine is long at it.
pytestmark = pytest.mark.slow

# What reaches a host, and what does not. `gate-X` holds up step X; `at-X` says that it has been reached.
SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
host=$2; shift 2
dir=FOLDER/$host
echo "$*" >> $dir/calls
if [ -e $dir/hang ]; then
  [ $1 = status ] && exec sleep 1000000
  # ServerAliveInterval ends what a frozen host leaves open.
  sleep 1; echo "Timeout, server $host not responding." >&2; exit 255
fi
[ -e $dir/off ] && { echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255; }
[ -e $dir/refuse ] && { echo "$host: Permission denied (publickey)." >&2; exit 255; }
. FOLDER/gates
gate $1-before
AGENT $dir "$@"
code=$?
gate $1-after
exit $code
"""

GATES = """
gate() {
  [ -e $dir/gate-$1 ] || return 0
  touch $dir/at-$1
  while [ -e $dir/gate-$1 ]; do sleep 0.05; done
}
"""

# The agent's words and answers; the node is a file with its instance id in it.
AGENT = """#!/bin/sh
dir=$1 word=$2 arg=$3 changed=false
exec 9> $dir/lock
[ $word = status ] || flock 9
say() {
  instance=null state=stopped raylet=none reason='"stopped"' held=null quarantine=null maintenance=null
  [ -e $dir/node ] && instance="\\"$(cat $dir/node)\\"" && state=running raylet=running reason=null
  [ -e $dir/gone ] && state=degraded raylet=gone reason='"the raylet is gone: drained, or it died"'
  [ -e $dir/sick ] && state=degraded && reason='"the raylet is not healthy (asked on port 20365)"'
  [ -e $dir/held ] && maintenance='{"owner": "kim"}' && held="\\"in maintenance: $(cat $dir/held)\\""
  [ -e $dir/quarantine ] && quarantine=$(cat $dir/quarantine) && held='"in quarantine: by its agent"'
  generation='"g1"'
  [ -e $dir/generation ] && generation="\\"$(cat $dir/generation)\\""
  printf '{"changed": %s, "state": "%s", "raylet": "%s", "reason": %s, "instance_id": %s, "held": %s, ' \\
    $changed $state $raylet "$reason" "$instance" "$held"
  printf '"maintenance": %s, "quarantine": %s, "generation_on_disk": %s}\\n' \\
    "$maintenance" "$quarantine" "$generation"
}
refuse() {
  printf '{"changed": false, "failed": true, "reason": "%s", "refused": %s, ' "$2" "$3"
  printf '"instance_id": %s}\\n' "${4:-null}"
  exit $1
}
case $word in
  start)
    [ -e $dir/held ] && refuse 3 "the host is in maintenance: $(cat $dir/held)" '"maintenance"'
    [ -e $dir/quarantine ] && refuse 3 "the host is in quarantine" '"quarantine"'
    [ -e $dir/broken ] && refuse 1 "the node did not come up: no memory" null
    if [ -e $dir/node ]; then
      [ "$(cat $dir/node)" = "$arg" ] || refuse 3 "it runs already" '"instance"' "\\"$(cat $dir/node)\\""
    else
      echo "$arg" >> $dir/starts; printf %s "$arg" > $dir/node; changed=true
    fi ;;
  drain) [ -e $dir/node ] && changed=true; : ;;
  stop) [ -e $dir/node ] && changed=true; rm -f $dir/node $dir/gone ;;
  quarantine) cat > $dir/new && mv $dir/new $dir/quarantine ;;
  poweroff) [ -e $dir/node ] && refuse 3 "the node is running" '"running"'; [ -e $dir/zombie ] || touch $dir/off ;;
esac
say
"""

IPMITOOL = """#!/bin/sh
while [ "$1" != "-H" ]; do shift; done
dir=FOLDER/${2#bmc-}
for word; do :; done
. FOLDER/gates
[ -n "$IPMI_PASSWORD" ] || { echo "no password" >&2; exit 1; }
[ -e $dir/bmc-broken ] && { echo "Error: Unable to establish IPMI v2 / RMCP+ session" >&2; exit 1; }
gate power-$word-before
case $word in
  on)
    [ -e $dir/off ] && echo on >> $dir/power
    [ -e $dir/dead ] || rm -f $dir/off ;;
  off) echo off >> $dir/power; touch $dir/off ;;
  status)
    said=on; [ -e $dir/off ] && [ ! -e $dir/liar ] && said=off
    echo "Chassis Power is $said" ;;
esac
gate power-$word-after
exit 0
"""


class FakeHost:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def set(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def clear(self, *names: str) -> None:
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def node(self) -> str:
        return (self.folder / "node").read_text() if self.has("node") else ""


class Lab:
    """A configuration, hosts, and at most one daemon."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, FakeHost] = {}
        self.process: subprocess.Popen[str] | None = None
        self.programs = folder / "programs"
        self.programs.mkdir()
        (folder / "control").mkdir()
        self.write("gates", GATES)
        self.write("agent", AGENT)
        self.program("ssh", SSH.replace("AGENT", f"/bin/sh {folder}/agent"))
        self.program("ipmitool", IPMITOOL)
        self.write("bmc.json", json.dumps({"user": "admin", "password": "secret-word"}), 0o600)
        self.config: dict[str, Any] = {
            "cluster": "test",
            "socket": str(folder / "fleet.sock"),
            "record": str(folder / "record.json"),
            "ssh": {
                "command": [str(self.programs / "ssh")],
                "identity": "/dev/null",
                "known_hosts": "/dev/null",
                "control_dir": "/tmp",
                "status_timeout_s": 3,
            },
            "polling": {"interval_s": 0.2, "away_interval_s": 0.4, "power_interval_s": 0.4},
            "limits": {"backoff_s": 0.5, "backoff_max_s": 2, "quarantine_after": 3},
            "pools": {"gpus": {"max": 10, "gpus": 8, "boot_budget_s": 20, "start_timeout_s": 20, "drain_grace_s": 5}},
            "hosts": {},
        }
        self.client = FleetClient(self.config["socket"])

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.folder / name
        path.write_text(text.replace("FOLDER", str(self.folder)))
        path.chmod(mode)
        return path

    def program(self, name: str, text: str) -> None:
        self.write(f"programs/{name}", text, 0o755)

    def host(self, name: str, *, off: bool = False, bmc: bool = False, **config: Any) -> FakeHost:
        self.hosts[name] = FakeHost(self.folder / name)
        if off:
            self.hosts[name].set("off")
        power = {"kind": "ipmi", "address": f"bmc-{name}", "credentials": str(self.folder / "bmc.json")}
        own = {"address": name, "node_ip": f"192.0.2.{len(self.hosts)}", "pool": "gpus", **config}
        self.config["hosts"][name] = {**own, "power": power} if bmc else own
        return self.hosts[name]

    def start(self) -> None:
        self.launch()
        until(self.answers, "the daemon never answered")

    def launch(self) -> None:
        (self.folder / "fleet.json").write_text(json.dumps(self.config))
        env = {**os.environ, "PATH": f"{self.programs}:{os.environ['PATH']}"}
        log = (self.folder / "log").open("a")
        words = [sys.executable, "-m", "clusterkit.fleet", "--config", str(self.folder / "fleet.json")]
        self.process = subprocess.Popen(words, cwd=ROOT, env=env, stderr=log, text=True)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log
        try:
            self.nodes()
        except (FleetAway, FleetRefused):
            return False
        return True

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(30) == 0, self.log

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def record(self) -> dict[str, Any]:
        found = json.loads((self.folder / "record.json").read_text())
        assert isinstance(found, dict)
        return found

    def create(self, count: int = 1) -> dict[str, Any]:
        return self.client.create("gpus", count, {"ray-user-node-type": "gpus"})

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        return self.client._ask({"verb": verb, **more})

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["host"]: node for node in self.ask("list")["nodes"]}

    def running(self) -> dict[str, str]:
        """Instance by host, of those that Ray is told run."""
        return {name: node["id"] for name, node in self.nodes().items() if node["running"]}

    def state(self, name: str) -> str:
        return str(self.line(name)["state"])

    def line(self, name: str) -> dict[str, Any]:
        return next(host for host in self.client.status()["hosts"] if host["host"] == name)

    def wait_state(self, name: str, state: str) -> dict[str, Any]:
        until(lambda: self.state(name) == state, lambda: f"{name} never became {state}: {self.line(name)}")
        return self.line(name)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    for gate in tmp_path.glob("*/gate-*"):
        gate.unlink()
    if lab.process is not None:
        # Shown where a test failed.
        print(lab.log[-5000:])
        print(*(f"{name}: {host.lines('calls')[-20:]}" for name, host in lab.hosts.items()), sep="\n")
    lab.stop()


# --------------------------------------------------------------------------- the life of a node


def test_a_node_comes_serves_and_goes(lab: Lab) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    answer = lab.create()
    (instance,) = answer["given"]
    assert answer["open"] == 0
    assert lab.nodes()["w1"]["id"] == instance, "listed at once: Ray counts on it from now on"
    until(lambda: lab.running() == {"w1": instance})
    node = lab.nodes()["w1"]
    assert (node["type"], node["ip"], node["tags"]) == ("gpus", "192.0.2.1", {"ray-user-node-type": "gpus"})
    assert w1.node == instance
    assert lab.state("w1") == "busy"
    lab.client.tags(instance, {"more": "said"})
    assert lab.nodes()["w1"]["tags"] == {"ray-user-node-type": "gpus", "more": "said"}

    assert lab.client.terminate([instance, "w9-1"]) == {
        "v": 1,
        "ok": True,
        "terminated": [instance],
        "unknown": ["w9-1"],
    }
    assert lab.nodes() == {}, "Ray's contract: gone as soon as it is asked for"
    until(lambda: not w1.node)
    lab.wait_state("w1", "idle")
    words = [line.split()[0] for line in w1.lines("calls") if line != "status"]
    assert words == ["start", "drain", "stop"], "drained before it is stopped"

    (second,) = lab.create()["given"]
    assert second != instance, "Ray must never see an id again"
    until(lambda: lab.running() == {"w1": second})


def test_a_host_that_is_off_is_switched_on_and_off_again(lab: Lab) -> None:
    lab.config["pools"]["gpus"]["idle_off_s"] = 0.5
    w1 = lab.host("w1", off=True, bmc=True)
    lab.start()
    assert "no answer" not in lab.wait_state("w1", "off")["why"]
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    assert w1.lines("power") == ["on"]
    assert lab.line("w1")["cycles_today"] == 1
    lab.client.terminate([instance])
    until(lambda: w1.has("off"))
    lab.wait_state("w1", "off")
    assert w1.lines("power") == ["on"], "the system goes off by itself: the BMC cuts no power"
    assert lab.line("w1")["since"] is not None


def test_a_system_that_does_not_go_off_is_cut_by_its_bmc(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    # Shorter than the daemon's own patience, which is made for real systems.
    lab.program("sitecustomize.py", "import clusterkit.fleet.actor as a\na.POWER_OFF_S = 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(lab.programs))
    lab.config["pools"]["gpus"]["idle_off_s"] = 0.2
    w1 = lab.host("w1", bmc=True)
    w1.set("zombie")
    lab.start()
    until(lambda: w1.lines("power") == ["off"])
    lab.wait_state("w1", "off")


def test_a_host_that_somebody_switches_on_has_its_whole_idle_time(lab: Lab) -> None:
    lab.config["pools"]["gpus"]["idle_off_s"] = 2
    w1 = lab.host("w1", bmc=True)
    lab.start()
    until(lambda: w1.has("off"))
    lab.wait_state("w1", "off")
    w1.clear("off")
    switched_on = time.time()
    lab.wait_state("w1", "idle")
    until(lambda: w1.has("off"))
    assert time.time() - switched_on >= 2


def test_warm_spares_stay_on(lab: Lab) -> None:
    lab.config["pools"]["gpus"].update(idle_off_s=0.3, warm=1)
    hosts = [lab.host(f"w{n}", bmc=True) for n in range(3)]
    lab.start()
    until(lambda: sum(host.has("off") for host in hosts) == 2)
    on = next(host for host in hosts if not host.has("off"))
    asked = len(on.lines("calls"))
    until(lambda: len(on.lines("calls")) > asked + 5)
    assert not on.has("off")


# --------------------------------------------------------------------------- who is chosen, and who is not


def test_a_host_that_is_on_comes_before_one_that_is_off(lab: Lab) -> None:
    lab.host("a-off", off=True, bmc=True)
    lab.host("z-on", bmc=True)
    lab.start()
    lab.wait_state("a-off", "off")
    lab.wait_state("z-on", "idle")
    lab.create()
    assert set(lab.nodes()) == {"z-on"}


def test_what_cannot_come_now_is_served_when_a_host_comes_free(lab: Lab) -> None:
    w1 = lab.host("w1")
    w1.set("held", "new fan (by kim)")
    lab.start()
    lab.wait_state("w1", "maintenance")
    answer = lab.create(2)
    assert (answer["given"], answer["open"]) == ([], 2)
    assert "in maintenance: new fan (by kim)" in answer["why"]
    assert lab.client.status()["open"][0]["count"] == 2
    assert w1.lines("starts") == []
    w1.clear("held")
    until(lambda: set(lab.running()) == {"w1"})
    (still,) = lab.client.status()["open"]
    assert (still["count"], "is in Ray" in still["why"]) == (1, True)


def test_a_new_autoscaler_ends_the_open_requests_of_the_old_one(lab: Lab) -> None:
    w1 = lab.host("w1")
    w1.set("held", "new fan")
    lab.start()
    lab.wait_state("w1", "maintenance")
    lab.create()
    assert lab.client.status()["open"]
    FleetClient(lab.config["socket"]).nodes()
    assert lab.client.status()["open"] == []


def test_a_request_ends_when_ray_would_ask_again(lab: Lab) -> None:
    lab.config["limits"]["request_s"] = 0.5
    w1 = lab.host("w1")
    w1.set("held", "new fan")
    lab.start()
    lab.create()
    until(lambda: lab.client.status()["open"] == [])


def test_the_same_request_twice_is_one(lab: Lab) -> None:
    lab.host("w1")
    lab.host("w2")
    lab.start()
    lab.wait_state("w1", "idle")
    lab.wait_state("w2", "idle")
    request = {"verb": "create", "session": lab.client.session, "request": "r1", "pool": "gpus", "count": 1, "tags": {}}
    first, second = lab.client._ask(request), lab.client._ask(request)
    assert first["given"] == second["given"]
    assert len(lab.nodes()) == 1
    assert len(lab.client._ask({**request, "request": "r2"})["given"]) == 1
    assert len(lab.nodes()) == 2


def test_the_pool_s_maximum_holds(lab: Lab) -> None:
    lab.config["pools"]["gpus"]["max"] = 1
    for name in ("w1", "w2"):
        lab.host(name)
    lab.start()
    for name in ("w1", "w2"):
        lab.wait_state(name, "idle")
    answer = lab.create(2)
    assert (len(answer["given"]), answer["open"]) == (1, 1)
    assert answer["why"] == "gpus has as many nodes as it may (1)"


def test_only_so_many_are_switched_on_at_once(lab: Lab) -> None:
    lab.config["limits"]["power_ons"] = 1
    hosts = {name: lab.host(name, off=True, bmc=True) for name in ("w1", "w2")}
    for host in hosts.values():
        host.set("gate-power-on-before")
    lab.start()
    for name in hosts:
        lab.wait_state(name, "off")
    answer = lab.create(2)
    assert (len(answer["given"]), answer["open"]) == (1, 1)
    assert "waits for its turn to be switched on" in answer["why"]
    first = next(iter(lab.nodes()))
    hosts[first].clear("gate-power-on-before")
    until(lambda: len(lab.nodes()) == 2)
    assert set(lab.running()) == {first}


def test_a_stale_host_waits_for_its_deploy(lab: Lab) -> None:
    w1 = lab.host("w1", off=True, bmc=True)
    lab.start()
    lab.wait_state("w1", "off")
    assert lab.ask("skip", hosts=["w1"])["changed"]
    assert not lab.ask("skip", hosts=["w1"])["changed"]
    lab.kill()
    lab.start()
    assert "deploy it" in lab.wait_state("w1", "stale")["why"]
    assert lab.create()["given"] == []
    # A deploy that takes it along wakes it, and nothing runs there before it is done.
    lab.ask("reserve", hosts=["w1"], owner="a deploy", seconds=600)
    assert "kept free for a deploy" in lab.wait_state("w1", "idle")["why"]
    assert not w1.has("node")
    assert not lab.ask("free", hosts=["w1"])["changed"]
    assert lab.wait_state("w1", "stale")
    assert lab.ask("free", hosts=["w1"], converged=True)["changed"]
    until(lambda: set(lab.running()) == {"w1"})


def test_a_host_in_maintenance_is_not_switched_on_whatever_is_asked(lab: Lab) -> None:
    lab.host("w1", off=True, bmc=True)
    lab.start()
    lab.wait_state("w1", "off")
    held = {"host": "w1", "owner": "kim", "reason": "new board"}
    assert lab.ask("hold", **held)["changed"]
    assert not lab.ask("hold", **held)["changed"]
    with pytest.raises(FleetRefused, match=r"in maintenance already: new board \(by kim\)"):
        lab.ask("hold", **{**held, "owner": "lee"})
    lab.kill()
    lab.start()
    assert "new board (by kim)" in lab.wait_state("w1", "maintenance")["why"]
    lab.ask("reserve", hosts=["w1"], owner="a deploy", seconds=600)
    answer = lab.create()
    assert answer["given"] == []
    assert "in maintenance: new board (by kim)" in answer["why"]
    assert lab.ask("release", host="w1")["changed"]
    lab.ask("free", hosts=["w1"])
    until(lambda: set(lab.running()) == {"w1"})


def test_a_host_that_was_held_when_it_went_off_stays_held(lab: Lab) -> None:
    """Its agent alone knew; the daemon is another one when the host is off."""
    w1 = lab.host("w1", bmc=True)
    w1.set("held", "new fan")
    lab.start()
    lab.wait_state("w1", "maintenance")
    until(lambda: lab.record["hosts"]["w1"]["held"], "it was not noted")
    w1.set("off")
    lab.kill()
    lab.start()
    assert lab.wait_state("w1", "maintenance")["why"] == "in maintenance: new fan"
    assert lab.create()["given"] == []
    assert not w1.has("power")
    # Somebody switches it on and has released it there.
    w1.clear("held")
    w1.clear("off")
    until(lambda: set(lab.running()) == {"w1"})


def test_a_host_that_was_switched_on_too_often_today_stays_as_it_is(lab: Lab) -> None:
    lab.config["limits"]["cycles_per_day"] = 1
    lab.config["pools"]["gpus"]["idle_off_s"] = 0.2
    w1 = lab.host("w1", off=True, bmc=True)
    lab.start()
    lab.wait_state("w1", "off")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    lab.client.terminate([instance])
    lab.wait_state("w1", "idle")
    asked = len(w1.lines("calls"))
    until(lambda: len(w1.lines("calls")) > asked + 8)
    assert not w1.has("off"), "it could not be switched on again"
    w1.set("off")
    assert "switched on 1 times within a day" in until(
        lambda: lab.line("w1")["why"] if lab.state("w1") == "off" else ""
    )
    assert lab.create()["given"] == []


# --------------------------------------------------------------------------- what goes wrong


def test_one_hung_host_delays_nobody(lab: Lab) -> None:
    hung, well = lab.host("hung"), lab.host("well")
    lab.start()
    lab.wait_state("hung", "idle")
    hung.set("hang")
    line = lab.wait_state("hung", "unreachable")
    assert "no answer to status in 3 s" in line["why"]
    began, asked = time.monotonic(), len(well.lines("calls"))
    until(lambda: len(well.lines("calls")) > asked + 5)
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"well": instance})
    assert time.monotonic() - began < PATIENCE_S / 2
    hung.clear("hang")
    lab.wait_state("hung", "idle")


def test_a_host_that_refuses_ssh_says_so(lab: Lab) -> None:
    lab.host("w1").set("refuse")
    lab.start()
    line = lab.wait_state("w1", "unreachable")
    assert "Permission denied" in line["why"]
    assert "nothing can switch it on" in line["why"]
    assert lab.create()["given"] == []


def test_a_node_that_does_not_start_gives_way_to_another_host_and_is_quarantined_in_the_end(lab: Lab) -> None:
    sick = lab.host("a-sick")
    sick.set("broken")
    well = lab.host("b-well")
    well.set("held", "new fan")
    lab.start()
    lab.wait_state("a-sick", "idle")
    lab.wait_state("b-well", "maintenance")
    (first,) = lab.create()["given"]
    assert first.startswith("a-sick-")
    until(lambda: lab.nodes() == {}, "Ray hears that it is gone")
    well.clear("held")
    lab.wait_state("b-well", "idle")
    until(lambda: "tried again from" in lab.line("a-sick")["why"] or lab.state("a-sick") == "draining")
    lab.create()
    until(lambda: set(lab.running()) == {"b-well"})
    # Nobody else is left: it is tried again, and again, and then no more.
    until(lambda: lab.create()["open"] >= 0 and sick.has("quarantine"))
    told = json.loads((sick.folder / "quarantine").read_text())
    assert told["owner"] == "fleet"
    assert "failed 3 times in a row; last: start: the node did not come up: no memory" in told["reason"]
    assert told["findings"][0]["check"] == "fleet"
    lab.wait_state("a-sick", "quarantined")
    starts = sum(line.startswith("start ") for line in sick.lines("calls"))
    assert starts == 3
    sick.clear("quarantine", "broken")
    until(lambda: "a-sick" in lab.running())


def test_a_host_that_misses_its_boot_budget_is_quarantined_and_another_takes_its_place(lab: Lab) -> None:
    lab.config["pools"]["gpus"]["boot_budget_s"] = 4
    dead = lab.host("a-dead", off=True, bmc=True)
    dead.set("dead")
    lab.host("b-well", off=True, bmc=True)
    lab.start()
    for name in lab.hosts:
        lab.wait_state(name, "off")
    (first,) = lab.create()["given"]
    assert first.startswith("a-dead-")
    line = lab.wait_state("a-dead", "quarantined")
    assert "did not boot in 4 s" in line["why"]
    assert "No route to host" in line["why"]
    until(lambda: set(lab.running()) == {"b-well"})
    assert lab.create()["given"] == []
    # It comes up after all: from now on its own agent keeps it out.
    dead.clear("off")
    until(lambda: dead.has("quarantine"))
    assert lab.wait_state("a-dead", "quarantined")["why"].startswith("in quarantine")
    assert dead.lines("starts") == []


def test_a_release_forgets_what_the_daemon_held_against_a_host(lab: Lab) -> None:
    lab.config["pools"]["gpus"]["boot_budget_s"] = 1
    dead = lab.host("w1", off=True, bmc=True)
    dead.set("dead")
    lab.start()
    lab.wait_state("w1", "off")
    lab.create()
    lab.wait_state("w1", "quarantined")
    assert lab.ask("release", host="w1")["changed"] is True
    assert lab.ask("release", host="w1")["changed"] is False
    lab.wait_state("w1", "off")
    dead.clear("dead")
    lab.create()
    until(lambda: set(lab.running()) == {"w1"})


def test_a_bmc_that_fails_and_one_that_lies(lab: Lab) -> None:
    lab.host("w1", off=True, bmc=True).set("bmc-broken")
    lab.host("w2", off=True, bmc=True).set("liar")
    lab.start()
    line = lab.wait_state("w2", "unreachable")
    assert "the BMC says that it is on" in line["why"]
    lab.wait_state("w1", "off")
    lab.create()
    line = until(lambda: lab.line("w1") if lab.line("w1")["failures"] else None)
    assert "cannot be switched on: ipmitool: Error: Unable to establish IPMI" in line["why"]
    assert "secret-word" not in json.dumps(lab.client.status()) + lab.log + json.dumps(lab.record)


def test_a_host_that_goes_silent_keeps_its_node_for_ray_to_judge(lab: Lab) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    w1.set("hang")
    line = lab.wait_state("w1", "unreachable")
    assert instance in line["why"]
    assert lab.nodes()["w1"]["id"] == instance, "it may still serve"
    # Ray has seen its raylet die: gone for Ray at once, and stopped as soon as it answers.
    lab.client.terminate([instance])
    assert lab.nodes() == {}
    assert "does not answer and is asked again" in until(
        lambda: lab.line("w1")["why"] if "asked again" in lab.line("w1")["why"] else ""
    )
    assert w1.node == instance
    w1.clear("hang")
    until(lambda: not w1.node)
    lab.wait_state("w1", "idle")


@pytest.mark.parametrize(("what", "listed"), [("gone", False), ("sick", True)])
def test_only_a_raylet_that_is_certainly_gone_is_dropped(lab: Lab, what: str, listed: bool) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    lab.client.nodes()  # Ray has heard of it, and would ask again
    w1.set(what)
    if listed:
        line = until(lambda: lab.line("w1") if "not healthy" in lab.line("w1")["why"] else None)
        assert line["state"] == "busy"
        assert lab.nodes()["w1"]["id"] == instance
        assert w1.node == instance
    else:
        until(lambda: lab.nodes() == {})
        until(lambda: not w1.node, "what the drain left was not cleared away")
        lab.wait_state("w1", "idle")


def test_a_node_that_somebody_else_started_is_ray_s_too(lab: Lab) -> None:
    w1 = lab.host("w1")
    w1.set("node", "w1-by-hand")
    lab.start()
    assert until(lab.running) == {"w1": "w1-by-hand"}
    w1.set("node", "w1-again")
    until(lambda: lab.running() == {"w1": "w1-again"})
    assert w1.lines("starts") == []


def test_a_request_meets_a_node_that_started_meanwhile(lab: Lab) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    w1.set("gate-start-before")
    (promised,) = lab.create()["given"]
    until(lambda: w1.has("at-start-before"))
    w1.set("node", "w1-by-hand")
    w1.clear("gate-start-before")
    until(lambda: lab.running() == {"w1": "w1-by-hand"})
    assert promised != "w1-by-hand"
    assert w1.lines("starts") == []


@pytest.mark.parametrize("seen", [True, False])
def test_a_promise_that_breaks_before_ray_has_heard_of_it_is_kept_by_another_host(lab: Lab, seen: bool) -> None:
    """Ray asks again for what it had in a list and misses; for the rest it would wait for ten minutes."""
    w1, w2 = lab.host("w1"), lab.host("w2")
    w2.set("held", "new fan")
    lab.start()
    lab.wait_state("w1", "idle")
    lab.wait_state("w2", "maintenance")
    w1.set("gate-start-before")
    assert lab.create()["open"] == 0
    if seen:
        lab.client.nodes()
    until(lambda: w1.has("at-start-before"))
    w1.set("held", "new disk")
    w1.clear("gate-start-before")
    lab.wait_state("w1", "maintenance")
    assert len(lab.client.status()["open"]) == (0 if seen else 1)
    w2.clear("held")
    if seen:
        lab.wait_state("w2", "idle")
        assert lab.nodes() == {}
    else:
        until(lambda: set(lab.running()) == {"w2"})


def test_a_node_that_is_let_go_while_it_starts_is_stopped(lab: Lab) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    w1.set("gate-start-after")
    (instance,) = lab.create()["given"]
    until(lambda: w1.node == instance)
    lab.client.terminate([instance])
    w1.clear("gate-start-after")
    until(lambda: not w1.node)
    lab.wait_state("w1", "idle")
    assert lab.nodes() == {}


def test_a_host_that_is_let_go_while_it_boots_is_idle_then(lab: Lab) -> None:
    w1 = lab.host("w1", off=True, bmc=True)
    w1.set("gate-power-on-before")
    lab.start()
    lab.wait_state("w1", "off")
    (instance,) = lab.create()["given"]
    until(lambda: w1.has("at-power-on-before"))
    lab.client.terminate([instance])
    w1.clear("gate-power-on-before")
    lab.wait_state("w1", "idle")
    assert w1.lines("starts") == []


# --------------------------------------------------------------------------- restarts


STEPS = ["power-on-before", "power-on-after", "start-before", "start-after"]


@pytest.mark.parametrize("step", [*STEPS, "booting", "at once"])
def test_killed_at_any_step_of_a_create_the_next_daemon_goes_on(lab: Lab, step: str) -> None:
    w1 = lab.host("w1", off=True, bmc=True)
    lab.host("w2", off=True, bmc=True)
    lab.start()
    lab.wait_state("w1", "off")
    lab.wait_state("w2", "off")
    if step == "booting":
        w1.set("dead")
    elif step != "at once":
        w1.set(f"gate-{step}")
    (instance,) = lab.create()["given"]
    if step in STEPS:
        until(lambda: w1.has(f"at-{step}"))
    elif step == "booting":
        until(lambda: "booting" in lab.line("w1")["why"])
    lab.kill()
    w1.clear(f"gate-{step}", "dead")
    if step == "booting":
        w1.clear("off")
    lab.start()
    assert lab.nodes()["w1"]["id"] == instance, "what Ray was promised is kept"
    until(lambda: lab.running() == {"w1": instance})
    assert w1.lines("starts") == [instance], "it was started once"
    assert lab.line("w1")["cycles_today"] == 1
    lab.wait_state("w2", "off")


@pytest.mark.parametrize("step", ["drain-before", "drain-after", "stop-before", "stop-after"])
def test_killed_at_any_step_of_a_terminate_nothing_leaks(lab: Lab, step: str) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    w1.set(f"gate-{step}")
    lab.client.terminate([instance])
    until(lambda: w1.has(f"at-{step}"))
    lab.kill()
    w1.clear(f"gate-{step}")
    lab.start()
    assert lab.nodes() == {}
    lab.wait_state("w1", "idle")
    assert not w1.node


def test_killed_before_it_answered_the_same_request_finds_what_it_was_given(lab: Lab) -> None:
    for name in ("w1", "w2"):
        lab.host(name)
    lab.start()
    for name in ("w1", "w2"):
        lab.wait_state(name, "idle")
    request = {"verb": "create", "session": lab.client.session, "request": "r1", "pool": "gpus", "count": 1, "tags": {}}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(lab.config["socket"])
        connection.sendall(json.dumps({"v": 1, **request}).encode() + b"\n")
        until(lambda: lab.record["wants"])
        lab.kill()
    lab.start()
    answer = lab.client._ask(request)
    assert len(answer["given"]) == 1
    until(lambda: list(lab.running().values()) == answer["given"])
    assert len(lab.nodes()) == 1
    assert sum(len(host.lines("starts")) for host in lab.hosts.values()) == 1


def test_after_a_restart_a_host_that_is_silent_keeps_its_node(lab: Lab) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    lab.stop()
    w1.set("hang")
    lab.start()
    assert lab.nodes()["w1"]["id"] == instance, "an empty list would make Ray forget a host that may serve"


def test_without_a_record_nothing_is_listed_until_every_host_was_asked(lab: Lab) -> None:
    w1 = lab.host("w1")
    w1.set("node", "w1-1")
    w1.set("gate-status-before")
    lab.launch()
    until(lambda: w1.has("at-status-before"))
    with pytest.raises(FleetRefused, match="have not been asked yet") as refused:
        lab.client.nodes()
    assert refused.value.code == "not_now"
    until(lambda: (lab.folder / "record.json").exists())
    lab.kill()
    # The record exists by now, and still says that it is not the whole truth.
    w1.clear("gate-status-before")
    lab.start()
    assert lab.running() == {"w1": "w1-1"}


def test_a_record_that_is_broken_stops_the_daemon(lab: Lab) -> None:
    lab.host("w1")
    (lab.folder / "record.json").write_text("{")
    (lab.folder / "fleet.json").write_text(json.dumps(lab.config))
    words = [sys.executable, "-m", "clusterkit.fleet", "--config", str(lab.folder / "fleet.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot read the record" in done.stderr
    assert ".bad" in done.stderr


def test_a_record_that_cannot_be_written_holds_everything_up(lab: Lab) -> None:
    """A full disk: nothing is done that could be forgotten."""
    w1 = lab.host("w1")
    records = lab.folder / "records"
    records.mkdir()
    lab.config["record"] = str(records / "record.json")
    lab.start()
    lab.wait_state("w1", "idle")
    records.rename(lab.folder / "away")
    with pytest.raises(FleetRefused, match="cannot be written") as refused:
        lab.create()
    assert refused.value.code == "not_now"
    assert (lab.nodes(), w1.lines("starts")) == ({}, [])
    assert "cannot be written" in lab.ask("status")["trouble"]
    (lab.folder / "away").rename(records)
    # It finds out by itself.
    until(lambda: lab.ask("status")["trouble"] is None)
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})


def test_a_clock_that_jumps_ends_no_boot_before_its_time(lab: Lab) -> None:
    w1 = lab.host("w1", off=True, bmc=True)
    w1.set("dead")
    lab.start()
    lab.wait_state("w1", "off")
    (instance,) = lab.create()["given"]
    until(lambda: "booting" in lab.line("w1")["why"])
    lab.kill()
    record = lab.record
    record["hosts"]["w1"]["since"] -= 86400
    (lab.folder / "record.json").write_text(json.dumps(record))
    lab.start()
    asked = len(w1.lines("calls"))
    until(lambda: len(w1.lines("calls")) > asked + 2)
    assert lab.state("w1") == "booting"
    w1.clear("off", "dead")
    until(lambda: lab.running() == {"w1": instance})


# --------------------------------------------------------------------------- the socket


def ask(lab: Lab, line: bytes) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(lab.config["socket"])
        connection.sendall(line)
        found = json.loads(connection.makefile("rb").readline())
        assert isinstance(found, dict)
        return found


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"nonsense\n", "request"),
        (b"[]\n", "request"),
        (b'{"v": 2, "verb": "list"}\n', "version"),
        (b'{"verb": "list"}\n', "version"),
        (b'{"v": 1, "verb": "reboot"}\n', "request"),
        (b'{"v": 1, "verb": "list", "session": 1}\n', "request"),
        (b'{"v": 1, "verb": "terminate", "ids": "all"}\n', "request"),
        (b'{"v": 1, "verb": "create", "request": "r", "session": "s", "pool": "gpus", "count": 0}\n', "request"),
        (b'{"v": 1, "verb": "create", "request": "r", "session": "s", "pool": "gpus", "count": true}\n', "request"),
        (b'{"v": 1, "verb": "create", "request": "r", "session": "s", "pool": "none", "count": 1}\n', "failed"),
        (b'{"v": 1, "verb": "tags", "id": "w9-1", "tags": {}}\n', "failed"),
        (b'{"v": 1, "verb": "tags", "id": "w9-1", "tags": {"a": 1}}\n', "request"),
    ],
)
def test_a_wrong_request_is_told(lab: Lab, line: bytes, code: str) -> None:
    lab.host("w1")
    lab.start()
    answer = ask(lab, line)
    assert (answer["ok"], answer["code"], answer["v"]) == (False, code, 1)
    assert answer["error"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_only_ray_s_user_and_root_may_speak(lab: Lab) -> None:
    lab.host("w1")
    # pytest's own folders are closed to everybody else.
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    folder.chmod(0o755)
    path = folder / "fleet.sock"
    lab.config.update(users=[65534], socket_group="nogroup", socket=str(path))
    lab.client.path = str(path)
    lab.start()
    assert path.stat().st_mode & 0o777 == 0o660
    assert path.stat().st_gid == 65534
    speak = (
        "import socket, sys; c = socket.socket(socket.AF_UNIX); c.connect(sys.argv[1]); "
        'c.sendall(b\'{"v": 1, "verb": "%s", "host": "w1"}\\n\'); print(c.makefile().readline())'
    )

    def say(user: int, verb: str) -> str:
        words = ["/usr/bin/python3", "-c", speak % verb, str(path)]
        done = subprocess.run(words, user=user, group=65534, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    assert '"ok": true' in say(65534, "status")
    assert "only root holds, reserves and releases hosts" in say(65534, "release")
    path.chmod(0o666)
    assert "this user may not speak to the fleet" in say(12345, "status")
    shutil.rmtree(folder)


def test_a_second_daemon_leaves_the_first_alone(lab: Lab) -> None:
    lab.host("w1")
    lab.start()
    words = [sys.executable, "-m", "clusterkit.fleet", "--config", str(lab.folder / "fleet.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another daemon answers" in done.stderr
    assert lab.answers()


def test_a_wrong_configuration_is_told_at_once(lab: Lab) -> None:
    lab.host("w1", pool="none")
    lab.config["pools"]["gpus"]["boot_budget_s"] = 0
    path = lab.folder / "fleet.json"
    path.write_text(json.dumps(lab.config))
    words = [sys.executable, "-m", "clusterkit.fleet", "--config", str(path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pools.gpus.boot_budget_s" in done.stderr
    assert "Traceback" not in done.stderr


# --------------------------------------------------------------------------- with the real agent


LAUNCHER = """
folder=$(dirname $0) word=$3
echo "$word" >> $folder/launcher-calls
[ $word = start ] && sed s/.*=// $folder/instance.env | tr -d '\\n' > $folder/node
[ $word = stop ] && rm -f $folder/node
if [ -e $folder/node ]; then
  printf '{"state": "running", "reason": null, "instance_id": "%s", ' "$(cat $folder/node)"
  echo '"changed": true, "drained": true}'
else
  echo '{"state": "stopped", "reason": "stopped", "instance_id": null, "changed": false, "drained": true}'
fi
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="the agent's `remote` goes by sudo for anybody else")
def test_with_the_real_agent_behind_its_forced_command(lab: Lab) -> None:
    """`ssh` is pretended; what it runs is what sshd would: `host-agent remote`, with the words in the environment."""
    agent = ROOT / "roles/host_agent/files/host-agent"
    lab.write(
        "agent",
        f'dir=$1; shift; SSH_ORIGINAL_COMMAND="$*" exec {PYTHON} {agent} --config $dir/host-agent.json remote\n',
    )
    w1 = lab.host("w1")
    w1.set("launcher", LAUNCHER)
    w1.set("generation", "g1\n")
    config = {name: str(w1.folder / name) for name in ("launcher", "launcher_config", "record", "instance_env")}
    config.update(python="/bin/sh", generation_file=str(w1.folder / "generation"))
    config.update(record=str(w1.folder / "host.json"), instance_env=str(w1.folder / "instance.env"))
    w1.set("host-agent.json", json.dumps(config))
    lab.config["ssh"]["status_timeout_s"] = 20
    lab.start()
    lab.wait_state("w1", "idle")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    assert json.loads((w1.folder / "host.json").read_text())["instance_id"] == instance
    lab.client.terminate([instance])
    lab.wait_state("w1", "idle")
    calls = [word for word in w1.lines("launcher-calls") if word != "status"]
    assert calls == ["start", "drain", "stop"]
    w1.set("host.json", json.dumps({"maintenance": {"owner": "kim", "reason": "new fan"}}))
    assert "new fan (by kim)" in lab.wait_state("w1", "maintenance")["why"]
    assert lab.create()["given"] == []


def test_the_daemon_ends_when_it_is_told_to_and_leaves_nodes_alone(lab: Lab) -> None:
    w1 = lab.host("w1")
    lab.start()
    lab.wait_state("w1", "idle")
    (instance,) = lab.create()["given"]
    until(lambda: lab.running() == {"w1": instance})
    assert lab.process is not None
    lab.process.send_signal(signal.SIGTERM)
    assert lab.process.wait(30) == 0
    assert w1.node == instance
    with pytest.raises(FleetAway):
        lab.client.nodes()
