"""An engine's image on its way to 1, 2 and 4 hosts: by the cluster's registry, and by `docker save | ssh docker load`.

python -m bench.distribution [GIB]     3 by default; makes a lab of four workers, and takes it away

The image is random bytes, so that nothing can be compressed, in ten layers. Both ways end with the image in each host's
Docker. It needs about twelve times the image's size on disk. All hosts share one machine here: its disk and its
loopback, no network, are the limit. What a host receives is what its interface counts, Ansible's own traffic included.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from bench.common import BIN, ROOT, clusterkit, run, table
from clusterkit import images, registry, workspace

NAME = "benchimages"
LAYERS = 10
COUNTS = (1, 2, 4)
TAG = "clusterkit/vllm-bench"
REGISTRY = "all:\n  children:\n    registry:\n      hosts:\n        head:\n"
CHUNK = 16 << 20


def main() -> None:
    size = int(float(sys.argv[1] if len(sys.argv) > 1 else 3) * 2**30)
    docker = images.builder()
    workspace.cache_home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=workspace.cache_home()) as name:
        folder = Path(name)
        inventory = folder / "inventory"
        words = ["--name", NAME, "--inventory", str(inventory)]
        try:
            clusterkit("lab", "up", "--workers", str(max(COUNTS)), *words)
            (inventory / "registry.yml").write_text(REGISTRY)
            site = [str(BIN / "ansible-playbook"), str(ROOT / "site.yml"), "-i", str(inventory), "--tags"]
            run(*site, "registry,baseline,container_engine")
            measure(docker, folder, Lab(inventory), size)
        finally:
            clusterkit("lab", "down", *words)
            run(docker, "image", "rm", f"{TAG}:1", f"{TAG}:2", check=False)


class Lab:
    """The lab's hosts, by SSH for what is measured, and from beside for what is counted."""

    def __init__(self, inventory: Path) -> None:
        self.inventory = inventory
        hosts: dict[str, Any] = yaml.safe_load((inventory / "hosts.yml").read_text())["all"]
        children = hosts["children"]
        self.head = children["ray_head"]["hosts"]["head"]["ansible_host"]
        workers = children["ray_workers"]["children"]["cpu_pool"]["hosts"]
        self.workers = {name: about["ansible_host"] for name, about in workers.items()}
        self.ssh = ["ssh", "-i", hosts["vars"]["ansible_ssh_private_key_file"], "-o", "ControlMaster=no"]
        self.ssh += shlex.split(hosts["vars"]["ansible_ssh_common_args"])
        self.user = hosts["vars"]["ansible_user"]
        told = json.loads(clusterkit("validate", "-i", str(inventory), "--json").stdout)
        self.own = registry.own(told["cluster"], store=workspace.cache_home())

    def on(self, host: str, command: str) -> str:
        labels = ["--filter", f"label=clusterkit.lab={NAME}", "--filter", f"label=clusterkit.lab.host={host}"]
        container = run("docker", "ps", "--quiet", *labels).stdout.strip()
        return run("docker", "exec", container, "sh", "-c", command).stdout.strip()

    def received(self, names: Sequence[str]) -> int:
        """Bytes that the hosts' interfaces have taken since they came up."""
        return sum(int(self.on(name, "cat /sys/class/net/eth0/statistics/rx_bytes")) for name in names)

    def empty(self, names: Sequence[str]) -> None:
        for name in names:
            self.on(name, 'found=$(docker image ls --all --quiet); [ -z "$found" ] || docker image rm --force $found')

    def timed(self, names: Sequence[str], action: Callable[[], object]) -> tuple[float, float]:
        """(seconds, MB that the hosts received together)"""
        before, began = self.received(names), time.monotonic()
        action()
        taken = time.monotonic() - began
        return taken, (self.received(names) - before) / 1e6

    def by_registry(self, names: Sequence[str], reference: str, **more: Any) -> None:
        """As a deploy does it, on these hosts."""
        command = [str(BIN / "ansible-playbook"), str(ROOT / "playbooks/images.yml"), "-i", str(self.inventory)]
        given = json.dumps({"clusterkit_image": reference, **more})
        run(*command, "--tags", "vllm_image", "--limit", ",".join(names), "-e", given)

    def by_ssh(self, names: Sequence[str], docker: str, tag: str) -> None:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: self.loaded(name, docker, tag), names))

    def loaded(self, name: str, docker: str, tag: str) -> None:
        there = [*self.ssh, f"{self.user}@{self.workers[name]}", "sudo docker load --quiet"]
        with subprocess.Popen([docker, "save", tag], stdout=subprocess.PIPE) as saving:
            subprocess.run(there, stdin=saving.stdout, check=True, capture_output=True)
        if saving.returncode != 0:
            raise SystemExit(f"docker save {tag} failed")


