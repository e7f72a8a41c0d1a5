"""Three hosts over SSH, from bare Debian to an answer; and a host without a route."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import check_openai, run

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

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


def on_host(inventory: Path, host: str, command: str) -> str:
    done = run(
        [str(BIN / "ansible"), host, "-i", str(inventory), "--become", "-m", "ansible.builtin.command", "-a", command],
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def inventory(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A lab of three hosts, taken from bare Debian to the answer by plain ansible-playbook."""
    folder = tmp_path_factory.mktemp("cluster") / "inventory"
    made = clusterkit("lab", "up", "--workers", "2", "--name", "clustertest", "--inventory", str(folder))
    assert made.returncode == 0, made.stderr
    done = playbook("site.yml", folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr
    yield folder
    clusterkit("lab", "down", "--name", "clustertest", "--inventory", str(folder))


def status(inventory: Path) -> dict[str, object]:
    done = clusterkit("status", "-i", str(inventory), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_replicas_run_on_the_workers_only_and_every_proxy_answers(inventory: Path) -> None:
    seen = status(inventory)
    nodes = {node["host"]: node for node in seen["nodes"]}  # type: ignore[attr-defined]
    assert set(nodes) == {"head", "worker1", "worker2"}
    (app,) = seen["apps"]  # type: ignore[misc]
    engines = [replica for replica in app["replicas"] if replica["deployment"].startswith("LLMServer")]
    workers = {nodes[name]["node_ip"] for name in ("worker1", "worker2")}
    assert {replica["node_ip"] for replica in app["replicas"]} == workers
    assert {replica["node_ip"] for replica in engines} == workers
    for address in sorted(workers):
        check_openai(f"http://{address}:8000/v1")


def test_a_second_run_changes_nothing_both_ways(inventory: Path) -> None:
    again = playbook("site.yml", inventory)
    assert again.returncode == 0, again.stdout[-4000:]
    assert {host: count["changed"] for host, count in recap(again.stdout).items() if count["changed"]} == {}
    wrapped = clusterkit("deploy", "-i", str(inventory), "--json")
    assert wrapped.returncode == 0, wrapped.stderr
    hosts = json.loads(wrapped.stdout)["hosts"]
    assert {host: count["changed"] for host, count in hosts.items() if count["changed"]} == {}


def test_units_are_systemds_and_a_workers_is_not_enabled(inventory: Path) -> None:
    for host, enabled in (("head", "enabled"), ("worker1", "static")):
        said = on_host(inventory, host, "systemctl show clusterkit-ray -p ActiveState -p UnitFileState -p User")
        assert "ActiveState=active" in said
        assert f"UnitFileState={enabled}" in said
        assert "User=ray" in said


def test_a_worker_stopped_and_started_through_its_agent_leaves_nothing_to_change(inventory: Path) -> None:
    stopped = on_host(inventory, "worker2", "/opt/clusterkit/bin/host-agent stop")
    assert '"changed": true' in stopped
    verify = clusterkit("verify", "-i", str(inventory), "--json")
    checks = {check["name"]: check for check in json.loads(verify.stdout)["checks"]}
    assert verify.returncode == 1
    assert "worker2" in checks["nodes"]["detail"]
    on_host(inventory, "worker2", "/opt/clusterkit/bin/host-agent start")
    healed = clusterkit("deploy", "-i", str(inventory), "--json")
    assert healed.returncode == 0, healed.stderr
    assert sum(count["changed"] for count in json.loads(healed.stdout)["hosts"].values()) == 0


def test_the_token_is_nobody_elses(inventory: Path) -> None:
    token = on_host(inventory, "worker1", "cat /var/lib/clusterkit/node/token").splitlines()[-1].strip()
    assert len(token) == 64
    mode = on_host(inventory, "worker1", "stat -c %a:%U /var/lib/clusterkit/node/token")
    assert "600:ray" in mode
    assert token not in on_host(inventory, "worker1", "ps -eo args")
    journal = on_host(inventory, "worker1", "journalctl --no-pager --lines 2000")
    # The line above was written by reading it; anything the kit itself wrote carries the unit's name.
    assert not [line for line in journal.splitlines() if token in line and "ray-node" in line]
    # A worker that lost it gets it back, also alone.
    on_host(inventory, "worker1", "rm /var/lib/clusterkit/node/token")
    done = playbook("site.yml", inventory, "--limit", "worker1", "--tags", "ray_node")
    assert done.returncode == 0, done.stdout[-3000:]
    assert token not in done.stdout
    assert token in on_host(inventory, "worker1", "cat /var/lib/clusterkit/node/token")


def test_a_running_node_is_restarted_by_consent_only(inventory: Path) -> None:
    site = inventory / "group_vars" / "all" / "site.yml"
    site.write_text(yaml.safe_dump({"clusterkit_environment": {"SITE_MARK": "1"}}), encoding="utf-8")
    try:
        left = playbook("site.yml", inventory, "--limit", "worker1", "--tags", "ray_node")
        assert left.returncode == 0
        assert "still runs with an older configuration" in left.stdout
        before = on_host(inventory, "worker1", "systemctl show clusterkit-ray -p MainPID --value").split()[-1]
        agreed = playbook(
            "site.yml", inventory, "--limit", "worker1", "--tags", "ray_node", "-e", "clusterkit_allow_disruption=true"
        )
        assert agreed.returncode == 0, agreed.stdout[-3000:]
        after = on_host(inventory, "worker1", "systemctl show clusterkit-ray -p MainPID --value").split()[-1]
        assert before != after
    finally:
        site.unlink()


def test_remove_leaves_the_host_as_it_was_but_for_packages(inventory: Path) -> None:
    done = clusterkit("remove", "-i", str(inventory), "--yes")
    assert done.returncode == 0, done.stderr
    for host in ("head", "worker1"):
        left = on_host(inventory, host, "find /opt /etc /var/lib /var/log -path '*clusterkit*' -maxdepth 3")
        assert "clusterkit" not in left.split("rc=0", 1)[-1]
        assert "raylet" not in on_host(inventory, host, "ps -eo args")


def test_a_host_without_a_route_gets_its_environment_from_the_wheelhouse(docker_engine: None, tmp_path: Path) -> None:
    folder = tmp_path / "inventory"
    name = ["--name", "offlinetest", "--inventory", str(folder)]
    made = clusterkit("lab", "up", "--workers", "1", "--offline", *name)
    assert made.returncode == 0, made.stderr
    try:
        # An address that is nobody's: with a route the packet would leave and be lost.
        fetch = "import urllib.request; urllib.request.urlopen('http://192.0.2.1', timeout=10)"
        assert "Network is unreachable" in ask(folder, f'/usr/bin/python3 -c "{fetch}"').stdout
        # Bare Debian: no pip and no ensurepip either; pip comes out of the wheelhouse too.
        done = playbook("playbooks/hosts.yml", folder, "--limit", "worker1", "--tags", "ray_env")
        assert done.returncode == 0, done.stdout[-4000:]
        said = ask(folder, "/opt/clusterkit/ray-env/bin/python -c 'import ray, torch; print(ray.__version__)'")
        assert "2.60.0" in said.stdout, said.stdout
        again = playbook("playbooks/hosts.yml", folder, "--limit", "worker1", "--tags", "ray_env")
        assert recap(again.stdout)["worker1"]["changed"] == 0
    finally:
        clusterkit("lab", "down", *name)


def ask(inventory: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = ["worker1", "-i", str(inventory), "-m", "ansible.builtin.command", "-a", command]
    return run([str(BIN / "ansible"), *words], env=ENVIRONMENT)
