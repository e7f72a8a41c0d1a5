"""Three hosts over SSH, in containers, from bare Debian to an answer."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.e2e.conftest import check_openai
from tests.lab.conftest import Cluster, clusterkit, playbook, recap

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]


def check_replicas(cluster: Cluster) -> None:
    """Replicas run on the workers only, and the proxy of each worker answers."""
    seen = cluster.status()
    nodes = {node["host"]: node for node in seen["nodes"]}
    assert set(nodes) == {"head", "worker1", "worker2"}
    (app,) = seen["apps"]
    engines = [replica for replica in app["replicas"] if replica["deployment"].startswith("LLMServer")]
    workers = {nodes[name]["node_ip"] for name in ("worker1", "worker2")}
    assert {replica["node_ip"] for replica in app["replicas"]} == workers
    assert {replica["node_ip"] for replica in engines} == workers
    for address in sorted(workers):
        check_openai(f"http://{address}:8000/v1")


def check_unchanged(cluster: Cluster) -> None:
    """A second run reports no change, by ansible-playbook and by the kit."""
    again = playbook("site.yml", cluster.inventory)
    assert again.returncode == 0, again.stdout[-4000:]
    assert {host: count["changed"] for host, count in recap(again.stdout).items() if count["changed"]} == {}
    assert cluster.deploy() == {}


def check_units(cluster: Cluster, user: str) -> None:
    for host, enabled in (("head", "enabled"), ("worker1", "static")):
        said = cluster.on(host, "systemctl show clusterkit-ray -p ActiveState -p UnitFileState -p User")
        assert set(said.splitlines()) == {"ActiveState=active", f"UnitFileState={enabled}", f"User={user}"}


def test_replicas_run_on_the_workers_only_and_every_proxy_answers(cluster: Cluster) -> None:
    check_replicas(cluster)


def test_a_second_run_changes_nothing_both_ways(cluster: Cluster) -> None:
    check_unchanged(cluster)


def test_units_are_systemds_and_a_workers_is_not_enabled(cluster: Cluster) -> None:
    check_units(cluster, user="")


def test_a_worker_stopped_and_started_through_its_agent_leaves_nothing_to_change(cluster: Cluster) -> None:
    assert cluster.agent("worker2", "stop")["changed"] is True
    verify = clusterkit("verify", "-i", str(cluster.inventory), "--json")
    checks = {check["name"]: check for check in json.loads(verify.stdout)["checks"]}
    assert verify.returncode == 1
    assert "worker2" in checks["nodes"]["detail"]
    cluster.agent("worker2", "start")
    assert cluster.deploy() == {}


def test_the_token_is_nobody_elses(cluster: Cluster) -> None:
    path = "/var/lib/clusterkit/node/token"
    token = cluster.on("worker1", f"cat {path}")
    assert len(token) == 64
    assert cluster.on("worker1", f"stat -c %a:%U {path}") == "600:ray"
    assert token not in cluster.on("worker1", "ps -eo args; journalctl --no-pager --lines 2000")
    # A worker that lost it gets it back, also alone.
    cluster.on("worker1", f"rm {path}")
    done = playbook("site.yml", cluster.inventory, "--limit", "worker1", "--tags", "ray_node", "-vvv", "--diff")
    assert done.returncode == 0, done.stdout[-3000:]
    assert token not in done.stdout
    assert cluster.on("worker1", f"cat {path}") == token


def test_a_running_node_is_restarted_by_consent_only(cluster: Cluster) -> None:
    site = cluster.inventory / "group_vars" / "all" / "site.yml"
    only = ["--limit", "worker1", "--tags", "ray_node", "--diff"]
    consent = ["-e", "clusterkit_allow_disruption=true"]

    def supervisor() -> str:
        return cluster.on("worker1", "systemctl show clusterkit-ray -p MainPID --value")

    site.write_text(yaml.safe_dump({"clusterkit_environment": {"SITE_SECRET": "hush-7"}}), encoding="utf-8")
    try:
        before = supervisor()
        left = playbook("site.yml", cluster.inventory, *only)
        assert left.returncode == 0, left.stdout[-3000:]
        assert "still runs with an older configuration" in left.stdout
        assert supervisor() == before
        agreed = playbook("site.yml", cluster.inventory, *only, *consent)
        assert agreed.returncode == 0, agreed.stdout[-3000:]
        assert supervisor() != before
        # The site's environment reaches Ray, and nobody else's eyes.
        assert "hush-7" in cluster.on("worker1", "tr '\\0' '\\n' < /proc/$(pgrep -x raylet)/environ")
        assert "hush-7" not in left.stdout + agreed.stdout
        assert "hush-7" not in cluster.on("worker1", "cat /etc/clusterkit/*; ps -eo args")
        assert cluster.on("worker1", "stat -c %a:%U /var/lib/clusterkit/node/environment.json") == "600:ray"
    finally:
        site.unlink()
        assert playbook("site.yml", cluster.inventory, *consent).returncode == 0
