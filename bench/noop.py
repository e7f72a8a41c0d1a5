"""A run that has nothing to do: site.yml on a converged cluster against `ansible -m ping` on the same hosts.

python -m bench.noop [INVENTORY]     the lab's by default; the cluster has to be converged
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from pathlib import Path

from bench.common import BIN, ROOT, run, seconds, table
from clusterkit import runner
from clusterkit.runner import Event


def main() -> None:
    measure(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "inventory" / "lab"))


def measure(inventory: str) -> None:
    ping = [str(BIN / "ansible"), "ray_head:ray_workers", "-i", inventory, "-m", "ansible.builtin.ping"]
    site = [str(BIN / "ansible-playbook"), "site.yml", "-i", inventory]
    run(*ping)
    pinged = seconds(lambda: run(*ping), times=5)
    first = run(*site)
    if any("changed=" in line and "changed=0" not in line for line in first.stdout.splitlines()):
        print("the cluster was not converged: this run changed something, the next ones count")
    whole = seconds(lambda: run(*site), times=3)
    table(
        "No-op run (medians)",
        ["what", "seconds", "pings"],
        [
            ["ansible -m ping", f"{pinged:.2f}", "1.0"],
            ["ansible-playbook site.yml", f"{whole:.1f}", f"{whole / pinged:.1f}"],
        ],
    )
    _where(inventory)


def _where(inventory: str) -> None:
    """Seconds by role: for each task, from its announcement to its slowest host."""
    spent: defaultdict[str, float] = defaultdict(float)
    tasks: defaultdict[str, set[str]] = defaultdict(set)
    longest: dict[tuple[str, str], float] = {}
    per_host: Counter[str] = Counter()

    def on_event(event: Event) -> None:
        role = event.role or "(no role)"
        if event.kind == "task":
            tasks[role].add(event.task)
        elif event.host and event.kind in {"ok", "changed"}:
            per_host[event.host] += 1
            key = (role, event.task)
            longest[key] = max(longest.get(key, 0.0), event.duration_s)

    runner.run("site.yml", str(Path(inventory).absolute()), on_event=on_event)
    for (role, _), duration in longest.items():
        spent[role] += duration
    total = sum(spent.values())
    rows = [
        [role, len(tasks[role]), f"{spent[role]:.1f}", f"{100 * spent[role] / total:.0f} %"]
        for role in sorted(spent, key=lambda name: -spent[name])
    ]
    table("Where a no-op run's time goes", ["role", "tasks", "seconds", "share"], rows)
    slow = sorted(longest.items(), key=lambda item: -item[1])[:12]
    table(
        "The slowest tasks",
        ["role", "task", "seconds"],
        [[role, task[:70], f"{duration:.2f}"] for (role, task), duration in slow],
    )
    table("Tasks that ran on a host", ["host", "tasks"], [[host, count] for host, count in sorted(per_host.items())])


if __name__ == "__main__":
    main()
