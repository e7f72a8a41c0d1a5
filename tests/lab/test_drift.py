"""`clusterkit plan` on bare hosts, on a converged cluster, and on one that was changed by hand; nothing is touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import Cluster, Maker, clusterkit

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

HOSTS = ("head", "worker1", "worker2")
Json = dict[str, Any]

# Names, owners, modes, sizes and times of everything that a run writes; Ray's session, caches and what
# the launcher knows of shared memory go on by themselves. And what Docker and systemd have.
SNAPSHOT = """
find /etc /usr/local /opt/clusterkit /var/lib/clusterkit /var/log/clusterkit /var/lib/dpkg /var/lib/apt \
  \\( -name __pycache__ -o -path /var/lib/clusterkit/ray -o -path '*/cache' -o -name '*.log' \
     -o -name shared-memory.json \\) -prune -o -type d -printf '%p %m %u %g\\n' \
  -o -printf '%p %m %u %g %s %T@ %l\\n' 2>/dev/null | sort
docker image ls --all --no-trunc --format '{{.Repository}}:{{.Tag}} {{.ID}}' 2>/dev/null | sort
docker ps --no-trunc --filter name=clusterkit-ray 2>/dev/null | cut -d' ' -f1
systemctl show clusterkit-ray docker -p MainPID -p UnitFileState -p ActiveState
getent passwd; cat /proc/sys/net/core/somaxconn
"""

# Ray's API on the head, as a program of the site's might use it: a light change, which replaces no replica.
SERVE_BY_HAND = """
import json, urllib.request
token = open("/var/lib/clusterkit/node/token").read().strip()
url = "http://127.0.0.1:8265/api/serve/applications/"
def ask(method, body=None):
    headers = {"Authorization": "Bearer " + token, "Content-Type": "application/json", "User-Agent": "site"}
    request = urllib.request.Request(url, data=body and json.dumps(body).encode(), method=method, headers=headers)
    return urllib.request.urlopen(request, timeout=60).read()
have = json.loads(ask("GET"))
app = have["applications"]["tiny"]["deployed_app_config"]
for deployment in app["deployments"]:
    if "autoscaling_config" in deployment:
        deployment["autoscaling_config"]["target_ongoing_requests"] = 77
ask("PUT", {"proxy_location": have["proxy_location"], "http_options": have["http_options"], "applications": [app]})
"""


def plan(lab: Cluster, *words: str, code: int = 0) -> Json:
    done = clusterkit("plan", "-i", str(lab.inventory), "--json", *words)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    found: Json = json.loads(done.stdout)
    return found


Snapshot = dict[str, set[str]]


def snapshot(lab: Cluster, hosts: tuple[str, ...] = HOSTS) -> Snapshot:
    return {host: set(lab.on(host, SNAPSHOT, check=False).splitlines()) for host in hosts}


def differences(before: Snapshot, after: Snapshot) -> dict[str, list[str]]:
    """Lines that stand in one of the two alone, by host."""
    return {host: sorted(before[host] ^ after[host]) for host in before if before[host] != after[host]}


def named(told: Json, **wanted: str) -> list[Json]:
    """The changes whose fields are these."""
    return [change for change in told["changes"] if all(change[key] == value for key, value in wanted.items())]


# ------------------------------------------------------------------ bare


def test_bare_hosts_are_planned_to_the_end(lab_of: Maker) -> None:
    """No role stumbles over what an earlier one would only have made."""
    lab = lab_of("plantest", "--workers", "1")
    before = snapshot(lab, ("head", "worker1"))
    told = plan(lab)
    assert differences(before, snapshot(lab, ("head", "worker1"))) == {}
    assert (told["failed"], told["unreachable"], told["complete"]) == ([], [], True)
    assert {host: item["state"] for host, item in told["hosts"].items()} == {"head": "planned", "worker1": "planned"}
    roles = {change["role"] for change in told["changes"] if change["host"] == "worker1"}
    assert {"baseline", "model_store", "host_agent", "ray_node"} <= roles
    assert named(told, host="worker1", what="package", name="libnuma1", actual="missing")
    assert named(told, host="worker1", what="user", name="ray", actual="missing")
    assert named(told, host="head", what="app", name="tiny", actual="missing")
    assert told["disruptions"] == [], "where nothing runs, nothing is disrupted"


# ------------------------------------------------------------------ converged


def test_a_converged_cluster_would_not_change(cluster: Cluster) -> None:
    before = snapshot(cluster)
    told = plan(cluster)
    assert differences(before, snapshot(cluster)) == {}
    assert (told["changes"], told["disruptions"]) == ([], [])
    assert {item["node"] for item in told["hosts"].values()} == {"running"}
    people = clusterkit("plan", "-i", str(cluster.inventory))
    assert (people.returncode, people.stdout) == (0, "nothing would change\n")


# ------------------------------------------------------------------ what would be disrupted


@pytest.mark.parametrize("consent", [False, True])
def test_a_stale_node_names_its_replicas_and_whether_it_would_be_restarted(cluster: Cluster, consent: bool) -> None:
    before = snapshot(cluster)
    change = {"clusterkit_environment": {"SITE_MARK": "1"}, "clusterkit_allow_disruption": consent}
    told = plan(cluster, "-e", json.dumps(change))
    assert differences(before, snapshot(cluster)) == {}
    found = {item["host"]: item for item in told["disruptions"] if item["what"] == "node"}
    assert set(found) == set(HOSTS)
    assert found["worker1"]["replicas"]["tiny"] >= 1
    # Ray's head takes everything with it.
    assert found["head"]["replicas"]["tiny"] > found["worker1"]["replicas"]["tiny"]
    assert {item["would_happen"] for item in found.values()} == {consent}


def test_a_secret_of_the_environment_is_in_no_plan(cluster: Cluster) -> None:
    told = plan(cluster, "-e", '{"clusterkit_environment": {"HF_TOKEN": "hush-hush"}}', "--limit", "worker1")
    assert told["changes"]
    assert "hush-hush" not in json.dumps(told)


# ------------------------------------------------------------------ hosts that cannot be asked


def test_a_host_that_is_gone_hides_no_other(cluster: Cluster, tmp_path: Path) -> None:
    shutil.copytree(cluster.inventory, tmp_path / "inventory")
    (tmp_path / "inventory/host_vars").mkdir(exist_ok=True)
    # Another address, too: SSH would go on through the connection that is open.
    (tmp_path / "inventory/host_vars/worker2.yml").write_text("ansible_host: 127.0.0.1\nansible_port: 1\n")
    told = plan(Cluster(cluster.name, tmp_path / "inventory"), "--tags", "preflight,baseline", code=1)
    assert [item["host"] for item in told["unreachable"]] == ["worker2"]
    assert {host: item["state"] for host, item in told["hosts"].items()} == {
        "head": "planned",
        "worker1": "planned",
        "worker2": "unreachable",
    }


# ------------------------------------------------------------------ drifted

UNIT = "/etc/systemd/system/clusterkit-ray.service"
CONFIG = "/etc/clusterkit/ray-node.json"
DAEMON = "/etc/docker/daemon.json"
MODEL = "/var/lib/clusterkit/models/tiny-llama"
IMAGE = "clusterkit/vllm:current"


@pytest.fixture(scope="module")
def drifted(cluster: Cluster) -> Iterator[Cluster]:
    """Changed by hand behind the kit's back; put back afterwards with the times that the files had."""
    files = f"{UNIT} {CONFIG} {DAEMON}"
    cluster.on("worker1", f"for file in {files}; do cp -p $file /root/$(basename $file); done")
    cluster.on("worker1", f"echo '# by hand' >> {UNIT}")
    cluster.on("worker1", f"""sed -i 's/"drain_timeout_s": [0-9]*/"drain_timeout_s": 7/' {CONFIG}""")
    cluster.on("worker1", f"""sed -i 's/"max-file": *"[0-9]*"/"max-file": "77"/' {DAEMON}""")
    cluster.on("worker1", "dpkg --force-depends --remove python3-venv")
    cluster.on("worker1", f"touch {MODEL}/extra && chmod 0777 /etc/clusterkit")
    image = cluster.on("worker1", f"docker image inspect -f '{{{{.Id}}}}' {IMAGE}")
    cluster.on("worker1", f"docker image rm {IMAGE}")
    code, said = cluster.container("head").exec_run(["python3", "-c", SERVE_BY_HAND])
    try:
        assert code == 0, said
        yield cluster
    finally:
        cluster.on("worker1", f"for file in {files}; do cp -p /root/$(basename $file) $file; done")
        cluster.on("worker1", f"docker tag {image} {IMAGE}; rm -f {MODEL}/extra; chmod 0755 /etc/clusterkit")
        # The package and the apps are the kit's to bring back.
        cluster.deploy()