def built(docker: str, folder: Path, tag: str, size: int, *, but_last: Path | None = None) -> Path:
    """The archive of an image of random bytes; `but_last`: a folder of layers of which only the last is another."""
    context = but_last or folder / "layers"
    context.mkdir(exist_ok=True)
    for number in range(LAYERS):
        path = context / f"layer{number}"
        if not path.exists() or number == LAYERS - 1:
            with path.open("wb") as out:
                left = size // LAYERS
                while left:
                    left -= out.write(os.urandom(min(CHUNK, left)))
    # Without the kit's label: on this machine nobody takes it for an engine.
    steps = [f"COPY layer{number} /layer{number}" for number in range(LAYERS)]
    (context / "Dockerfile").write_text("\n".join(["FROM scratch", *steps, 'CMD ["/none"]']) + "\n")
    images.build(docker, tag, context, log=folder / "build.log")
    archive = folder / f"{tag.rpartition(':')[2]}.tar"
    run(docker, "save", "--output", str(archive), tag)
    return archive


def measure(docker: str, folder: Path, lab: Lab, size: int) -> None:
    archive = built(docker, folder, f"{TAG}:1", size)
    began = time.monotonic()
    pushed = registry.push(archive, f"{TAG}:1", lab.own)
    push_s = time.monotonic() - began
    everybody = list(lab.workers)
    # The first one has Ansible's connections to open.
    lab.by_registry(everybody[:1], pushed.reference)
    lab.empty(everybody)
    rows: list[list[object]] = []
    for count in COUNTS:
        names = everybody[:count]
        ours, ours_mb = lab.timed(names, lambda names=names: lab.by_registry(names, pushed.reference))
        lab.empty(names)
        theirs, theirs_mb = lab.timed(names, lambda names=names: lab.by_ssh(names, docker, f"{TAG}:1"))
        lab.empty(names)
        rows.append(
            [count, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}", f"{ours_mb:.0f}", f"{theirs_mb:.0f}"]
        )
    header = ["hosts", "registry s", "save|ssh|load s", "ratio", "registry MB", "save|ssh|load MB"]
    table(f"An image of {size / 2**30:g} GiB (pushed once before, in {push_s:.1f} s)", header, rows)

    names = everybody[:2]
    lab.by_registry(names, pushed.reference)
    unchanged = lab.timed(names, lambda: lab.by_registry(names, pushed.reference))
    apps = [
        {"name": "other", "template": "llm", "parameters": {"model_id": "x", "model_source": {"make": "tiny-llama"}}}
    ]
    app_only = lab.timed(names, lambda: lab.by_registry(names, pushed.reference, clusterkit_apps=apps))
    other_archive = built(docker, folder, f"{TAG}:2", size, but_last=folder / "layers")
    other = registry.push(other_archive, f"{TAG}:2", lab.own)
    one_layer = lab.timed(names, lambda: lab.by_registry(names, other.reference))
    lab.by_ssh(names, docker, f"{TAG}:1")
    rival = lab.timed(names, lambda: lab.by_ssh(names, docker, f"{TAG}:2"))
    whole = 2 * size / 1e6

    def row(what: str, pushed_bytes: int, taken: tuple[float, float]) -> list[object]:
        return [
            what,
            f"{pushed_bytes / 1e6:.0f}",
            f"{taken[0]:.1f}",
            f"{taken[1]:.1f}",
            f"{100 * taken[1] / whole:.1f} %",
        ]

    table(
        "What a run moves to two hosts that have the image",
        ["what", "pushed MB", "seconds", "received MB", "of two images"],
        [
            row("nothing changed", 0, unchanged),
            row("another app", 0, app_only),
            row(f"one layer of {LAYERS} is another", other.sent, one_layer),
            row("the same, by save | ssh | load", 0, rival),
        ],
    )


if __name__ == "__main__":
    main()
