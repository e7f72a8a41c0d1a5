"""`clusterkit app`: what it prints, and with which code it ends. The cluster is a page of what Serve answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import operations, runner
from clusterkit import plan as planning
from clusterkit.errors import RunFailed
from clusterkit.runner import Options, Result

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/modules/fixtures"
Json = dict[str, Any]

# Stands for the head's Ray environment: every config is as Ray's schema wants it.
SCHEMA = f"""#!{sys.executable}
import json, sys
given = json.load(sys.stdin)
want = {{"proxy_location": "EveryNode", "http_options": {{}}, "grpc_options": {{}}, "target_capacity": None}}
want["applications"] = {{app["name"]: app for app in given["config"]["applications"]}}
print(json.dumps({{"unknown": [], "errors": [], "want": want, "have": given["have"], "surge": True, "ray": "2.60.0"}}))
"""


class Site:
    """An inventory for this machine, and what answers as its head's dashboard."""

    def __init__(self, folder: Path, short: Path) -> None:
        self.folder, self.short = folder, short
        self.answers: dict[str, Any] = {}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0].rstrip("/")
                self.send_response(200 if path in site.answers else 404)
                self.end_headers()
                self.wfile.write(json.dumps(site.answers.get(path, "")).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        for name in ("root/ray-env/bin", "state/node"):
            (short / name).mkdir(parents=True)
        (short / "root/ray-env/bin/python").write_text(SCHEMA)
        (short / "root/ray-env/bin/python").chmod(0o755)
        (short / "state/node/token").write_text("0123456789abcdef\n")
        self.write()

    def write(self, **parameters: Any) -> None:
        here = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
        hosts = {
            "all": {
                "hosts": {"box": {**here, "clusterkit_node_ip": "127.0.0.1"}},
                "children": {
                    "ray_head": {"hosts": {"box": None}},
                    "ray_workers": {"children": {"cpus": {"hosts": {"box": None}}}},
                },
            }
        }
        paths = {name: str(self.short / name) for name in ("root", "config", "state", "log", "models")}
        app = {"name": "tiny", "template": "llm", "route_prefix": "/"}
        app["parameters"] = {"model_id": "tiny-llama", "model_source": {"make": "tiny-llama"}, **parameters}
        facts = {
            "clusterkit_name": "box",
            "clusterkit_stack": "cpu",
            "clusterkit_paths": {**paths, "ray_temp": str(self.short / "ray")},
            "clusterkit_ports": {"dashboard": self.server.server_port},
            "clusterkit_apps": [app],
        }
        for name, content in {
            "hosts.yml": hosts,
            "group_vars/all.yml": facts,
            "group_vars/cpus.yml": {"clusterkit_accelerator": "cpu", "clusterkit_cpus": 4},
        }.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(yaml.safe_dump(content))

    def runs(self, app: Json) -> None:
        """The declared app runs, as the recorded one did."""
        have = json.loads((FIXTURES / "running_llm.json").read_text())
        have["applications"]["tiny"]["deployed_app_config"] = app
        replicas = [
            replica
            for deployment in have["applications"]["tiny"]["deployments"].values()
            for replica in deployment["replicas"]
        ]
        node = {"node_id": "n1", "state": "ALIVE", "labels": {}, "is_head_node": True, "resources_total": {"CPU": 4.0}}
        actor = {"state": "ALIVE", "node_id": "n1", "required_resources": {"CPU": 1.5}, "placement_group_id": None}
        listed = {"nodes": [node], "placement_groups": []}
        listed["actors"] = [{**actor, "name": replica["actor_name"]} for replica in replicas]
        self.answers = {"/api/serve/applications": have}
        for kind, rows in listed.items():
            self.answers[f"/api/v0/{kind}"] = {"data": {"result": {"result": rows}}}

    def clusterkit(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "XDG_STATE_HOME": str(self.folder / "log"), "COLUMNS": "200"}
        command = [sys.executable, "-m", "clusterkit", *words, "-i", str(self.folder)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    def declared(self) -> Json:
        done = self.clusterkit("render", "serve", "--json")
        assert done.returncode == 0, done.stderr
        (app,) = json.loads(done.stdout)["applications"]
        return dict(app)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    # Ray's sockets need a short path.
    short = Path(tempfile.mkdtemp(prefix="ck-"))
    running = Site(tmp_path, short)
    yield running
    running.server.shutdown()
    running.server.server_close()
    shutil.rmtree(short)


def test_what_runs_and_what_a_change_means(site: Site) -> None:
    site.runs(site.declared())
    done = site.clusterkit("app", "list")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("tiny ")]
    for part in ("RUNNING", "LLMServer:tiny-llama 1/1", "tiny-llama", "20"):
        assert part in line
    done = site.clusterkit("app", "diff")
    assert done.stdout == "nothing would change\n", done.stderr

    site.write(engine_kwargs={"max_model_len": 512})
    told = json.loads(site.clusterkit("app", "diff", "--json").stdout)
    (rollout,) = told["rollouts"]
    # 2 replicas of 1.5 CPUs on 4 CPUs: no room for another two.
    assert (rollout["how"], rollout["room"]) == ("in_place", 0)
    assert "LLMServer:tiny-llama has none, its only replica" in told["changes"][0]["note"]

    done = site.clusterkit("app", "effective", "tiny")
    options = yaml.safe_load(done.stdout)["deployments"]["LLMServer:tiny-llama"]
    assert options["health_check_period_s"] == 10


def test_a_cluster_that_does_not_answer(site: Site) -> None:
    site.server.shutdown()
    site.server.server_close()
    done = site.clusterkit("app", "list")
    assert done.returncode == 0, done.stderr
    assert "Ray does not answer" in done.stderr
    told = json.loads(site.clusterkit("app", "diff", "--json").stdout)
    assert told["reachable"] is False
    assert [(change["name"], change["actual"]) for change in told["changes"]] == [("tiny", "missing")]


def test_a_rollback_needs_something_that_ran(site: Site) -> None:
    site.runs(site.declared())
    folder = site.short / "state/serve_history"
    folder.mkdir()
    entry = {
        "number": 7,
        "time": "2026-11-22T06:00:00Z",
        "why": "applied",
        "outcome": "failed",
        "message": "boom\n at x",
    }
    entry |= {"digest": "0", "restored": 6, "seconds": {}, "config": {"applications": [{"name": "tiny"}]}}
    (folder / "000007.json").write_text(json.dumps(entry))
    done = site.clusterkit("app", "rollback", "--to", "7")
    assert done.returncode == 1
    assert "config 7 was never seen to run: none is known that ran" in done.stderr
    done = site.clusterkit("app", "list", "--history")
    assert "boom; number 6 was put back" in done.stdout


def test_apply_runs_only_what_apps_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, Options]] = []

    def run(playbook: str, _inventory: str, options: Options, **_: Any) -> Result:
        asked.append((playbook, options))
        return Result(folder=tmp_path)

    monkeypatch.setattr(runner, "run", run)
    operations.apply_apps("inventory/local", rollout="one_at_a_time")
    ((playbook, options),) = asked
    assert playbook == "site.yml"
    assert options.tags == "model_store,app_code,serve_apps,verify"
    assert [json.loads(item) for item in options.extra_vars] == [{"serve_apps_rollout": "one_at_a_time"}]


