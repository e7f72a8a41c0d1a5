"""What hosts cost the fleet daemon: a round of polls, its own CPU and memory, and what Ray waits for its answers.

python -m bench.fleet_loop [COUNT ...]     10, 100 and 1000 hosts, unless said otherwise

Hosts are a shell script in ssh's place, which costs about what a word through a kept connection does; no network, no
sshd. All of them run a node, so a list has all of them in it. The last column has one host in ten hanging.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.common import ROOT, table
from clusterkit.node_provider.client import FleetAway, FleetClient, FleetRefused

INTERVAL_S = 5
SSH = """#!/bin/sh
while [ "$1" != "--" ]; do shift; done
[ -e FOLDER/hang ] && case $2 in *0) exec sleep 1000 ;; esac
echo '{"state": "running", "instance_id": "'$2'-1", "reason": null, "held": null, "generation_on_disk": "g1"}'
"""


class Daemon:
    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        ssh = folder / "ssh"
        ssh.write_text(SSH.replace("FOLDER", str(folder)))
        ssh.chmod(0o755)
        config = {
            "cluster": "bench",
            "socket": str(folder / "s"),
            "record": str(folder / "record.json"),
            "ssh": {"command": [str(ssh)], "identity": "/x", "known_hosts": "/x", "control_dir": str(folder)},
            "polling": {"interval_s": INTERVAL_S},
            "pools": {"gpus": {"max": count, "gpus": 8}},
            "hosts": {f"w{n}": {"address": f"w{n}", "node_ip": "192.0.2.1", "pool": "gpus"} for n in range(count)},
        }
        (folder / "fleet.json").write_text(json.dumps(config))
        self.client = FleetClient(config["socket"], timeout_s=60)
        words = [sys.executable, "-m", "clusterkit.fleet", "--config", str(folder / "fleet.json")]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(words, cwd=ROOT, stderr=log)

    def first_round(self) -> float:
        """Seconds from the first answer of the daemon until it knows every host."""
        began = None
        while True:
            try:
                began = began or time.monotonic()
                if len(self.client.nodes()) == self.count:
                    return time.monotonic() - began
            except FleetAway:
                began = None
            except FleetRefused:
                pass
            time.sleep(0.05)

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

    def answer_ms(self, times: int = 30) -> tuple[float, float]:
        """Median and worst of a list."""
        taken = []
        for _ in range(times):
            began = time.monotonic()
            self.client.nodes()
            taken.append(1000 * (time.monotonic() - began))
            time.sleep(INTERVAL_S / times)
        return statistics.median(taken), max(taken)


def measure(count: int) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="ck", dir="/tmp") as name:
        daemon = Daemon(Path(name), count)
        try:
            first = daemon.first_round()
            before, began = daemon.cpu_s(), time.monotonic()
            median, worst = daemon.answer_ms()
            time.sleep(2 * INTERVAL_S)
            share = (daemon.cpu_s() - before) / (time.monotonic() - began)
            memory = daemon.memory_mib()
            (Path(name) / "hang").touch()
            time.sleep(INTERVAL_S)
            hung, _ = daemon.answer_ms()
        finally:
            daemon.process.terminate()
            daemon.process.wait()
    return [
        str(count),
        f"{first:.2f}",
        f"{100 * share:.1f}",
        f"{memory:.0f}",
        f"{median:.1f}",
        f"{worst:.1f}",
        f"{hung:.1f}",
    ]


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [10, 100, 1000]
    header = ["hosts", "first round s", "CPU % of a core", "MiB", "list ms", "worst ms", "list ms, 10 % hung"]
    table(f"Fleet daemon, each host asked every {INTERVAL_S} s", header, [measure(count) for count in counts])


if __name__ == "__main__":
    main()
