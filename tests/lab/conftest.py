"""What the tests of the lab share: commands as a user gives them, and one cluster of three hosts for all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import docker
import docker.errors
import pytest

from tests.e2e.conftest import run
from tests.support import docker_client

if TYPE_CHECKING:
    from tests.lab.gpu_site import Site

BIN = Path(sys.executable).parent
ENVIRONMENT = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}


def clusterkit(*words: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "clusterkit", *words], env=ENVIRONMENT)


def playbook(name: str, inventory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run([str(BIN / "ansible-playbook"), name, "-i", str(inventory), *words], env=ENVIRONMENT)


def recap(output: str) -> dict[str, dict[str, int]]:
    """Ansible's own counts, by host."""
    lines = output.split("PLAY RECAP", 1)[1].splitlines()[1:]
    counts = {}
    for line in lines:
        host, _, rest = line.partition(":")
        if rest.strip():
            counts[host.strip()] = {key: int(value) for key, value in (word.split("=") for word in rest.split())}
    return counts


@dataclass(frozen=True)
class Cluster:
    """A lab with its inventory. Hosts are looked at from beside, without the kit: `on` runs a shell in one."""

    name: str
    inventory: Path

    def container(self, host: str) -> Any:
        found = docker.from_env().containers.list(
            all=True, filters={"label": [f"clusterkit.lab={self.name}", f"clusterkit.lab.host={host}"]}
        )
        return found[0]

    def on(self, host: str, command: str, *, check: bool = True) -> str:
        code, output = self.container(host).exec_run(["sh", "-c", command])
        text: str = output.decode(errors="replace").strip()
        assert code == 0 or not check, f"{host}: {command}\n{text}"
        return text

    def agent(self, host: str, *words: str, code: int = 0) -> dict[str, Any]:
        """The agent's answer: the last line of what it prints."""
        done, output = self.container(host).exec_run(["/opt/clusterkit/bin/host-agent", *words], demux=False)
        text = output.decode(errors="replace").strip()
        assert done == code, text
        answer: dict[str, Any] = json.loads(next(line for line in reversed(text.splitlines()) if line.startswith("{")))
        return answer

    def status(self) -> dict[str, Any]:
        done = clusterkit("status", "-i", str(self.inventory), "--json")
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def deploy(self, *words: str) -> dict[str, int]:
        """How many tasks changed, by host; hosts without a change are left out."""
        done = clusterkit("deploy", "-i", str(self.inventory), "--json", *words)
        assert done.returncode == 0, done.stderr[-4000:]
        hosts = json.loads(done.stdout)["hosts"]
        return {host: count["changed"] for host, count in hosts.items() if count["changed"]}


Maker = Callable[..., Cluster]


@pytest.fixture(scope="session")
def docker_engine() -> None:
    """Skips, with the reason, where there is no Docker Engine."""
    docker_client()


@pytest.fixture(scope="module")
def lab_of(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Maker]:
    """Makes labs; each is gone with the module that asked for it."""
    made: list[Cluster] = []

    def make(name: str, *words: str) -> Cluster:
        folder = tmp_path_factory.mktemp(name) / "inventory"
        made.append(Cluster(name, folder))
        done = clusterkit("lab", "up", "--name", name, "--inventory", str(folder), *words)
        assert done.returncode == 0, done.stderr
        return made[-1]

    yield make
    for lab in made:
        clusterkit("lab", "down", "--name", lab.name, "--inventory", str(lab.inventory))


@pytest.fixture(scope="module")
def site(lab_of: Maker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two workers with GPUs, of a kind. See gpu_site.py."""
    missing = [tool for tool in ("gpg", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"builds and signs packages: needs {', '.join(missing)}")
    from tests.lab.gpu_site import gpu_site  # it needs this module's names

    with gpu_site(lab_of, tmp_path_factory.mktemp("gpus")) as made:
        yield made


@pytest.fixture(scope="session")
def cluster(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts with the container runtime, taken from bare Debian to the answer by plain ansible-playbook.

    One for all modules: each leaves it running and converged.
    """
    folder = tmp_path_factory.mktemp("cluster") / "inventory"
    made = clusterkit("lab", "up", "--workers", "2", "--name", "clustertest", "--inventory", str(folder))
    assert made.returncode == 0, made.stderr
    done = playbook("site.yml", folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    yield Cluster("clustertest", folder)
    clusterkit("lab", "down", "--name", "clustertest", "--inventory", str(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the one cluster come last: while it runs, every other lab has half of the machine."""
    here = Path(__file__).parent
    items.sort(key=lambda item: here in item.path.parents and "cluster" in getattr(item, "fixturenames", ()))
