"""The `async_tasks` app: its parameters, the entry of Serve's config that they become, and how the work is called."""

from __future__ import annotations

import asyncio
import importlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from serve_apps import template as templates
from serve_apps.async_tasks.parameters import AsyncTasksParameters
from serve_apps.async_tasks.template import RULES, code, demand, ray_needs, render
from serve_apps.async_tasks.work import Failed, Work
from tests.support import ROOT
from tests.unit.test_spec import findings_of, spec_of

README = (ROOT / "serve_apps/async_tasks/README.md").read_text(encoding="utf-8")
URL = "redis://redis.example.org:6379/0"
OWN = {"code": "../jobs-app", "import_path": "jobs.work:work"}
URI = "file:///cache/apps/0.zip"


def parameters(**given: Any) -> AsyncTasksParameters:
    return AsyncTasksParameters.model_validate({"redis_url": URL, **OWN, **given})


def rendered(accelerator: Any = "rocm", **given: Any) -> dict[str, Any]:
    app = render(
        name="jobs",
        route_prefix="/jobs",
        parameters=parameters(**given),
        accelerator=accelerator,
        model_path="",
        code_uri=URI,
    )
    json.dumps(app)  # it goes over HTTP
    return app


def identity(app: dict[str, Any]) -> str:
    """What Serve hashes: a change in it replaces every replica."""
    return json.dumps([app["import_path"], app["runtime_env"], app["args"]], sort_keys=True)


def test_an_app() -> None:
    app = rendered(
        redis_url="rediss://tasks@redis.example.org/2",
        redis_password_env="TASKS_PASSWORD",
        redis_ca_file="/etc/ca.pem",
        gpus_per_replica=0.5,
        args={"size": 3},
    )
    assert app["args"] == {
        "queue": "jobs",
        "redis": {
            "url": "rediss://tasks@redis.example.org/2",
            "password_env": "TASKS_PASSWORD",
            "ca_file": "/etc/ca.pem",
        },
        "import_path": "jobs.work:work",
        "args": {"size": 3},
    }
    assert app["runtime_env"] == {"env_vars": {}, "working_dir": URI}
    api, worker = app["deployments"]
    assert (api["name"], api["num_replicas"]) == ("Api", 1)
    assert worker["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5}
    assert worker["autoscaling_config"]["target_ongoing_requests"] == 1
    assert rendered("cpu", gpus_per_replica=2)["deployments"][1]["ray_actor_options"]["num_gpus"] == 0
    assert rendered(queue_name="shared")["args"]["queue"] == "shared"


def test_its_code_is_the_kits_and_the_sites() -> None:
    module = templates.load("async_tasks").render.__globals__["IMPORT_PATH"].partition(":")[0]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert code(parameters()) == templates.AppCode("async_tasks", "../jobs-app", "jobs.work", "code")
    forwarding = {"redis_url": URL, "forward_to": "http://127.0.0.1:8000/chat"}
    assert code(AsyncTasksParameters.model_validate(forwarding)) == templates.AppCode(template="async_tasks")


@pytest.mark.parametrize(
    "edit",
    [
        {"max_retries": 9},
        {"task_timeout_s": 5},
        {"max_payload_bytes": 5},
        {"result_ttl_s": 5},
        {"max_replicas": 3},
        {"num_replicas": 2},
        {"api_replicas": 2},
        {"max_ongoing_requests": 20},
        {"graceful_shutdown_timeout_s": 5000},
    ],
)
def test_what_replaces_no_replica(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) == identity(rendered())
    assert rendered(**edit)["deployments"] != rendered()["deployments"]


@pytest.mark.parametrize(
    "edit", [{"args": {"a": 1}}, {"queue_name": "q"}, {"redis_url": "redis://other"}, {"env_vars": {"A": "b"}}]
)
def test_what_does(edit: dict[str, Any]) -> None:
    assert identity(rendered(**edit)) != identity(rendered())


@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({}, 1),
        ({"max_replicas": 8}, 8),
        ({"num_replicas": 4, "max_ongoing_requests": 5}, 20),
        ({"max_replicas": 8, "target_ongoing_requests": 0.5}, 8),
        ({"max_replicas": 3, "max_ongoing_requests": 9, "target_ongoing_requests": 2.5}, 27),
    ],
)
def test_so_many_are_handed_out_that_serve_wants_all_workers(given: dict[str, Any], window: int) -> None:
    """And no worker waits for work that lies in Redis."""
    api = rendered(**given)["deployments"][0]
    assert api["user_config"]["window"] == window
    most = parameters(**given)
    assert window >= most.most * most.max_ongoing_requests
    assert window / most.target_ongoing_requests >= most.most