def test_what_the_inventory_keeps_secret_is_in_no_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither by a name that the head could know for a secret's, nor in Serve's own words."""
    args = {"greeting": "***", "mirror": "http://kit:***@mirror.example/x"}
    cluster = {"apps": [{"name": "greet", "args": args}]}
    said = "cannot reach http://kit:hush@mirror.example/x"
    change: Json = {"what": "app", "name": "greet", "wanted": {"args.greeting": "hush", "args.size": 2}}
    change["actual"] = {"args.greeting": "hush-hush", "args.size": 1}
    running: Json = {"name": "greet", "status": "RUNNING", "message": said}
    running["deployments"] = {"Greeter": {"message": said, "replicas": []}}
    config = {"config": {"args": {"greeting": "hush", "size": 1, "words": ["hello"]}}}
    seen: Json = {
        "reachable": True,
        "applications": {"greet": running},
        "changes": [change],
        "history": [{"number": 1, "message": said}],
        "effective": {"applications": {"greet": config}},
        "number": 1,
    }
    tasks: Json = {planning.SPEC_TASK: {"cluster": cluster}, operations.APPS_TASK: seen, operations.ROLLBACK_TASK: seen}
    result = Result(folder=tmp_path, results={task: {"box": answer} for task, answer in tasks.items()})
    monkeypatch.setattr(runner, "run", lambda *_, **__: result)
    told = operations.apps("inventory/local")
    assert "hush" not in json.dumps(asdict(told))
    assert told.changes[0]["wanted"] == {"args.greeting": planning.HIDDEN, "args.size": 2}
    assert told.effective["applications"]["greet"]["config"]["args"]["words"] == ["hello"]
    assert told.apps[0]["message"].startswith("cannot reach ")
    back = operations.rollback_apps("inventory/local")
    assert "hush" not in json.dumps(back.changes)
    assert back.changes[0]["actual"]["args.size"] == 1


def test_the_tasks_that_it_knows_by_name_are_there() -> None:
    text = "".join(path.read_text() for path in ROOT.glob("roles/serve_apps/tasks/*.yml"))
    for name in (operations.APPS_TASK, operations.ROLLBACK_TASK):
        assert f"- name: {name}\n" in text


def test_a_failed_apply_tells_its_data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from clusterkit.cli.main import main

    def fail(*_: Any, **__: Any) -> None:
        raise RunFailed(host="box", role="serve_apps", task="Apply the Serve config", message="app tiny", log="x")

    monkeypatch.setattr(operations, "apply_apps", fail)
    with pytest.raises(SystemExit) as ended:
        main(["app", "apply", "--json"])
    assert ended.value.code == 1
    assert json.loads(capsys.readouterr().out)["error"] == "app tiny"
