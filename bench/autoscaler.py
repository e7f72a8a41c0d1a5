"""From a task that has no place to the task that runs, and from an idle host to one that is off.

python -m bench.autoscaler     makes labs of its own, and takes them away

Ours: the daemon, the agent and the provider on a lab whose worker has a BMC (OpenStack's emulator); once with the
host on, once with it off. A system container boots in seconds, so the boot stands apart. Beside it Ray's own provider
`local`, which can only have hosts that are on; it runs with Ray's older autoscaler, as bench.ray_up says. Both ask
Ray's autoscaler every five seconds, its default.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

from bench import ray_up
from bench.common import BIN, clusterkit, run, table
from clusterkit.spec.stacks import table as stacks
from tests.lab.conftest import Cluster
from tests.lab.scaled_site import ScaledSite, scaled_site, until

NAME = "benchscaled"
IDLE_S = 15
# Runs on the head, where Ray's own words about a node come first.
DEMAND = """\
import json, time
import ray
ray.init(address="auto", log_to_driver=False)

@ray.remote(num_cpus=2, max_retries=0)
def work():
    return time.time()

def alive():
    return sum(node["Alive"] for node in ray.nodes())

before, asked = alive(), time.time()
task = work.remote()
while alive() <= before and time.time() < asked + %d:
    time.sleep(0.05)
joined = time.time()
came = alive() > before
print(json.dumps({"joined": joined - asked, "ran": ray.get(task) - asked} if came else {}))
"""
# No boot of the lab takes so long.
PATIENCE_S = 180


def main() -> None:
    title = f"Seconds from a task without a place to its run, and back (idle_timeout {IDLE_S} s on both)"
    heads = ["what", "of it boot", "node alive", "task runs", "idle node stopped", "host off"]
    rows = ours()
    # Now, too: what comes next may fail.
    table(title, heads, rows)
    table(title, heads, [*rows, rival()])


def ours() -> list[list[object]]:
    labs: list[Cluster] = []

    def lab_of(name: str, *words: str) -> Cluster:
        folder = Path(kept) / "inventory"
        labs.append(Cluster(name, folder))
        clusterkit("lab", "up", "--name", name, "--inventory", str(folder), *words)
        return labs[-1]

    with tempfile.TemporaryDirectory() as kept:
        try:
            with scaled_site(lab_of, Path(kept), NAME, 1, clusterkit_apps=[]) as site:
                run(str(BIN / "ansible-playbook"), "site.yml", "-i", str(site.inventory))
                site.wait_for(worker1="off")
                off = measured(site, "clusterkit, host off")
                site.ask("reserve", hosts=["worker1"], owner="bench", seconds=300)
                site.wait("worker1", "idle")
                site.ask("free", hosts=["worker1"])
                return [measured(site, "clusterkit, host on"), off]
        finally:
            for lab in labs:
                clusterkit("lab", "down", "--name", lab.name, "--inventory", str(lab.inventory))


def measured(site: ScaledSite, what: str) -> list[object]:
    container = site.lab.container("head").id
    inside = 'exec docker exec "$(docker ps -q --filter name=clusterkit)" python3 -c "$0"'
    with subprocess.Popen(
        ["docker", "exec", container, "sh", "-c", inside, DEMAND % PATIENCE_S], stdout=subprocess.PIPE, text=True
    ) as driver:
        booting = 0.0
        began = last = time.monotonic()
        while driver.poll() is None:
            state, now = site.host("worker1")["state"], time.monotonic()
            booting += (now - last) * (state == "booting")
            last = now
            if now - began > 300:
                raise SystemExit(f"the task never ran: {site.told()}\n{site.log()}")
            time.sleep(0.1)
        assert driver.stdout is not None
        took = json.loads(driver.stdout.read().splitlines()[-1])
    ended = time.monotonic()
    site.wait("worker1", "idle", "off")
    stopped = time.monotonic() - ended
    until(lambda: site.is_off("worker1"), site.told)
    gone = time.monotonic() - ended
    site.wait_for(worker1="off")
    return [what, f"{booting:.1f}", f"{took['joined']:.1f}", f"{took['ran']:.1f}", f"{stopped:.1f}", f"{gone:.1f}"]


def rival() -> list[object]:
    """`ray up` with no worker wanted; then the same task. Its hosts are never switched off."""
    name = f"{NAME}-rival"
    row = stacks().get("cpu")
    assert row is not None
    with tempfile.TemporaryDirectory() as folder:
        inventory = Path(folder) / "inventory"
        words = ["--name", name, "--inventory", str(inventory)]
        try:
            clusterkit("lab", "up", "--workers", "1", "--runtime", "venv", *words)
            run(str(BIN / "ansible-playbook"), "site.yml", "-i", str(inventory), "--tags", "baseline,ray_env")
            ray_up.ad_hoc(inventory, "ansible.builtin.apt", "name=rsync state=present")
            with ray_up.started(Path(folder), inventory, row.ray, minimum=0, maximum=1, idle_minutes=IDLE_S / 60):
                said = ray_up.on_head(inventory, DEMAND % PATIENCE_S).splitlines()
                took = json.loads(next(line for line in said if line.startswith("{")))
                if not took:
                    # Its node type has no resources before a host of it has come (seen with ray 2.60.0: "could not
                    # find a node type to satisfy the request").
                    return ["ray up (local), host on", "", f"not in {PATIENCE_S} s", "", "", "never"]
                ended = time.monotonic()
                while ray_up.alive(inventory) > 1:
                    if time.monotonic() - ended > 300:
                        raise SystemExit("ray up: the idle worker never went")
                    time.sleep(0.5)
                stopped = f"{time.monotonic() - ended:.1f}"
        finally:
            clusterkit("lab", "down", *words)
    return ["ray up (local), host on", "", f"{took['joined']:.1f}", f"{took['ran']:.1f}", stopped, "never"]


if __name__ == "__main__":
    main()
