"""What one more host costs: a no-op run of the roles that need no engine on 10, 25 and 50 light hosts.

python -m bench.light_hosts [COUNT ...]     makes a lab of that many workers, and takes it away

All hosts of a lab share this machine's cores, so seconds per host are theirs, too. What the controller alone computes
for one more host is the figure that carries over to real ones.

50 hosts need fs.inotify.max_user_instances=1024; `lab up` says so where the kernel allows fewer.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

from bench.common import BIN, clusterkit, run, seconds, table

NAME = "benchlight"
LAB = (sys.executable, "-m", "clusterkit", "lab")
REFUSED = 2
ROLES = "preflight,baseline,host_agent"


def computed() -> float:
    """Seconds of CPU that ended processes of this one's have used: Ansible and its ssh, not the hosts."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [10, 25, 50]
    refused: list[str] = []
    measured: list[tuple[int, float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        inventory = str(Path(folder) / "inventory")
        words = ["--name", NAME, "--inventory", inventory]
        try:
            for count in counts:
                # Neither Docker nor an engine: the roles that need none.
                up = run(*LAB, "up", "--workers", str(count), "--runtime", "venv", *words, check=False)
                if up.returncode == REFUSED:
                    refused.append(up.stderr.strip())
                    break
                if up.returncode != 0:
                    raise SystemExit(up.stderr[-3000:])
                site = [str(BIN / "ansible-playbook"), "site.yml", "-i", inventory, "--tags", ROLES]
                ping = [str(BIN / "ansible"), "all", "-i", inventory, "-m", "ansible.builtin.ping"]
                run(*site)
                run(*ping)
                pinged = seconds(lambda p=ping: run(*p))
                before = computed()
                took = seconds(lambda s=site: run(*s))
                measured.append((count + 1, pinged, took, computed() - before))
        finally:
            clusterkit("lab", "down", *words)
    rows = []
    last: tuple[int, float, float, float] | None = None
    for hosts, pinged, took, cpu in measured:
        more = (hosts - last[0]) if last else 0
        added = [f"{(took - last[2]) / more:.2f}", f"{(cpu - last[3]) / more:.2f}"] if last else ["-", "-"]
        rows.append([hosts, f"{pinged:.1f}", f"{took:.1f}", f"{took / pinged:.1f}", f"{cpu:.1f}", *added])
        last = (hosts, pinged, took, cpu)
    header = ["hosts", "ping s", "no-op s", "pings", "controller CPU s", "s per added host", "CPU s per added host"]
    table(f"Light hosts ({ROLES})", header, rows)
    for reason in refused:
        print(f"\nnot measured: {reason}")


if __name__ == "__main__":
    main()
