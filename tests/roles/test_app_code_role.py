"""The role app_code as Ansible runs it, on this machine: a plan, the first run, a second, another code, removal.

And the playbooks that bring code: hosts are folders.
"""

from __future__ import annotations

import json
import os
import shutil
import socketserver
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import app_code
from serve_apps.template import AppCode
from tests.support import ROOT, Run, ansible_playbook
from tests.unit.test_autoscaled_roles import cluster_of


class Site:
    """A host without root work, and a folder with code on the controller."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.code, self.apps = folder, folder / "shop", folder / "cache/apps"
        self.code.mkdir()
        self.write("SIZE = 1\n")

    def write(self, text: str) -> None:
        (self.code / "main.py").write_text(text)

    def play(self, *options: str, tasks: str = "main", **more: object) -> Run:
        task = {"name": "Run the role", "ansible.builtin.include_role": {"name": "app_code", "tasks_from": tasks}}
        play = {"hosts": "all", "gather_facts": False, "tasks": [task]}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        code = app_code.read(AppCode(folder=str(self.code), module="main"), [])
        variables = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "app_code_path": str(self.apps),
            "app_code_apps": [code.model_dump()],
            "app_code_user": "ray",
            "app_code_managed": False,
            **more,
        }
        (self.folder / "hosts.json").write_text(json.dumps({"all": {"hosts": {"one": variables}}}))
        run = ansible_playbook(self.folder, "-i", "hosts.json", "play.yml", *options)
        assert run.code == 0, run.text
        return run

    def there(self) -> set[str]:
        return {path.name for path in self.apps.iterdir()} if self.apps.exists() else set()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("ANSIBLE_ROLES_PATH", str(ROOT / "roles"))
    # Where files are brought to on the way.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    os.mkdir(tmp_path / "home")
    return Site(tmp_path)


def test_the_life_of_an_apps_code(site: Site) -> None:
    planned = site.play("--check", "--diff")
    assert planned.changed == 1
    assert site.there() == set()

    assert site.play().changed == 1
    (first,) = site.there()
    assert site.play().changed == 0
    assert list((site.folder / "home").glob(".clusterkit-incoming")) == []

    site.write("SIZE = 2\n")
    assert site.play().changed == 1
    assert len(site.there()) == 2
    assert first in site.there()

    assert site.play(tasks="remove").changed == 1
    assert not site.apps.exists()
    assert site.play(tasks="remove").changed == 0


# ------------------------------------------------------------------ playbooks

PRICES = {"code": "../shop", "import_path": "main:app"}
HOSTS = ("head", "worker", "other", "away")
PUT, CODE = "TASK [serve_apps : Apply the Serve config]", "TASK [app_code : Put the apps' code in place]"
WORKERS, LAST = "PLAY [Put the apps' code on every worker]", "PLAY [Put the apps' code on the head]"
KEPT = "nothing was sent to Serve: the code of the apps is not on "


class Cluster:
    """A head and three workers, all on this machine, each with a folder of its own; `away` takes no connection."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.vars = folder / "inventory/group_vars/all/main.yml"
        self.vars.parent.mkdir(parents=True)
        (folder / "shop").mkdir()
        (folder / "shop/main.py").write_text("app = None\n")
        hosts: dict[str, Any] = {}
        for number, name in enumerate(HOSTS, 1):
            hosts[name] = {"ansible_connection": "local", "clusterkit_node_ip": f"127.0.0.{number}"}
            hosts[name]["app_code_path"] = str(self.apps(name))
        hosts["away"] = {"ansible_host": "127.0.0.9", "ansible_port": 1, "ansible_ssh_retries": 0}
        pool = {"hosts": dict.fromkeys(HOSTS[1:]), "vars": {"clusterkit_accelerator": "cpu"}}
        groups = {
            "ray_head": {"hosts": {"head": None}},
            "ray_workers": {"children": {"cpus": pool}},
            "managed_hosts": {},
        }
        text = yaml.safe_dump({"all": {"hosts": hosts, "children": groups}})
        (folder / "inventory/hosts.yml").write_text(text)
        self.write([{"name": "shop", "template": "custom", "route_prefix": "/", "parameters": PRICES}])

    def write(self, apps: list[object]) -> None:
        names = ("root", "config", "state", "log", "models")
        facts = {
            "clusterkit_name": "shop",
            "clusterkit_stack": "cpu",
            "clusterkit_paths": {name: str(self.folder / "host" / name) for name in names} | {"ray_temp": "/tmp/none"},
            "clusterkit_apps": apps,
            "ansible_python_interpreter": sys.executable,
        }
        self.vars.write_text(yaml.safe_dump(facts))

    def apps(self, host: str) -> Path:
        return self.folder / "hosts" / host / "apps"

    def have(self) -> set[str]:
        """The hosts with code."""
        return {host for host in HOSTS if self.apps(host).exists() and list(self.apps(host).glob("*.zip"))}

    def block(self, host: str) -> None:
        """It takes no code: a file is where the folder would be."""
        self.apps(host).parent.mkdir(parents=True)
        self.apps(host).write_text("")

    def play(self, playbook: str, *options: str) -> Run:
        return ansible_playbook(ROOT, "-i", str(self.folder / "inventory"), playbook, "--forks", "1", *options)

    def serve(self, *options: str) -> Run:
        """There is no Ray here: that the config was to be sent shows in the task's name."""
        return self.play("playbooks/serve.yml", *options)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    os.mkdir(tmp_path / "home")
    return Cluster(tmp_path)


