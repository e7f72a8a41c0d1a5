"""System containers that roles are played against by way of `docker exec`. A lonely one has no network: what a role
installs there comes from the test's own repository.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from clusterkit import lab
from tests.support import docker_client

LONELY = {"network_mode": "none", "mem_limit": "1g"}

# In ssh's place: the last word is the command.
SSH = """#!/bin/sh
for command; do :; done
exec docker exec -i %s /bin/sh -c "$command"
"""


class Shell(Protocol):
    def __call__(self, script: str, *, check: bool = True) -> str: ...


class Box:
    """A container as the inventory's only host, `box`, and a shell on it. `folder` gets what Ansible needs."""

    def __init__(self, container: Any, folder: Path) -> None:
        self.container, self.folder = container, folder
        (folder / "ssh").write_text(SSH % container.name)
        (folder / "ssh").chmod(0o755)
        (folder / "hosts").write_text(f"box ansible_user=root ansible_ssh_executable={folder}/ssh\n")

    def sh(self, script: str, *, check: bool = True) -> str:
        code, output = self.container.exec_run(["/bin/sh", "-c", script])
        text = output.decode(errors="replace")
        assert code == 0 or not check, f"{script}: {text}"
        return str(text)


B = TypeVar("B", bound=Box)


@contextmanager
def running_box(
    make: Callable[[Any, Path], B], name: str, container_options: Mapping[str, Any] = LONELY
) -> Iterator[B]:
    """A bare one of the lab's image, up: it and its folder go with the block."""
    client = docker_client()
    # Short, for the sockets in it.
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    container = None
    try:
        with lab._lock(print):
            image = lab.ensure_image(client, mirror=None, on_progress=print)
        container = lonely_host(client, image, name, container_options)
        made = make(container, folder)
        wait_for_systemd(made.sh)
        yield made
    finally:
        if container is not None:
            container.remove(v=True, force=True)
        shutil.rmtree(folder, ignore_errors=True)


def lonely_host(client: Any, image: str | Any, name: str, options: Mapping[str, Any] = LONELY) -> Any:
    """Starts it, in place of one that an earlier run has left."""
    for left in client.containers.list(all=True, filters={"name": f"^/{name}$"}):
        left.remove(v=True, force=True)
    return client.containers.run(image, name=name, hostname="box", detach=True, **lab.SYSTEM_CONTAINER, **options)


def wait_for_systemd(shell: Shell) -> None:
    deadline = time.monotonic() + 60
    while shell("systemctl is-system-running", check=False).strip() not in ("running", "degraded"):
        assert time.monotonic() < deadline, shell("systemctl list-jobs", check=False)
        time.sleep(0.2)
