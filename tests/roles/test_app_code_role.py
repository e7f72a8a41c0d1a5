"""The role app_code as Ansible runs it, on this machine: a plan, the first run, a second, another code, removal."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from clusterkit import app_code
from serve_apps.template import AppCode
from tests.support import ROOT, Run, ansible_playbook


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


# ------------------------------------------------------------------ playbooks/serve.yml

PRICES = {"code": "../shop", "import_path": "main:app"}


class Cluster:
    """A head and two workers, all on this machine; `away` takes no connection."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.apps = folder, folder / "host/state/node/cache/apps"
        self.vars = folder / "inventory/group_vars/all/main.yml"
        self.vars.parent.mkdir(parents=True)
        (folder / "shop").mkdir()
        (folder / "shop/main.py").write_text("app = None\n")
        local = {"ansible_connection": "local"}
        hosts = {
            "head": {**local, "clusterkit_node_ip": "127.0.0.1"},
            "worker": {**local, "clusterkit_node_ip": "127.0.0.2"},
            "away": {"ansible_host": "127.0.0.3", "ansible_port": 1},
        }
        pool = {"hosts": dict.fromkeys(("worker", "away")), "vars": {"clusterkit_accelerator": "cpu"}}
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

    def serve(self, *options: str) -> Run:
        return ansible_playbook(ROOT, "-i", str(self.folder / "inventory"), "playbooks/serve.yml", *options)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    os.mkdir(tmp_path / "home")
    return Cluster(tmp_path)


PUT, CODE = "TASK [serve_apps : Apply the Serve config]", "TASK [app_code : Put the apps' code in place]"


def test_the_config_is_sent_only_after_every_host_has_the_code(cluster: Cluster) -> None:
    """There is no Ray here: that the config was to be sent shows in the task's name."""
    run = cluster.serve("--forks", "1")
    assert len(list(cluster.apps.iterdir())) == 1
    # A host that cannot be reached runs no replica, and keeps nobody from an app.
    assert run.text.index(CODE) < run.text.index(PUT)
    assert "away" in run.text

    # One that takes no code would start one.
    (cluster.folder / "inventory/host_vars").mkdir()
    (cluster.folder / "inventory/host_vars/worker.yml").write_text("app_code_path: /proc/none/apps\n")
    stopped = cluster.serve("--forks", "1")
    assert stopped.code != 0
    assert PUT not in stopped.text
    assert "/proc/none/apps cannot be written" in stopped.text
    assert "nothing was sent to Serve: the code of the apps is not on worker" in stopped.text


def test_without_code_no_host_is_asked(cluster: Cluster) -> None:
    cluster.write([])
    run = cluster.serve("--limit", "worker,away")
    assert run.code == 0, run.text
    assert CODE not in run.text
    assert "away" not in run.text.split("PLAY RECAP")[0].split("Put the apps' code on every host")[1]
