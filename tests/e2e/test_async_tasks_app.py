"""The `async_tasks` app on a real Ray with a real Redis: its tasks outlive faults, workers, replicas and Redis.

Needs an engine environment; CLUSTERKIT_TEST_ENGINE names one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.app_site import Site
from tests.redis_server import RedisServer, redis_server
from tests.support import ROOT, until

pytestmark = [pytest.mark.engine, pytest.mark.slow]

README = (ROOT / "serve_apps/async_tasks/README.md").read_text(encoding="utf-8")
PASSWORD = "correct-horse-battery"
PATIENCE_S = 120

# The site's own work, told by its payload how to behave.
JOBS = """
import os
import time


def work(payload, task):
    with open(payload["log"], "a") as log:
        log.write("%d\\n" % os.getpid())
    if task["attempt"] <= payload.get("faults", 0):
        raise RuntimeError("fault %d" % task["attempt"])
    while payload.get("gate") and not os.path.exists(payload["gate"]):
        time.sleep(0.05)
    return {"pid": os.getpid(), "attempt": task["attempt"]}
"""


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder = tmp_path_factory.mktemp("redis")
    (user,) = re.findall(r"^user tasks .*", README, re.MULTILINE)
    for queue in ("jobs", "batch"):
        user += f" ~{{clusterkit:tasks:{queue}}}*"
    users = f"{user.replace('>PASSWORD', f'>{PASSWORD}')}\nuser default on nopass ~* +@all\n"
    (folder / "users.acl").write_text(users)
    # What it says is true is true after its death.
    durable = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_server(folder, "--aclfile", str(folder / "users.acl"), *durable) as running:
        yield running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, engine: Path, redis: RedisServer) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("site"), engine)
    made.facts["clusterkit_environment"] = {"TASKS_REDIS_PASSWORD": PASSWORD}
    code = made.folder / "inventory/jobs-app/jobs"
    code.mkdir(parents=True)
    (code / "work.py").write_text(JOBS)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def where(redis: RedisServer) -> dict[str, Any]:
    return {"redis_url": f"redis://tasks@127.0.0.1:{redis.port}/0", "redis_password_env": "TASKS_REDIS_PASSWORD"}


# --------------------------------------------------------------------------- the example of the README


@pytest.fixture(scope="module")
def reports(site: Site, redis: RedisServer) -> str:
    """Its app, its file, and nothing but the address of Redis changed."""
    ((name, content),) = re.findall(r"`(reports/\w+\.py)`:\n\n```python\n(.*?)```", README, re.DOTALL)
    path = site.folder / "inventory/reports-app" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    (app,) = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])["clusterkit_apps"]
    app["parameters"] |= where(redis)
    site.apps["reports"] = app
    # A plan says what would come, and brings nothing.
    assert site.serve("--check") == 2
    assert site.serve() == 2
    assert site.serve() == 0
    return str(app["route_prefix"])


def test_the_commands_of_the_readme(site: Site, reports: str) -> None:
    shown = re.findall(r"^\$ (curl .*)\n(\{.*\})$", README, re.MULTILINE)
    assert len(shown) == 2
    (left, answered), (asked, result) = ((command, json.loads(answer)) for command, answer in shown)

    def curl(command: str) -> Any:
        words = command.replace("http://HEAD:8000", site.url("")).replace("curl", "curl -sS --max-time 60", 1)
        done = subprocess.run(words, shell=True, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    submitted = curl(left)
    assert submitted.keys() == answered.keys()
    assert submitted["state"] == answered["state"]

    def ended() -> Any:
        found = curl(asked.replace(result["id"], submitted["id"]))
        return found if found["state"] == result["state"] else None

    # The worker is started for it.
    found = until(ended, "no result", patience_s=PATIENCE_S)
    assert found["result"] == result["result"]
    assert found.keys() == result.keys()


def test_what_another_attempt_cannot_mend_gets_none(site: Site, reports: str) -> None:
    task = Task(site, reports, {"sales": []})
    assert task.ended()["state"] == "failed"
    assert (task.now["error"], task.now["attempts"]) == ("ValueError: there is nothing to report", 1)
    site.apps.pop("reports")
    site.serve()


# --------------------------------------------------------------------------- faults


class Task:
    """One that was submitted."""

    def __init__(self, site: Site, route: str, payload: Any, key: str = "") -> None:
        self.site, self.route = site, route
        headers = {"Idempotency-Key": key} if key else {}
        answer = httpx.post(site.url(f"{route}/tasks"), json=payload, headers=headers, timeout=60)
        assert answer.status_code == 202, answer.text
        self.id, self.where = answer.json()["id"], answer.headers["location"]
        assert answer.headers["location"] == f"{route}/tasks/{self.id}"

    @property
    def now(self) -> dict[str, Any]:
        found: dict[str, Any] = self.site.ask(self.where)
        return found

    def ended(self) -> dict[str, Any]:
        def ended() -> Any:
            found = self.now
            return found if found["state"] in ("succeeded", "failed") else None

        found: dict[str, Any] = until(ended, lambda: self.now, patience_s=PATIENCE_S, pause_s=0.1)
        return found


@pytest.fixture(scope="module")
def parameters(site: Site, redis: RedisServer) -> dict[str, Any]:
    """Of the app that runs: to be edited."""
    given: dict[str, Any] = {
        **where(redis),
        "code": "../jobs-app",
        "import_path": "jobs.work:work",
        "max_retries": 2,
        "retry_backoff_s": 0.2,
        "lease_s": 3,
        "cpus_per_replica": 0.5,
        "num_replicas": 1,
        "health_check_period_s": 1,
    }
    site.apps["jobs"] = {"name": "jobs", "template": "async_tasks", "route_prefix": "/jobs", "parameters": given}
    site.serve()
    return given


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    path.touch()
    return path


def pids(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()]


def first_pid(log: Path) -> int:
    return int(until(lambda: pids(log), "nobody began", patience_s=PATIENCE_S)[0])


def replicas(site: Site, deployment: str, app: str = "jobs") -> list[int]:
    """Pids of those that run."""
    token = (site.folder / "host/state/node/token").read_text().strip()
    url = f"http://127.0.0.1:{site.ports['dashboard']}/api/serve/applications/"
    answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60).json()
    # While Serve takes in a new configuration, the app has none.
    found = answer["applications"][app]["deployments"].get(deployment, {"replicas": []})["replicas"]
    return [item["pid"] for item in found if item["state"] == "RUNNING"]


def test_what_fails_twice_works_then(site: Site, parameters: Any, log: Path) -> None:
    task = Task(site, "/jobs", {"log": str(log), "faults": 2})
    found = task.ended()
    assert (found["state"], found["attempts"], found["result"]["attempt"]) == ("succeeded", 3, 3)
    assert len(pids(log)) == 3


def test_what_always_fails_is_a_dead_letter_until_someone_tries_it_again(
    site: Site, parameters: Any, log: Path
) -> None:
    payload = {"log": str(log), "faults": 4}
    task = Task(site, "/jobs", payload)
    assert (task.ended()["state"], task.now["attempts"], task.now["error"]) == ("failed", 3, "RuntimeError: fault 3")
    letters = site.ask("/jobs/dead-letters")
    assert letters["total"] == 1
    assert {**task.now, "payload": payload} == letters["tasks"][0]
    assert site.ask("/jobs/queue") == {"queued": 0, "running": 0, "retrying": 0, "failed": 1}

    answer = httpx.post(site.url(f"/jobs/dead-letters/{task.id}/retry"), timeout=60)
    assert (answer.status_code, answer.json()) == (202, {"id": task.id, "state": "queued"})
    assert (task.ended()["state"], task.now["attempts"]) == ("succeeded", 5)
    assert site.ask("/jobs/dead-letters") == {"total": 0, "tasks": []}
    assert httpx.post(site.url(f"/jobs/dead-letters/{task.id}/retry"), timeout=60).status_code == 409


def test_a_worker_that_is_killed_loses_no_task(site: Site, parameters: Any, log: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    tasks = [Task(site, "/jobs", {"log": str(log), "gate": str(gate)}) for _ in range(3)]
    killed = first_pid(log)
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(pids(log)) > 1, "it was not begun again", patience_s=PATIENCE_S)
    gate.touch()
    found = [task.ended() for task in tasks]
    assert {item["state"] for item in found} == {"succeeded"}
    assert killed not in {item["result"]["pid"] for item in found}
    # And that is no attempt of the others.
    assert sorted(item["attempts"] for item in found) == [1, 1, 2]


def test_an_api_replica_that_is_killed_stops_nothing(site: Site, parameters: Any, log: Path, tmp_path: Path) -> None:
    """The one that is worked on is not begun again, though it takes longer than a lease; the others wait for it."""
    gate = tmp_path / "gate"
    tasks = [Task(site, "/jobs", {"log": str(log), "gate": str(gate)}) for _ in range(3)]
    worker = first_pid(log)
    (api,) = replicas(site, "Api")
    os.kill(api, signal.SIGKILL)
    until(lambda: replicas(site, "Api") not in ([], [api]), "no other came", patience_s=PATIENCE_S)
    until(lambda: answers(site, "/jobs/queue"), "it does not answer", patience_s=PATIENCE_S)
    tasks.append(Task(site, "/jobs", {"log": str(log)}))
    gate.touch()
    found = [task.ended() for task in tasks]
    assert {(item["state"], item["attempts"]) for item in found} == {("succeeded", 1)}
    assert {item["result"]["pid"] for item in found} == {worker}


def answers(site: Site, path: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(site.url(path), timeout=60).status_code == 200
    return False


def test_an_update_loses_no_task_and_cuts_none(
    site: Site, parameters: dict[str, Any], log: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    tasks = [Task(site, "/jobs", {"log": str(log), "gate": str(gate)}) for _ in range(4)]
    old = first_pid(log)
    parameters["env_vars"] = {"JOBS": "2"}
    with ThreadPoolExecutor(1) as beside:
        update = beside.submit(site.serve)
        try:
            until(lambda: set(replicas(site, "Worker")) - {old}, "no new worker", patience_s=PATIENCE_S)
        finally:
            gate.touch()
        assert update.result() == 1
    found = [task.ended() for task in tasks]
    assert {(item["state"], item["attempts"]) for item in found} == {("succeeded", 1)}
    assert found[0]["result"]["pid"] == old
    assert replicas(site, "Worker") not in ([], [old])


def test_redis_that_goes_and_comes_back(
    site: Site, redis: RedisServer, parameters: Any, log: Path, tmp_path: Path
) -> None:
    """What is worked on meanwhile is ended, once; requests are told to come again."""
    gate = tmp_path / "gate"
    task, waiting = (Task(site, "/jobs", {"log": str(log), "gate": str(gate)}) for _ in range(2))
    first_pid(log)
    redis.stop()
    for method, path in (("POST", "/jobs/tasks"), ("GET", task.where)):
        answer = httpx.request(method, site.url(path), content=b"1", timeout=60)
        assert answer.status_code == 503
        assert "127.0.0.1" not in answer.text
    gate.touch()
    redis.start()
    assert (task.ended()["state"], task.now["attempts"]) == ("succeeded", 1)
    assert waiting.ended()["state"] == "succeeded"


def test_the_same_key_is_the_same_task(site: Site, parameters: Any, log: Path) -> None:
    payload = {"log": str(log)}
    first = Task(site, "/jobs", payload, "order 7")
    first.ended()
    assert Task(site, "/jobs", payload, "order 7").id == first.id
    assert len(pids(log)) == 1
    answer = httpx.post(site.url("/jobs/tasks"), json={}, headers={"Idempotency-Key": "order 7"}, timeout=60)
    assert answer.status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/tasks", b"no json", 400),
        ("POST", "/tasks", b"", 400),
        ("POST", "/tasks", b"[NaN]", 400),
        ("POST", "/tasks", b"[" * 100000, 400),
        ("POST", "/tasks", b'"' + b"x" * 1048576 + b'"', 413),
        ("GET", "/tasks", b"", 405),
        ("GET", "/tasks/none", b"", 404),
        ("POST", "/dead-letters/none/retry", b"", 404),
        ("GET", "/dead-letters?limit=0", b"", 400),
        ("GET", "/dead-letters?limit=all", b"", 400),
        ("GET", "/nothing", b"", 404),
    ],
)
def test_what_is_refused(site: Site, parameters: Any, method: str, path: str, content: bytes, status: int) -> None:
    answer = httpx.request(method, site.url(f"/jobs{path}"), content=content, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_another_rule_replaces_no_worker_and_a_time_limit_that_is_exceeded_does(
    site: Site, parameters: dict[str, Any], log: Path, tmp_path: Path
) -> None:
    before = replicas(site, "Worker")
    parameters |= {"task_timeout_s": 1, "max_retries": 0}
    assert site.serve() == 1
    assert replicas(site, "Worker") == before
    task = Task(site, "/jobs", {"log": str(log), "gate": str(tmp_path / "gate")})
    assert (task.ended()["state"], task.now["error"]) == ("failed", "not done in 1 s")
    parameters |= {"task_timeout_s": 600}
    try:
        until(lambda: replicas(site, "Worker") not in ([], before), "the stuck worker stayed", patience_s=PATIENCE_S)
    finally:
        (tmp_path / "gate").touch()
    assert Task(site, "/jobs", {"log": str(log)}).ended()["state"] == "succeeded"


def test_what_waits_brings_workers_and_when_it_is_done_they_go(
    site: Site, parameters: dict[str, Any], log: Path, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    del parameters["num_replicas"]
    parameters |= {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 0, "downscale_delay_s": 1}
    site.serve()
    until(lambda: replicas(site, "Worker") == [], "idle workers stayed", patience_s=PATIENCE_S)
    assert site.ask("/jobs/queue")["queued"] == 0
    tasks = [Task(site, "/jobs", {"log": str(log), "gate": str(gate)}) for _ in range(12)]
    until(lambda: len(set(pids(log))) == 3, lambda: replicas(site, "Worker"), patience_s=PATIENCE_S)
    counted = site.ask("/jobs/queue")
    assert (counted["running"], counted["queued"]) == (3, 9)
    gate.touch()
    found = [task.ended() for task in tasks]
    assert {(item["state"], item["attempts"]) for item in found} == {("succeeded", 1)}
    until(lambda: replicas(site, "Worker") == [], "idle workers stayed", patience_s=PATIENCE_S)


def test_payloads_go_on_to_another_app(site: Site, redis: RedisServer, parameters: Any, log: Path) -> None:
    forwarding = {**where(redis), "cpus_per_replica": 0.1, "forward_to": site.url("/jobs/tasks")}
    entry = {"name": "batch", "template": "async_tasks", "route_prefix": "/batch", "parameters": forwarding}
    site.apps["batch"] = entry
    site.serve()
    with ThreadPoolExecutor(4) as many:
        tasks = list(many.map(lambda _: Task(site, "/batch", {"log": str(log)}), range(4)))
    found = [task.ended()["result"] for task in tasks]
    assert {item["state"] for item in found} == {"queued"}
    # Its id went along as the key.
    for item, task in zip(found, tasks, strict=True):
        assert Task(site, "/jobs", {"log": str(log)}, task.id).id == item["id"]

    forwarding["forward_to"] = site.url("/jobs/nothing")
    site.serve()
    failed = Task(site, "/batch", {"log": str(log)})
    assert (failed.ended()["state"], failed.now["attempts"]) == ("failed", 1)
    assert "answered 404" in failed.now["error"]


def test_the_password_is_nowhere(site: Site, redis: RedisServer, parameters: Any) -> None:
    """But in the file that is Ray's user's alone."""

    def holds(text: str) -> list[str]:
        """Files below the site's folders, arguments of processes, and what Serve says."""
        folders = [str(site.folder / "host"), str(site.temp)]
        searched = ["grep", "-rlsaF", "--devices=skip", "--", text, *folders]
        found = subprocess.run(searched, capture_output=True, text=True, check=False).stdout.split()
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if text.encode() in line.read_bytes():
                    found.append("argv")
        token = (site.folder / "host/state/node/token").read_text().strip()
        url = f"http://127.0.0.1:{site.ports['dashboard']}/api/serve/applications/"
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60).text
        return found + ["Serve"] * (text in answer)

    secret = site.folder / "host/state/node/environment.json"
    assert holds(PASSWORD) == [str(secret)]
    assert secret.stat().st_mode & 0o777 == 0o600
    # What stands in the app is found in these places.
    assert {"Serve"} < set(holds("TASKS_REDIS_PASSWORD"))
