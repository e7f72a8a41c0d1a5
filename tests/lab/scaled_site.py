"""A lab whose workers come and go: system containers with BMCs of their own, in a pool that is autoscaled from zero.

Ray is real, and so are sshd, the agent, the daemon and the Redfish library; the BMCs are OpenStack's emulator, whose
systems are the containers (bmc.py). GPUs are declared as CPUs: a host has two, whatever this machine has.
"""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import requests
import yaml

from tests import support
from tests.lab.conftest import ENVIRONMENT, Cluster, Maker
from tests.support import ROOT

USER = "clusterkit"
PATIENCE_S = 240.0
SITE_FILE = "group_vars/all/scaled.yml"
POOL = {
    "mode": "autoscaled",
    "min": 0,
    "boot_budget_s": 90,
    "drain_grace_s": 60,
    "idle_off_s": 20,
    "idle_watts": 1000,
}
ASK = """\
import json, socket, sys
with socket.socket(socket.AF_UNIX) as line:
    line.connect("/run/clusterkit/fleet/fleet.sock")
    line.sendall(json.dumps({"v": 1, **json.loads(sys.argv[1])}).encode() + b"\\n")
    print(line.makefile().readline())
"""
# Runs where Ray runs. Each task takes a host of its own.
WORK = """\
import sys, time
import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=2, max_retries=0)
def work(seconds):
    time.sleep(seconds)
    return ray.util.get_node_ip_address()

count, seconds = int(sys.argv[1]), float(sys.argv[2])
group = placement_group([{"CPU": 2}] * count, strategy="STRICT_SPREAD")
own = work.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group))
print(*sorted(ray.get([own.remote(seconds) for _ in range(count)])))
"""


def until(condition: Callable[[], Any], what: Callable[[], object], patience_s: float = PATIENCE_S) -> Any:
    return support.until(condition, what, patience_s, pause_s=0.5)


@dataclass
class Work:
    """Tasks that want hosts."""

    process: subprocess.Popen[str]
    why_not: Callable[[], str]

    def done(self) -> list[str]:
        """Addresses of the hosts that did it."""
        try:
            out, err = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            pytest.fail(self.why_not())
        assert self.process.returncode == 0, err[-3000:]
        # Ray's own warnings come before.
        return out.splitlines()[-1].split()