def test_the_rules_are_those_of_the_queue() -> None:
    from dataclasses import fields

    from serve_apps.async_tasks.tasks import Rules

    assert {field.name for field in fields(Rules)} == set(RULES)
    assert Rules() == Rules(**{name: AsyncTasksParameters.model_fields[name].default for name in RULES})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"redis_url": "redis://u:geheim@host"}, "would stand in Serve's configuration"),
        ({"redis_url": "redis://:geheim@host"}, "put it into clusterkit_environment"),
        ({"redis_url": "http://host"}, "redis://HOST:PORT/DB"),
        ({"redis_url": "host:6379"}, "redis://HOST:PORT/DB"),
        ({"redis_url": "redis://host:port"}, "no URL"),
        ({"redis_url": "redis://host/one"}, "number of a database"),
        ({"redis_url": "redis://host/0?ssl=1"}, "number of a database"),
        ({"redis_url": "redis://tasks@host"}, "names a user"),
        ({"redis_password_env": "A", "redis_password_file": "/a"}, "take one out"),
        ({"redis_password_file": "secret"}, "redis_password_file"),
        ({"redis_ca_file": "/ca"}, "begin redis_url with rediss://"),
        ({"import_path": None}, "there is code alone"),
        ({"code": None, "import_path": None}, "say what the work is"),
        ({"forward_to": "http://host/x"}, "say what the work is"),
        ({"import_path": "jobs/work.py"}, "import_path"),
        ({"code": None, "import_path": None, "forward_to": "ftp://host/x"}, "forward_to"),
        ({"code": None, "import_path": None, "forward_to": "http://u:geheim@host/x"}, "forward_to"),
        ({"code": None, "import_path": None, "forward_to": "http://h/x", "args": {"a": 1}}, "take args out"),
        ({"retry_backoff_s": 10, "retry_backoff_max_s": 5}, "below retry_backoff_s (10)"),
        ({"task_timeout_s": 3600}, "graceful_shutdown_timeout_s (660) is below task_timeout_s (3600)"),
        ({"max_queued_requests": 5}, "say max_queued_tasks"),
        ({"gpus_per_replica": 1.5}, "whole number"),
        ({"max_retries": -1}, "greater than or equal to 0"),
        ({"lease_s": 1}, "greater than or equal to 3"),
        ({"num_replicas": 1, "min_replicas": 1}, "take one of them out"),
        ({"redis_password": "x"}, "Extra inputs"),
    ],
)
def test_what_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        parameters(**given)
    said = [item["msg"] + ".".join(map(str, item["loc"])) for item in caught.value.errors()]
    assert any(words in text for text in said), said
    assert "geheim" not in str(said)


def site(**given: Any) -> dict[str, Any]:
    given = {"redis_url": URL, **OWN, **given}
    return {"clusterkit_apps": [{"name": "j", "template": "async_tasks", "route_prefix": "/", "parameters": given}]}


def test_a_finding_names_the_place_and_no_secret() -> None:
    found = findings_of(site(redis_url="redis://:geheim@host"))
    assert "redis_password_env" in found["clusterkit_apps[0].parameters.redis_url"]
    assert "geheim" not in str(found)


def test_what_it_asks_of_the_pool() -> None:
    asked = demand(parameters(gpus_per_replica=0.25, num_replicas=4, cpus_per_replica=2, api_replicas=2))
    assert (asked.gpus, asked.min_replicas, asked.max_replicas, asked.minimum_cpus) == (0.25, 4, 4, 8.2)
    assert demand(parameters(min_replicas=0)).minimum_cpus == 0.1
    spec_of(site(num_replicas=100))  # none of them on a GPU
    assert "needs 17 GPUs" in findings_of(site(gpus_per_replica=1, num_replicas=17))["clusterkit_apps[0] j"]
    assert [need.parameter for need in ray_needs(parameters(max_surge_percent=5))] == ["max_surge_percent"]


