"""Run `deploy` and kill everything that it started, hard, when the event stream announces the N-th task.

kill_at.py INVENTORY N     exit code 0 only where the run ended before its N-th task; prints the tasks announced
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

from clusterkit import operations
from clusterkit.errors import ClusterkitError
from clusterkit.runner import Event


def family(root: int) -> list[int]:
    """Every process below `root`: ansible-playbook, its workers, ssh."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, queue = [], [root]
    while queue:
        parent = queue.pop()
        children = [pid for pid, ppid in parents.items() if ppid == parent]
        found += children
        queue += children
    return found


def main() -> int:
    inventory, limit = sys.argv[1], int(sys.argv[2])
    seen = 0

    def on_event(event: Event) -> None:
        nonlocal seen
        if event.kind != "task":
            return
        seen += 1
        print(f"{event.role or '-'}: {event.task}", flush=True)
        if seen == limit:
            victims = [os.getpid(), *family(os.getpid())]
            # From a process beside them: this one first, or it could still see the others die and end by itself.
            if os.fork() == 0:
                for pid in victims:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os._exit(0)
            signal.pause()

    try:
        operations.deploy(inventory, on_event=on_event)
    except ClusterkitError as error:
        print(f"failed: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