@dataclass
class ScaledSite:
    lab: Cluster
    bmcs: Path
    works: list[Work] = field(default_factory=list)

    @property
    def inventory(self) -> Path:
        return self.lab.inventory

    def declare(self, **variables: Any) -> None:
        """Other values of the site's."""
        path = self.inventory / SITE_FILE
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **variables}))

    def ask(self, verb: str, **more: Any) -> dict[str, Any]:
        """As root on the head, without the kit."""
        words, text = json.dumps({"verb": verb, **more}), ""
        # An exec of a busy Docker gives no output now and then; each of these words may be said twice.
        while not text:
            code, output = self.lab.container("head").exec_run(["python3", "-c", ASK, words])
            text = output.decode(errors="replace").strip()
            assert code == 0, text
        found: dict[str, Any] = json.loads(text)
        return found

    def host(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = next(host for host in self.ask("status")["hosts"] if host["host"] == name)
        return found

    def states(self) -> dict[str, str]:
        return {host["host"]: host["state"] for host in self.ask("status")["hosts"]}

    def wait(self, name: str, *states: str) -> dict[str, Any]:
        until(lambda: self.host(name)["state"] in states, lambda: f"never {states}: {self.host(name)}\n{self.log()}")
        return self.host(name)

    def wait_for(self, **states: str) -> None:
        def there() -> bool:
            off = [host for host, state in states.items() if state == "off"]
            done = all(self.is_off(host) and self.host(host)["phase"] is None for host in off)
            return done and states.items() <= self.states().items()

        until(there, lambda: f"never {states}: {self.told()}\n{self.log()}")

    def told(self) -> str:
        return "\n".join(f"{host['host']}: {host['state']}, {host['why']}" for host in self.ask("status")["hosts"])

    def log(self) -> str:
        monitor = "tail -n 40 /var/lib/clusterkit/ray/session_latest/logs/monitor.* 2>&1"
        return self.lab.on("head", f"journalctl -q -u clusterkit-fleet -n 60 --no-pager; {monitor}", check=False)

    def work(self, count: int, seconds: float) -> Work:
        """Begins tasks in the head's own Ray; each wants a host of its own."""
        container = self.lab.container("head").id
        inside = 'exec docker exec "$(docker ps -q --filter name=clusterkit)" python3 -c "$0" "$@"'
        words = ["docker", "exec", container, "sh", "-c", inside, WORK, str(count), str(seconds)]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun = Work(process, lambda: f"{self.told()}\n{self.log()}")
        self.works.append(begun)
        return begun

    def address(self, host: str) -> str:
        found: dict[str, Any] = self.lab.container(host).attrs["NetworkSettings"]["Networks"]
        return str(next(iter(found.values()))["IPAMConfig"]["IPv4Address"])

    def is_off(self, host: str) -> bool:
        return bool(self.lab.container(host).status == "exited")

    @contextmanager
    def fault(self, host: str, what: str) -> Iterator[None]:
        (self.bmcs / host).write_text(what)
        try:
            yield
        finally:
            (self.bmcs / host).unlink()

    def nodes(self) -> list[str]:
        """Hosts that Ray counts as alive, the head left out."""
        return sorted(node["host"] for node in self.lab.status()["nodes"] if node["alive"] and node["host"] != "head")


@contextmanager
def scaled_site(lab_of: Maker, folder: Path, name: str, workers: int, **more: Any) -> Iterator[ScaledSite]:
    """`more`: variables of the site, besides."""
    lab = lab_of(name, "--workers", str(workers))
    networks = lab.container("head").attrs["NetworkSettings"]["Networks"]
    gateway = next(iter(networks.values()))["Gateway"]
    bmcs = folder / "bmcs"
    bmcs.mkdir()
    password = secrets.token_urlsafe(12)
    (bmcs / "htpasswd").write_text(f"{USER}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n")
    support.certificate(bmcs, "bmc", gateway)
    with socket.socket() as free:
        free.bind((gateway, 0))
        port = free.getsockname()[1]
    hosts = {
        f"worker{number}": {
            "clusterkit_power": {
                "kind": "redfish",
                "address": f"https://{gateway}:{port}",
                "system": f"/redfish/v1/Systems/worker{number}",
            }
        }
        for number in range(1, workers + 1)
    }
    # Passwords belong into a vault; this one is of a lab, and gone with it.
    site = {
        # A day of a site passes in minutes here.
        "clusterkit_autoscaler": {"idle_timeout_s": 15, "cycles_per_day": 1000},
        "fleet_bmc_credentials": {"default": {"user": USER, "password": password}},
        "fleet_bmc_ca": str(bmcs / "crt"),
        **more,
    }
    pool = {"vars": {"clusterkit_pool": POOL}, "hosts": hosts}
    files = {"scaled.yml": {"all": {"children": {"cpu_pool": pool}}}, SITE_FILE: site}
    for path, data in files.items():
        (lab.inventory / path).write_text(yaml.safe_dump(data))
    words = ["-m", "tests.lab.bmc", "--lab", name, "--listen", gateway, "--port", str(port), "--folder", str(bmcs)]
    with (folder / "bmc.log").open("w") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log)
    made = ScaledSite(lab, bmcs)
    try:
        until(lambda: process.poll() is not None or answers(f"https://{gateway}:{port}/redfish/v1", bmcs), tuple)
        assert process.poll() is None, (folder / "bmc.log").read_text()
        yield made
    finally:
        for begun in made.works:
            begun.process.kill()
        process.terminate()
        process.wait()
        for path in files:
            (lab.inventory / path).unlink(missing_ok=True)


def answers(url: str, folder: Path) -> bool:
    try:
        return requests.get(url, verify=str(folder / "crt"), timeout=5).ok
    except requests.RequestException:
        return False
