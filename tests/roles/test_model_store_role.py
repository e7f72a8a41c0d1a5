"""The role model_store as Ansible runs it, on this machine: a plan of nothing, a fetch, a second run, removal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.modules.hub_server import Hub
from tests.support import ROOT, Run

pytestmark = pytest.mark.slow

TOKEN = "hf_a-token-that-nobody-sees"
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(1000)}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("engine") / "env"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--python", sys.executable, str(home)], check=True)
    subprocess.run([*uv, "pip", "install", "--python", str(home / "bin/python"), "huggingface_hub==2.4.0"], check=True)
    return str(home / "bin/python")


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    server.repository().push(FILES)
    server.repository().token = TOKEN
    yield server
    server.close()


class Site:
    """Hosts without root work; each is a folder of its own here."""

    def __init__(self, folder: Path, python: str, hub: Hub) -> None:
        self.folder, self.hub = folder, hub
        self.hosts: dict[str, dict[str, Any]] = {}
        self.common: dict[str, Any] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
            "model_store_python": python,
            "model_store_python_becomes_user": False,
            # The same paths on every host, as on a site.
            "model_store_bin": str(folder / "bin"),
            "model_store_path": str(folder / "models"),
            "model_store_user": "",
            "model_store_managed": False,
            "model_store_endpoint": hub.url,
            "model_store_token": TOKEN,
            "model_store_proxy": {"http": "http://127.0.0.1:9", "https": None, "no_proxy": ["127.0.0.1"]},
            "model_store_ca_bundle": "",
            "model_store_peer_address": "127.0.0.1",
            "model_store_caches_path": str(folder / "cache/engine"),
            "model_store_caches": ["one"],
        }

    def host(self, name: str, path: str) -> Path:
        """A host that needs the model; where it lies there."""
        fetched = {
            "id": "chat",
            "make": None,
            "folder": None,
            "hub": "org/model",
            "revision": "main",
            "allow_patterns": [],
            "ignore_patterns": [],
            "path": str(self.folder / path),
            "weights": True,
        }
        self.hosts[name] = {**self.common, "model_store_models": [fetched]}
        return self.folder / path

    def play(self, *options: str, tasks: str = "main", **more: Any) -> Run:
        task = {"name": "Run the role", "ansible.builtin.include_role": {"name": "model_store", "tasks_from": tasks}}
        play = {"hosts": "all", "gather_facts": False, "tasks": [task]}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        hosts = {name: {**variables, **more} for name, variables in self.hosts.items()}
        (self.folder / "hosts.json").write_text(json.dumps({"all": {"hosts": hosts}}))
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(self.folder / "hosts.json")]
        done = subprocess.run(
            [*command, str(self.folder / "play.yml"), *options],
            env={**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_ROLES_PATH": str(ROOT / "roles")},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        run = Run(done.returncode, done.stdout + done.stderr)
        assert run.code == 0, run.text
        return run

    def sharing(self) -> list[int]:
        """Processes that share this site's models."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.folder / "bin/share-models").encode() in path.read_bytes():
                    found.append(int(path.parent.name))
        return found


@pytest.fixture
def site(tmp_path: Path, engine: str, hub: Hub) -> Iterator[Site]:
    made = Site(tmp_path, engine, hub)
    yield made
    for pid in made.sharing():
        os.kill(pid, signal.SIGKILL)


def changes(run: Run) -> dict[str, int]:
    return {name: int(count) for name, count in re.findall(r"^(\w+) +: .*changed=(\d+)", run.text, re.M)}


def test_a_host_from_nothing_to_nothing(site: Site) -> None:
    model = site.host("here", "models/org--model--main")
    assert site.play("--check").changed == 3
    assert not model.parent.exists()
    assert site.hub.log == []

    # Said as loudly as Ansible can, the token is not in it.
    first = site.play("-vvvv", "--diff")
    assert (model / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert "VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in first.text
    assert TOKEN not in first.text

    asked = len(site.hub.log)
    assert site.play().changed == 0
    assert site.play("--check", model_store_verify=True).changed == 0
    assert len(site.hub.log) == asked
    (site.folder / "cache/engine/two").mkdir(parents=True)
    assert site.play(model_store_caches_kept=0).changed == 1
    assert not (site.folder / "cache/engine/two").exists()

    # Weights that took hours stay; what else lies below clusterkit.paths is taken by the playbook, where data is to go.
    site.play(tasks="remove")
    assert (model / "model.safetensors").exists()
    assert list((site.folder / "bin").iterdir()) == []


def test_the_others_have_it_from_the_peer(site: Site) -> None:
    places = [site.host("first", "models/m"), site.host("second", "second/m"), site.host("third", "third/m")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
    run = site.play("-vvvv", model_store_peer="first")
    assert [(place / "model.safetensors").read_bytes() for place in places] == [FILES["model.safetensors"]] * 3
    assert sorted(site.hub.gets()) == sorted(FILES)
    assert len(site.sharing()) == 1
    assert TOKEN not in run.text
    asked = len(site.hub.log)
    assert set(changes(site.play(model_store_peer="first")).values()) == {0}

    # A host that comes later, with the run limited to it, and with the Hub gone.
    site.hub.close()
    later = site.host("later", "later/m")
    later.parent.mkdir()
    site.play("--limit", "later", model_store_peer="first")
    assert (later / "config.json").read_bytes() == FILES["config.json"]
    assert len(site.hub.log) == asked


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        ({}, "(cannot share"),
        ({"ansible_connection": "ssh", "ansible_host": "127.0.0.1", "ansible_port": 9}, "(it cannot be reached)"),
    ],
)
def test_without_the_peer_the_hub_is_asked(site: Site, peer: dict[str, Any], why: str) -> None:
    place = site.host("second", "second/m")
    place.parent.mkdir()
    site.host("first", "models/m")
    site.hosts["first"] |= peer
    run = site.play("--limit", "second", model_store_peer="first", model_store_peer_address="192.0.2.1")
    assert "first shares nothing " + why in " ".join(run.text.split())
    assert (place / "config.json").read_bytes() == FILES["config.json"]
