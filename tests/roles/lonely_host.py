"""A system container without a network: what a role installs there comes from the test's own repository."""

from __future__ import annotations

import time
from typing import Any, Protocol

from clusterkit.lab import SYSTEM_CONTAINER


class Shell(Protocol):
    def __call__(self, script: str, *, check: bool = True) -> str: ...


def lonely_host(client: Any, image: str | Any, name: str) -> Any:
    """Starts it, in place of one that an earlier run has left."""
    for left in client.containers.list(all=True, filters={"name": f"^/{name}$"}):
        left.remove(v=True, force=True)
    return client.containers.run(
        image,
        name=name,
        hostname="box",
        detach=True,
        network_mode="none",
        mem_limit="1g",
        **SYSTEM_CONTAINER,
    )


def wait_for_systemd(shell: Shell) -> None:
    deadline = time.monotonic() + 60
    while shell("systemctl is-system-running", check=False).strip() not in ("running", "degraded"):
        assert time.monotonic() < deadline, shell("systemctl list-jobs", check=False)
        time.sleep(0.2)