def test_the_examples_of_the_readme_hold() -> None:
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]
    assert len(examples) == 2
    for example in examples:
        assert len(spec_of(example).apps) == 1
    names = {app["parameters"].get("redis_password_env") for item in examples for app in item["clusterkit_apps"]}
    assert names - {None} == examples[0]["clusterkit_environment"].keys()


def test_the_readme_lists_exactly_the_parameters() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)) == AsyncTasksParameters.model_fields.keys()


# --------------------------------------------------------------------------- the work

SITE_CODE = """
import asyncio, threading

def add(payload, by=1):
    return payload + by

async def add_soon(payload, by=1):
    await asyncio.sleep(0)
    return payload + by

def where(payload):
    return threading.current_thread().name

class Counter:
    def __init__(self, start):
        self.start = start
    def __call__(self, payload, task):
        self.start += 1
        return [self.start, task]

class Soon(Counter):
    async def __call__(self, payload, task):
        return [task["id"], payload]

class Nothing:
    pass

def fault(payload):
    if payload == "exit":
        raise SystemExit(3)
    error = KeyError(payload)
    error.retry = payload != "never"
    raise error

def give(payload):
    return {"nan": float("nan"), "object": object(), "long": "x" * 2000}[payload]

def slow(payload):
    ended.wait(20)

async def slow_soon(payload):
    try:
        await asyncio.sleep(20)
    finally:
        ended.set()

ended = threading.Event()
"""


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"jobs_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SITE_CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def done(work: Work, payload: Any, timeout_s: float = 20) -> Any:
    return json.loads(asyncio.run(work.do(payload, {"id": "f00", "attempt": 2}, timeout_s, 1000)))


def test_functions_classes_and_coroutines(jobs: str) -> None:
    assert done(Work(f"{jobs}:add", {}, ""), 3) == 4
    for name in ("add", "add_soon"):
        assert done(Work(f"{jobs}:{name}", {"by": 4}, ""), 3) == 7
    counter = Work(f"{jobs}:Counter", {"start": 5}, "")
    assert done(counter, 0) == [6, {"id": "f00", "attempt": 2}]
    assert done(counter, 0)[0] == 7
    assert done(Work(f"{jobs}:Soon", {"start": 5}, ""), "x") == ["f00", "x"]
    # Not where Serve's own loop runs.
    assert done(Work(f"{jobs}:where", {}, ""), 0) != threading.main_thread().name
    with pytest.raises(TypeError, match="has no __call__"):
        Work(f"{jobs}:Nothing", {}, "")


@pytest.mark.parametrize(
    ("name", "payload", "words", "retry"),
    [
        ("fault", "x", "KeyError: 'x'", True),
        ("fault", "never", "KeyError: 'never'", False),
        ("fault", "exit", "SystemExit: 3", True),
        ("give", "nan", "no JSON", False),
        ("give", "object", "no JSON", False),
        ("give", "long", "has 2002 bytes, and may have 1000", False),
    ],
)
def test_what_fails_and_whether_another_attempt_may_mend_it(
    jobs: str, name: str, payload: str, words: str, retry: bool
) -> None:
    with pytest.raises(Failed, match=re.escape(words)) as caught:
        done(Work(f"{jobs}:{name}", {}, ""), payload)
    assert caught.value.retry is retry


def test_what_takes_too_long(jobs: str) -> None:
    """A coroutine is ended; a thread goes on, and the replica says so."""
    work = Work(f"{jobs}:slow_soon", {}, "")
    with pytest.raises(Failed, match=r"not done in 0\.05 s") as caught:
        done(work, 0, 0.05)
    ended = importlib.import_module(jobs).ended
    assert (caught.value.retry, work.overrun, ended.wait(20)) == (True, "", True)
    ended.clear()
    work = Work(f"{jobs}:slow", {}, "")
    with pytest.raises(Failed, match="not done"):
        asyncio.run(_ending(work, ended))
    assert work.overrun == "f00"


async def _ending(work: Work, ended: threading.Event) -> None:
    try:
        await work.do(0, {"id": "f00", "attempt": 1}, 0.05, 1000)
    finally:
        # Or the interpreter waits for the thread.
        ended.set()
