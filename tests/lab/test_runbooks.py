"""The runbooks, as an operator follows them: every command in order, on a lab, against the output they show.

A page holds ```console blocks: `$ ` begins a command, what follows is its output. `...` stands for anything, in a
line or between lines. `[exit code N]` ends a block whose command fails. `<!-- test: ... -->` is what happens to a
host at that point of the story.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import ROOT
from tests.lab.conftest import BIN, ENVIRONMENT, Cluster, clusterkit

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

PAGES = sorted((ROOT / "docs" / "runbooks").glob("[0-9]-*.md"))
# What is the lab's and not the runbooks': its hosts are small, and may not touch the machine's kernel.
LAB_SETTINGS = ("clusterkit_object_store_gib", "preflight_", "baseline_", "ray_node_", "container_engine_")
NAME = "runbooktest"


@dataclass(frozen=True)
class Step:
    """A command with the output that the page shows, or something that happens."""

    page: str
    line: int
    command: str
    shown: tuple[str, ...] = ()
    happens: bool = False


def steps(page: Path) -> Iterator[Step]:
    command, shown, inside = "", [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if event := re.fullmatch(r"<!-- test: (.+) -->", line):
            yield Step(page.name, number, event[1], happens=True)
        elif line == "```console":
            inside, command, shown = True, "", []
        elif inside and line == "```":
            inside = False
            yield Step(page.name, number, command, tuple(shown))
        elif inside and line.startswith("$ "):
            assert not command, f"{page.name}:{number}: one command a block"
            command = line.removeprefix("$ ")
        elif inside:
            shown.append(line)


def squeezed(text: str) -> str:
    return re.sub(r"[ \t]+", " ", text).strip()


def missing(shown: tuple[str, ...], output: str) -> str | None:
    """The first line of the page that the output has not, in this order."""
    lines = [squeezed(line) for line in output.splitlines()]
    at = 0
    for line in shown:
        wanted = squeezed(line)
        if wanted in {"", "..."} or wanted.startswith("[exit code"):
            continue
        pattern = re.compile(".*".join(re.escape(part.strip()) for part in wanted.split("...")))
        found = next((n for n in range(at, len(lines)) if pattern.match(lines[n])), None)
        if found is None:
            return line
        at = found + 1
    return None


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
    for step in (step for page in PAGES for step in steps(page)):
        if step.happens:
            _happen(step, lab, inventory)
            continue
        command, shown = step.command, "\n".join(step.shown)
        for number, address in enumerate(addresses):
            command = command.replace(f"198.18.0.{10 + number}", address)
            shown = shown.replace(f"198.18.0.{10 + number}", address)
        command, shown = command.replace("mysite", NAME), shown.replace("mysite", NAME)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env={**environment, "PATH": f"{BIN}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        code = re.search(r"\[exit code (\d+)\]", shown)
        where = f"{step.page}:{step.line}: {command}\n{done.stdout[-5000:]}"
        assert done.returncode == int(code[1] if code else 0), where
        assert missing(tuple(shown.splitlines()), done.stdout) is None, where


def _hosts(lab: Cluster) -> list[dict[str, str]]:
    groups = yaml.safe_load((lab.inventory / "hosts.yml").read_text())["all"]["children"]
    workers = groups["ray_workers"]["children"]["cpu_pool"]["hosts"]
    return [groups["ray_head"]["hosts"]["head"], *(workers[name] for name in sorted(workers))]


def _happen(step: Step, lab: Cluster, inventory: Path) -> None:
    if step.command == "lab settings":
        settings = yaml.safe_load((ROOT / "lab" / "inventory" / "all.yml").read_text())
        mine = {name: value for name, value in settings.items() if name.startswith(LAB_SETTINGS)}
        (inventory / "group_vars" / "all" / "site.yml").write_text(yaml.safe_dump(mine), encoding="utf-8")
        (inventory / "group_vars" / "cpus.yml").write_text("clusterkit_accelerator: cpu\nclusterkit_cpus: 2\n")
        return
    host, _, command = step.command.removeprefix("on ").partition(": ")
    lab.on(host, command)
