"""The roles autoscaler and ray_node of an autoscaled cluster, run on this machine: its hosts are folders."""

from __future__ import annotations

import copy
import getpass
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit.render.autoscaler import autoscaler
from clusterkit.spec.cluster import ClusterSpec
from tests.support import ROOT, Run, ansible_playbook, load_script
from tests.unit.test_spec import spec_of

Json = dict[str, Any]

POOL: Json = {"clusterkit_accelerator": "cpu", "clusterkit_cpus": 4}
SCALED: Json = {**POOL, "clusterkit_pool": {"mode": "autoscaled"}}
CPU: Json = {"clusterkit_stack": "cpu"}

# As much of Ray as the check imports, constructed: which config it takes is Ray's business (test_render_autoscaler.py).
CONSTRUCTED_RAY = {
    "autoscaler/node_provider.py": "class NodeProvider:\n    def __init__(self, config, name):\n        pass\n",
    "autoscaler/tags.py": "\n".join(
        f"{name} = {name!r}"
        for name in (
            "NODE_KIND_HEAD",
            "NODE_KIND_WORKER",
            "STATUS_UNINITIALIZED",
            "STATUS_UP_TO_DATE",
            "TAG_RAY_NODE_KIND",
            "TAG_RAY_NODE_NAME",
            "TAG_RAY_NODE_STATUS",
            "TAG_RAY_USER_NODE_TYPE",
        )
    ),
    "autoscaler/_private/providers.py": """
import importlib
def _get_node_provider_cls(config):
    module, _, name = config["module"].rpartition(".")
    return getattr(importlib.import_module(module), name)
""",
    "autoscaler/v2/instance_manager/config.py": """
class AutoscalingConfig:
    def __init__(self, data, skip_content_hash):
        self.get_config = data.__getitem__
        data["setup_commands"]
    def get_node_type_configs(self):
        return self.get_config("available_node_types")
    def get_head_node_type(self):
        return self.get_config("head_node_type")
    def disable_node_updaters(self):
        return True
    def get_provider_config(self):
        return self.get_config("provider")
""",
}


def cluster_of(pool: Json = SCALED, **changes: Any) -> Json:
    """The fact `clusterkit`, as validation publishes it."""
    spec: ClusterSpec = spec_of(CPU, {"cpus": pool}, {"w1": "cpus", "w2": "cpus"}, **changes)
    published = {**spec.published(), "autoscaler": autoscaler(spec)}
    assert isinstance(published, dict)
    return published


def program(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def play(folder: Path, hosts: str, tasks: list[Json], *words: str, **variables: Any) -> Run:
    given = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, **variables}
    plays = [{"name": "Test", "hosts": "all", "gather_facts": False, "tasks": tasks}]
    (folder / "play.yml").write_text(yaml.safe_dump(plays))
    (folder / "given.json").write_text(json.dumps(given))
    return ansible_playbook(folder, "-i", hosts, "-e", "@given.json", "play.yml", *words)


# --------------------------------------------------------------------------- autoscaler


