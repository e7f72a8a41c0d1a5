"""The runbooks, as an operator follows them: every command in order, on a lab, against the output they show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.lab.conftest import ENVIRONMENT, Cluster, clusterkit
from tests.lab.runbooks import PAGES, follow, missing
from tests.support import ROOT

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

# What is the lab's and not the runbooks': its hosts are small, and may not touch the machine's kernel.
LAB_SETTINGS = ("clusterkit_object_store_gib", "preflight_", "baseline_", "ray_node_", "container_engine_")
NAME = "runbooktest"


def test_the_comparison_notices() -> None:
    output = "host     agent\nhead     running  alive\nworker1  stopped  -\n"
    assert missing(("host agent", "head ... alive"), output) is None
    assert missing(("worker1 running",), output) == "worker1 running"
    assert missing(("worker1 ...", "head ..."), output) == "head ...", "order counts"


@pytest.fixture
def site(docker_engine: None, tmp_path: Path) -> Iterator[tuple[Cluster, dict[str, str], Path]]:
    """Bare hosts, the environment of an operator who may log in to them, and where `mysite` will lie."""
    made = clusterkit("lab", "up", "--workers", "3", "--name", NAME, "--inventory", str(tmp_path / "hosts"))
    assert made.returncode == 0, made.stderr
    hosts = yaml.safe_load((tmp_path / "hosts" / "hosts.yml").read_text())["all"]["vars"]
    environment = {
        **ENVIRONMENT,
        "ANSIBLE_PRIVATE_KEY_FILE": hosts["ansible_ssh_private_key_file"],
        "ANSIBLE_SSH_COMMON_ARGS": hosts["ansible_ssh_common_args"],
        "COLUMNS": "200",
    }
    inventory = ROOT / "inventory" / NAME
    shutil.rmtree(inventory, ignore_errors=True)
    yield Cluster(NAME, tmp_path / "hosts"), environment, inventory
    shutil.rmtree(inventory, ignore_errors=True)
    clusterkit("lab", "down", "--name", NAME, "--inventory", str(tmp_path / "hosts"))


def test_the_runbooks_tell_the_truth(site: tuple[Cluster, dict[str, str], Path]) -> None:
    lab, environment, inventory = site
    addresses = [host["ansible_host"] for host in _hosts(lab)]

    def adapt(text: str) -> str:
        for number, address in enumerate(addresses):
            text = text.replace(f"198.18.0.{10 + number}", address)
        return text.replace("mysite", NAME)

    for page in sorted(PAGES.glob("[0-9]-*.md")):
        assert follow(page, environment, adapt, lambda event: _happen(event, lab, inventory)) > 0


def _hosts(lab: Cluster) -> list[dict[str, str]]:
    groups = yaml.safe_load((lab.inventory / "hosts.yml").read_text())["all"]["children"]
    workers = groups["ray_workers"]["children"]["cpu_pool"]["hosts"]
    return [groups["ray_head"]["hosts"]["head"], *(workers[name] for name in sorted(workers))]


def _happen(event: str, lab: Cluster, inventory: Path) -> None:
    if event == "lab settings":
        settings = yaml.safe_load((ROOT / "lab" / "inventory" / "all.yml").read_text())
        mine = {name: value for name, value in settings.items() if name.startswith(LAB_SETTINGS)}
        (inventory / "group_vars" / "all" / "site.yml").write_text(yaml.safe_dump(mine), encoding="utf-8")
        (inventory / "group_vars" / "cpus.yml").write_text("clusterkit_accelerator: cpu\nclusterkit_cpus: 2\n")
        return
    host, _, command = event.removeprefix("on ").partition(": ")
    lab.on(host, command)