def test_the_config_is_sent_only_after_every_host_has_the_code(cluster: Cluster) -> None:
    cluster.block("worker")
    stopped = cluster.serve()
    assert stopped.code != 0
    assert PUT not in stopped.text
    assert "apps is a link of somebody else's, or no folder" in stopped.text
    # A host that cannot be reached runs no replica, and keeps nobody from an app.
    assert f"{KEPT}worker, where" in stopped.text
    # The head comes last: the next run sees that this one was not done.
    assert cluster.have() == {"other"}

    cluster.apps("worker").unlink()
    sent = cluster.serve()
    assert PUT in sent.text, sent.text
    assert cluster.have() == {"head", "worker", "other"}


def test_a_worker_that_was_lost_before_keeps_nobody_from_an_app(cluster: Cluster) -> None:
    """As in site.yml: the play of another role has failed on it."""
    fail = {"ansible.builtin.fail": {}, "when": "inventory_hostname == 'worker'"}
    sick = {"name": "Another role", "hosts": "worker:other", "gather_facts": False, "tasks": [fail]}
    serve = {"ansible.builtin.import_playbook": f"{ROOT}/playbooks/serve.yml"}
    (cluster.folder / "run.yml").write_text(yaml.safe_dump([sick, serve]))
    run = cluster.play(str(cluster.folder / "run.yml"))
    assert PUT in run.text, run.text
    assert KEPT not in run.text
    assert cluster.have() == {"head", "other"}


def test_a_part_of_the_cluster_does_not_send_what_the_others_lack(cluster: Cluster) -> None:
    limited = cluster.serve("--limit", "head,other")
    assert PUT not in limited.text
    assert f"{KEPT}away, worker, where" in limited.text
    assert cluster.have() == {"other"}
    # As it says: the code alone, and then that part.
    assert cluster.serve("--tags", "app_code").code != 2
    assert PUT in cluster.serve("--limit", "head").text


def test_a_deploy_brings_code_before_ray_starts_and_once(cluster: Cluster) -> None:
    """A host that is added gets it as well, without the head."""
    run = cluster.play("site.yml", "--tags", "serve_apps,app_code")
    assert run.text.count(CODE) == 2
    assert run.text.index(WORKERS) < run.text.index(LAST) < run.text.index("PLAY [Run the head]") < run.text.index(PUT)
    shutil.rmtree(cluster.folder / "hosts")
    added = cluster.play("site.yml", "--tags", "serve_apps,app_code", "--limit", "worker")
    assert added.code == 0, added.text
    assert added.text.count(CODE) == 1
    assert cluster.have() == {"worker"}


def test_without_code_no_host_is_asked(cluster: Cluster) -> None:
    cluster.write([])
    run = cluster.serve("--limit", "worker,away")
    assert run.code == 0, run.text
    assert CODE not in run.text
    assert "away" not in run.text.split("PLAY RECAP")[0].split(WORKERS)[1]


# ------------------------------------------------------------------ hosts that are off


class Fleet(socketserver.ThreadingUnixStreamServer):
    """As much of the daemon as the playbook speaks to: `off` is off by policy. Notes each word, and whether the head
    had code by then."""

    def __init__(self, path: str, head: Path, off: str) -> None:
        super().__init__(path, Answer)
        self.head, self.off, self.heard = head, off, list[Any]()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["verb"] != "status":
            self.heard.append((request["verb"], request["hosts"], self.head.exists()))
            return {"ok": True}
        hosts = [self.host(name) for name in HOSTS[1:]]
        return {"ok": True, "hosts": hosts, "pools": {}, "open": [], "trouble": None}

    def host(self, name: str) -> dict[str, Any]:
        state = "off" if name == self.off else "idle"
        return {"host": name, "asked": True, "answers": name != self.off, "state": state, "why": "off"}


class Answer(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Fleet)
        self.wfile.write(json.dumps(self.server.answer(json.loads(self.rfile.readline()))).encode() + b"\n")


@pytest.fixture
def fleet(cluster: Cluster) -> Iterator[Fleet]:
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    with Fleet(f"{folder}/fleet.sock", cluster.apps("head"), "other") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    shutil.rmtree(folder)


def test_no_node_starts_where_the_code_is_not(cluster: Cluster, fleet: Fleet) -> None:
    """Who is off is left out before the head has the code, and so is who does not answer."""
    spec = cluster_of()
    spec["autoscaler"]["fleet"]["socket"] = fleet.server_address
    spec["head"]["host"] = "head"
    spec["hosts"] = {host: {**spec["hosts"]["w1"], "managed": False} for host in HOSTS}
    code = app_code.read(AppCode(folder=str(cluster.folder / "shop"), module="main"), [])
    spec["code"]["apps"] = [code.model_dump()]
    (cluster.folder / "given.json").write_text(json.dumps({"clusterkit": spec, "ansible_become": False}))
    words = ("playbooks/app_code.yml", "-e", f"@{cluster.folder}/given.json")

    cluster.block("worker")
    cluster.play(*words)
    assert fleet.heard == []
    cluster.apps("worker").unlink()
    # As a run that was cut short: workers have it, and the head does not.
    run = cluster.play(*words)
    assert cluster.have() == {"head", "worker"}, run.text
    assert fleet.heard == [("skip", ["other"], False), ("reserve", ["away"], False)]
    again = cluster.play(*words)
    assert len(fleet.heard) == 2, again.text