class Head:
    """What the role makes of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.etc = folder / "etc/autoscaler"
        for name, text in CONSTRUCTED_RAY.items():
            program(folder / "ray-env/ray" / name, text)
        self.python = folder / "bin/python"
        self.config: Json | None = cluster_of()["autoscaler"]["config"]

    def has_ray(self) -> None:
        program(self.python, f'#!/bin/sh\nPYTHONPATH={self.folder}/ray-env exec {sys.executable} "$@"\n')

    def run(self, *words: str) -> Run:
        tasks = [{"name": "Run the role", "ansible.builtin.import_role": {"name": "autoscaler"}}]
        given = {"autoscaler_path": str(self.etc), "autoscaler_python": str(self.python)}
        return play(self.folder, "h1,", tasks, *words, **given, autoscaler_config=self.config)

    def files(self) -> dict[str, str]:
        return {str(path.relative_to(self.etc)): path.read_text() for path in self.etc.rglob("*") if path.is_file()}


@pytest.fixture
def head(tmp_path: Path) -> Head:
    return Head(tmp_path)


def test_the_head_gets_the_provider_and_the_config_and_keeps_them(head: Head) -> None:
    planned = head.run("--check", "--diff")
    assert planned.code == 0, planned.text
    assert planned.changed > 0
    assert not head.etc.exists()

    head.has_ray()
    assert head.run().changed > 0
    made = head.files()
    package = ROOT / "clusterkit"
    sources = [package / "__init__.py", *package.glob("node_provider/*.py")]
    wanted = {f"lib/{path.relative_to(ROOT)}": path.read_text() for path in sources}
    assert {name: text for name, text in made.items() if name.startswith("lib/")} == wanted
    assert set(made) - set(wanted) == {"autoscaling.yaml"}
    assert yaml.safe_load(made["autoscaling.yaml"]) == head.config
    for path in (head.etc, *head.etc.rglob("*")):
        assert path.stat().st_mode & 0o004, f"Ray's user reads {path}"
    again = head.run()
    assert (again.code, again.changed) == (0, 0), again.text

    # What an older kit left behind.
    (head.etc / "lib/clusterkit/node_provider/older.py").touch()
    assert head.run().changed == 1
    assert head.files() == made
    head.config = None
    assert head.run().changed == 1
    assert not head.etc.exists()
    assert head.run().changed == 0


def test_what_ray_does_not_take_is_never_written(head: Head) -> None:
    head.has_ray()
    assert head.run().code == 0
    before = head.files()
    assert head.config is not None
    good = copy.deepcopy(head.config)
    del head.config["setup_commands"]
    for words in ((), ("--check",)):
        refused = head.run(*words)
        assert refused.code != 0
        assert "Ray would not take the autoscaling config" in refused.text
        assert "KeyError: 'setup_commands'" in refused.text
        assert head.files() == before
    head.config = {**good, "provider": {**good["provider"], "module": "clusterkit.node_provider.gone.Provider"}}
    assert "No module named 'clusterkit.node_provider.gone'" in head.run().text
    assert head.files() == before
    # Who takes everything shows what the check is for.
    program(head.python, "#!/bin/sh\ncat >/dev/null\necho '{\"problems\": []}'\n")
    assert head.run().code == 0
    assert head.files() != before


def test_without_ray_nothing_is_written(head: Head) -> None:
    refused = head.run()
    assert refused.code != 0
    assert f"{head.python} cannot be run" in refused.text
    program(head.python, "#!/bin/sh\ncat >/dev/null\necho 'ModuleNotFoundError: ray is broken' >&2\nexit 1\n")
    refused = head.run()
    assert "ray is broken" in refused.text
    assert not head.etc.exists()


# --------------------------------------------------------------------------- ray_node: what a head starts with


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Json]:
    """The launcher's configuration with its generation, in one run of Ansible."""
    folder = tmp_path_factory.mktemp("heads")
    base = cluster_of()
    moved, faster = copy.deepcopy(base), copy.deepcopy(base)
    moved["autoscaler"]["config"]["provider"]["fleet_socket"] = "/run/other/fleet.sock"
    faster["autoscaler"]["environment"]["RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S"] = "60"
    one = {**SCALED, "clusterkit_pool": {"mode": "autoscaled", "max": 1}}
    cases = {"scaled": base, "fixed": cluster_of(POOL), "smaller": cluster_of(one), "moved": moved, "faster": faster}
    render = "{{ __ray_node_config | combine({'generation': __ray_node_generation}) | to_json }}"
    tasks = []
    for name, cluster in cases.items():
        given = {"clusterkit": cluster, "role_path": f"{ROOT}/roles/ray_node", "inventory_hostname": "h1"}
        content = {"content": render, "dest": f"{folder}/{name}.json", "mode": "0600"}
        tasks.append({"name": "Render", "ansible.builtin.copy": content, "vars": given})
    files = [f"{ROOT}/roles/ray_node/{part}/main.yml" for part in ("defaults", "vars")]
    tasks.insert(0, {"name": "Read", "ansible.builtin.include_vars": {"file": files[0]}})
    tasks.insert(1, {"name": "Read", "ansible.builtin.include_vars": {"file": files[1]}})
    done = play(folder, "h1,", tasks)
    assert done.code == 0, done.text
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in cases}


def test_a_head_starts_with_what_the_role_autoscaler_wrote(heads: dict[str, Json]) -> None:
    head = load_script(ROOT / "roles/ray_node/files/ray-node").check_config(heads["scaled"])
    assert head["node_type"] == "head"
    cluster = cluster_of()
    assert head["autoscaler"] == {
        "config": "/etc/clusterkit/autoscaler/autoscaling.yaml",
        "lib": "/etc/clusterkit/autoscaler/lib",
        "environment": cluster["autoscaler"]["environment"],
        "folders": ["/etc/clusterkit/autoscaler", str(Path(cluster["autoscaler"]["fleet"]["socket"]).parent)],
    }
    assert heads["fixed"]["autoscaler"] is None


