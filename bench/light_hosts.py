"""What one more host costs: a no-op run of the roles that need no engine on 10, 25 and 50 light hosts.

python -m bench.light_hosts [COUNT ...]     makes a lab of that many workers, and takes it away

50 hosts need fs.inotify.max_user_instances=1024; `lab up` says so where the kernel allows fewer.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from bench.common import BIN, clusterkit, run, seconds, table

NAME = "benchlight"
LAB = (sys.executable, "-m", "clusterkit", "lab")
REFUSED = 2
ROLES = "preflight,baseline,host_agent"


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [10, 25, 50]
    refused: list[str] = []
    measured: list[tuple[int, float, float]] = []
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
                measured.append((count + 1, seconds(lambda p=ping: run(*p)), seconds(lambda s=site: run(*s))))
        finally:
            clusterkit("lab", "down", *words)
    rows = []
    before: tuple[int, float, float] | None = None
    for hosts, ping, site in measured:
        added = f"{(site - before[2]) / (hosts - before[0]):.2f}" if before else "-"
        rows.append([hosts, f"{ping:.1f}", f"{site:.1f}", f"{site / ping:.1f}", added])
        before = (hosts, ping, site)
    table(f"Light hosts ({ROLES})", ["hosts", "ping s", "no-op s", "pings", "s per added host"], rows)
    for reason in refused:
        print(f"\nnot measured: {reason}")


if __name__ == "__main__":
    main()
