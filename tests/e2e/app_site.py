"""A cluster of one for tests of app templates: a real Ray on this machine, apps brought by playbooks/serve.yml."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support import ROOT, Run, ansible_playbook, free_block


class Site:
    """This machine as a cluster of one, in folders of the test's own."""

    def __init__(self, folder: Path, engine: Path) -> None:
        self.folder, self.engine = folder, engine
        self.inventory = folder / "inventory/mysite"
        shutil.copytree(ROOT / "inventory/local", self.inventory)
        # Below pytest's folders the path would be too long for Ray's sockets.
        self.temp = Path(tempfile.mkdtemp(prefix="cka-", dir="/tmp"))
        base = free_block(40)
        names = ["gcs", "dashboard", "client", "serve", "metrics", "agent_http", "agent_grpc"]
        names += ["node_manager", "object_manager", "runtime_env_agent"]
        self.ports = {name: base + number for number, name in enumerate(names)}
        paths = {name: str(folder / "host" / name) for name in ("root", "config", "state", "log", "models")}
        self.facts: dict[str, Any] = {
            "clusterkit_name": "templates",
            "clusterkit_stack": "cpu",
            "clusterkit_service_user": "{{ lookup('ansible.builtin.pipe', 'id -un') }}",
            "clusterkit_paths": {**paths, "ray_temp": str(self.temp)},
            "clusterkit_ports": {**self.ports, "worker_min": base + 1000, "worker_max": base + 1399},
            "clusterkit_serve": {"http_host": "127.0.0.1", "ready_timeout_s": 300},
            "clusterkit_object_store_gib": 0.2,
            "clusterkit_cpus": 4,
            "ray_node_env_path": str(engine),
            "serve_apps_python": str(engine / "bin/python"),
        }
        self.apps: dict[str, Any] = {}

    def play(self, playbook: str, *options: str) -> Run:
        facts = {**self.facts, "clusterkit_apps": list(self.apps.values())}
        (self.inventory / "group_vars/all/main.yml").write_text(yaml.safe_dump(facts))
        run = ansible_playbook(ROOT, "-i", str(self.inventory), playbook, *options)
        assert run.code == 0, run.text[-6000:]
        return run

    def start(self) -> None:
        self.play("site.yml", "--tags", "host_agent,ray_node")

    def stop(self) -> None:
        launcher, config = self.folder / "host/root/bin/ray-node", self.folder / "host/config/ray-node.json"
        subprocess.run([sys.executable, str(launcher), "--config", str(config), "stop"], timeout=300, check=False)
        shutil.rmtree(self.temp, ignore_errors=True)

    def serve(self, *options: str) -> int:
        """How many tasks changed something."""
        return self.play("playbooks/serve.yml", *options).changed

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.ports['serve']}{path}"

    def ask(self, path: str) -> Any:
        answer = httpx.get(self.url(path), timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def zips(self) -> set[str]:
        return {path.name for path in (self.folder / "host/state/node/cache/apps").glob("*")}


@contextmanager
def app_site(folder: Path, engine: Path) -> Iterator[Site]:
    made = Site(folder, engine)
    try:
        made.start()
        yield made
    finally:
        made.stop()
