"""The rival for the Ray part: `ray up` with the provider `local`, on the same hosts, with the same Ray.

python -m bench.ray_up     makes a lab of three with the venv runtime, and takes it away

Both begin with hosts that have Ray installed and do not run it, and end when three nodes are alive. `ray up` needs
Ray on the controller (a throw-away environment is made) and rsync on every host. It runs with Ray's older autoscaler:
with the newer one, its default in 2.60.0, it brought one of two workers of this provider and asked for the other for
ever. Each run has a cluster name of its own: the provider remembers in /tmp/ray of the controller what it once set up
under a name, and sends new hosts of that name nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bench.common import BIN, ENVIRONMENT, clusterkit, run, seconds, table
from clusterkit.spec.stacks import table as stacks

NAME = "benchrival"
RAY = "/opt/clusterkit/ray-env/bin/ray"
PYTHON = "/opt/clusterkit/ray-env/bin/python"


def main() -> None:
    row = stacks().get("cpu")
    assert row is not None
    with tempfile.TemporaryDirectory() as folder:
        inventory = Path(folder) / "inventory"
        words = ["--name", NAME, "--inventory", str(inventory)]
        playbook = str(BIN / "ansible-playbook")
        try:
            clusterkit("lab", "up", "--workers", "2", "--runtime", "venv", *words)
            run(playbook, "site.yml", "-i", str(inventory), "--tags", "baseline,host_agent,ray_env,model_store")
            ad_hoc(inventory, "ansible.builtin.apt", "name=rsync state=present")
            ours = seconds(lambda: run(playbook, "playbooks/ray.yml", "-i", str(inventory)))
            again = seconds(lambda: run(playbook, "playbooks/ray.yml", "-i", str(inventory)))
            ad_hoc(inventory, "ansible.builtin.command", "/opt/clusterkit/bin/host-agent stop")
            rival, rival_again = ray_up(Path(folder), inventory, row.ray)
        finally:
            clusterkit("lab", "down", *words)
    table(
        "Ray on three hosts, from installed to three living nodes",
        ["what", "seconds", "ratio", "again", "notes"],
        [
            ["playbooks/ray.yml", f"{ours:.1f}", "1.0", f"{again:.1f}", "units, token, health of each node checked"],
            ["ray up (local)", f"{rival:.1f}", f"{rival / ours:.1f}", f"{rival_again:.1f}", "no token, no units"],
        ],
    )


def ad_hoc(inventory: Path, module: str, arguments: str) -> str:
    return run(str(BIN / "ansible"), "all", "-i", str(inventory), "--become", "-m", module, "-a", arguments).stdout


def ray_up(folder: Path, inventory: Path, version: str) -> tuple[float, float]:
    """Seconds until three nodes live, and of a second `ray up` on the running cluster."""
    began = time.monotonic()
    with started(folder, inventory, version, minimum=2, maximum=2) as (up, installed):
        while alive(inventory) != 3:
            if time.monotonic() - began > 600:
                raise SystemExit("ray up: the workers never joined")
            time.sleep(0.5)
        return time.monotonic() - installed, seconds(up)


@contextmanager
def started(
    folder: Path, inventory: Path, version: str, *, minimum: int, maximum: int, idle_minutes: float = 5
) -> Iterator[tuple[Callable[[], object], float]]:
    """A cluster of `ray up`: what does it once more, and when the first began (Ray's installation left out)."""
    environment = folder / "ray"
    run(sys.executable, "-m", "venv", str(environment))
    run(str(environment / "bin/python"), "-m", "pip", "install", "--quiet", f"ray[default]=={version}")
    hosts: dict[str, Any] = yaml.safe_load((inventory / "hosts.yml").read_text())["all"]
    head = hosts["children"]["ray_head"]["hosts"]["head"]["ansible_host"]
    workers = hosts["children"]["ray_workers"]["children"]["cpu_pool"]["hosts"].values()
    config = folder / "rival.yaml"
    cluster = f"rival-{os.getpid()}-{maximum}"
    config.write_text(
        json.dumps(
            {
                "cluster_name": cluster,
                "provider": {
                    "type": "local",
                    "head_ip": head,
                    "worker_ips": [worker["ansible_host"] for worker in workers],
                },
                "auth": {
                    "ssh_user": hosts["vars"]["ansible_user"],
                    "ssh_private_key": hosts["vars"]["ansible_ssh_private_key_file"],
                },
                "min_workers": minimum,
                "max_workers": maximum,
                "idle_timeout_minutes": idle_minutes,
                "head_start_ray_commands": [
                    f"{RAY} stop",
                    f"{RAY} start --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
                ],
                "worker_start_ray_commands": [f"{RAY} stop", f"{RAY} start --address=$RAY_HEAD_IP:6379 --num-cpus=2"],
            }
        )
    )
    up = [
        "env",
        "RAY_UP_enable_autoscaler_v2=0",
        str(environment / "bin/ray"),
        "up",
        "--yes",
        "--no-config-cache",
        str(config),
    ]
    try:
        began = time.monotonic()
        run(*up)
        yield lambda: run(*up), began
    finally:
        for left in Path("/tmp/ray").glob(f"cluster-{cluster}.*"):
            left.unlink()


def alive(inventory: Path) -> int:
    """Nodes that Ray counts as alive, the head among them."""
    command = [str(BIN / "ansible"), "head", "-i", str(inventory), "-m", "ansible.builtin.command"]
    command += ["-a", f"{RAY} list nodes --format json"]
    said = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False).stdout
    return said.count('"ALIVE"')


def on_head(inventory: Path, program: str) -> str:
    """What a Python program prints that runs in the head's Ray."""
    words = json.dumps({"argv": [PYTHON, "-c", program]})
    command = [str(BIN / "ansible"), "head", "-i", str(inventory), "-m", "ansible.builtin.command", "-a", words]
    return run(*command).stdout


if __name__ == "__main__":
    main()