def test_what_was_changed_by_hand_is_shown_wanted_against_actual(drifted: Cluster) -> None:
    before = snapshot(drifted)
    told = plan(drifted, "-e", '{"baseline_sysctl": {"net.core.somaxconn": 5000}}')
    assert differences(before, snapshot(drifted)) == {}, "a plan touches nothing"
    assert (told["failed"], told["unreachable"]) == ([], [])

    (unit,) = named(told, host="worker1", name=UNIT)
    assert (unit["what"], "-# by hand" in unit["diff"]) == ("unit", True)
    (config,) = named(told, host="worker1", name=CONFIG)
    assert '"drain_timeout_s": 7' in config["diff"]
    assert named(told, host="worker1", what="package", name="python3-venv", wanted="installed", actual="missing")
    (folder,) = named(told, host="worker1", what="folder", name="/etc/clusterkit")
    assert (folder["wanted"], folder["actual"]) == ({"mode": "0755"}, {"mode": "0777"})
    (model,) = named(told, host="worker1", what="model", name="tiny-llama")
    assert model["actual"] == "extra is not in the manifest"
    (image,) = named(told, host="worker1", role="vllm_image", task="Put the image on the host")
    assert IMAGE in json.dumps(image)
    daemon = json.dumps(named(told, host="worker1", role="container_engine"))
    assert "77" in daemon
    assert DAEMON in daemon
    actual = drifted.on("worker2", "cat /proc/sys/net/core/somaxconn")
    (setting,) = named(told, host="worker2", what="kernel setting")
    assert (setting["name"], setting["wanted"], setting["actual"]) == ("net.core.somaxconn", "5000", actual)
    (app,) = named(told, host="head", what="app")
    assert 77 in app["actual"].values()
    assert app["disrupts"] == [], "a scaling edit replaces no replica"
    # Nobody else is drawn in.
    assert {change["name"] for change in named(told, host="worker2")} <= {
        "net.core.somaxconn",
        "/etc/sysctl.d/60-clusterkit.conf",
    }


def test_people_read_it_too(drifted: Cluster) -> None:
    people = clusterkit("plan", "-i", str(drifted.inventory), "--limit", "worker1")
    assert people.returncode == 0, people.stderr
    assert "-# by hand" in people.stdout
    assert "package python3-venv: missing, wanted installed" in people.stdout
    assert "nothing would change" not in people.stdout