def test_a_head_is_stale_by_what_it_reads_once_and_by_nothing_else(heads: dict[str, Json]) -> None:
    """The rest of the config it reads anew all the time (test_fleet_ray.py): a host more is no reason to restart it."""
    generation = {name: head["generation"] for name, head in heads.items()}
    assert generation["smaller"] == generation["scaled"]
    others = [generation[name] for name in ("scaled", "fixed", "moved", "faster")]
    assert len(set(others)) == len(others)


# --------------------------------------------------------------------------- ray_node: workers

AGENT = """
import json, os, sys
folder = os.path.dirname(os.path.abspath(__file__))
word = sys.argv[3]
with open(os.path.join(folder, "said"), "a") as out:
    out.write(" ".join(sys.argv[3:]) + "\\n")
path = os.path.join(folder, "state")
if word in ("start", "stop"):
    open(path, "w").write("running" if word == "start" else "stopped")
state = open(path).read()
print(json.dumps({"changed": word in ("start", "stop", "drain"), "state": state, "generation": "g0", "held": None}))
"""


class Workers:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, name: str, state: str) -> None:
        program(self.folder / name / "bin/host-agent", AGENT)
        (self.folder / name / "bin/state").write_text(state)

    def run(self, cluster: Json, *words: str, port: int = 9, **more: Any) -> Run:
        role = {"name": "ray_node", "tasks_from": "run"}
        names = sorted(path.name for path in self.folder.glob("w*"))
        given = {
            "clusterkit": cluster,
            "ray_node_bin": str(self.folder) + "/{{ inventory_hostname }}/bin",
            "ray_node_state_path": str(self.folder / "state"),
            "ray_node_ports": {**cluster["ports"], "dashboard": port},
            "ray_node_head": {**cluster["head"], "host": names[0]},
            "ray_node_user": getpass.getuser(),
            **more,
        }
        tasks = [{"name": "Run the role", "ansible.builtin.import_role": role}]
        return play(self.folder, ",".join(names) + ",", tasks, *words, **given)

    def said(self, name: str) -> list[str]:
        """What its agent was asked to do."""
        lines = (self.folder / name / "bin/said").read_text().splitlines()
        return [line for line in lines if line != "status"]


@pytest.fixture
def workers(tmp_path: Path) -> Workers:
    return Workers(tmp_path)


def test_only_the_fleet_starts_an_autoscaled_node(workers: Workers) -> None:
    workers.add("w1", "stopped")
    workers.add("w2", "degraded")
    for words in (["--check"], []):
        done = workers.run(cluster_of(), *words)
        assert (done.code, done.changed) == (0, 0), done.text
        assert "to be started" not in done.text.replace("Say that the node is to be started", "")
    assert workers.said("w1") == workers.said("w2") == []
    # A fixed one is the role's to start.
    planned = workers.run(cluster_of(POOL), "--check")
    assert planned.changed == 1
    assert workers.run(cluster_of(POOL)).code == 0
    assert workers.said("w1") == workers.said("w2") == ["start"]


def test_a_stale_node_is_left_without_consent(workers: Workers) -> None:
    workers.add("w1", "running")
    done = workers.run(cluster_of())
    assert (done.code, done.changed) == (0, 0), done.text
    assert "still runs with an older configuration" in done.text
    assert workers.said("w1") == []


class Idle(BaseHTTPRequestHandler):
    """A head that serves nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": {"result": {"result": []}}, "applications": {}}')

    def log_message(self, *_args: object) -> None:
        return None


@pytest.fixture
def dashboard() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Idle) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("pool", "started"), [(SCALED, []), (POOL, ["start"])])
def test_by_consent_a_stale_node_is_stopped_and_the_fleet_brings_it_back(
    workers: Workers, dashboard: int, pool: Json, started: list[str]
) -> None:
    workers.add("w1", "running")
    token = workers.folder / "state/node/token"
    token.parent.mkdir(parents=True)
    token.write_text("secret")
    head = {"ray_node_head": {**cluster_of()["head"], "host": "localhost"}}
    done = workers.run(cluster_of(pool), port=dashboard, ray_node_allow_disruption=True, **head)
    assert done.code == 0, done.text
    assert workers.said("w1") == ["drain --deadline", "stop", *started]
