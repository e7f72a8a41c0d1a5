"""The verbs, as functions: what the command line does, without printing or exiting."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clusterkit import runner
from clusterkit.errors import ClusterkitError
from clusterkit.runner import Event, Options, Result

OnEvent = Callable[[Event], None]

SPEC_TASK = "Read the cluster from the inventory"
PROBE_TASK = "Ask every proxy that holds a replica"
STATUS_TASK = "Ask Ray"
AGENT_TASK = "Ask the agent"


def _quiet(_event: Event) -> None:
    return None


@dataclass(frozen=True)
class Check:
    """One probe of the running cluster; `seconds` is how long it took."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Deployed:
    """A finished deploy, with an answer that the cluster really gave."""

    result: Result
    base_url: str | None = None
    model: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Step:
    """One change that a run would make."""

    host: str
    role: str
    task: str
    diff: str = ""


@dataclass(frozen=True)
class Status:
    """What runs now."""

    reachable: bool
    base_url: str | None
    nodes: list[dict[str, Any]] = field(default_factory=list)
    apps: list[dict[str, Any]] = field(default_factory=list)
    hosts: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "reachable": self.reachable,
            "base_url": self.base_url,
            "nodes": self.nodes,
            "apps": self.apps,
            "hosts": self.hosts,
        }


def validate(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> dict[str, Any]:
    """The cluster as Ansible publishes it. Raises SpecError with every finding."""
    result = runner.run("validate.yml", inventory, options, on_event=on_event)
    return _cluster(result)


def deploy(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Deployed:
    """Bring the hosts to what the inventory says, and ask the cluster for an answer."""
    result = runner.run("site.yml", inventory, options, on_event=on_event)
    probe = _first(result, PROBE_TASK)
    answer = probe.get("answer") or {}
    app = next((item for item in probe.get("apps", []) if item["base_url"].endswith("/v1")), None)
    return Deployed(
        result=result,
        base_url=app["base_url"] if app else None,
        model=answer.get("model"),
        answer=answer.get("content"),
    )


def plan(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> list[Step]:
    """What `deploy` would change: site.yml with --check --diff, made readable."""
    given = options or Options()
    checked = Options(**{**vars(given), "check": True, "diff": True})
    steps: list[Step] = []

    def collect(event: Event) -> None:
        if event.kind == "changed":
            steps.append(Step(event.host, event.role, event.task, _diff(event.result)))
        on_event(event)

    runner.run("site.yml", inventory, checked, on_event=collect)
    return steps


def status(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Status:
    """Nodes, apps and every host's agent. A cluster that does not run is no error."""
    result = runner.run("status.yml", inventory, options, on_event=on_event)
    seen = _first(result, STATUS_TASK)
    apps = seen.get("apps", [])
    hosts = []
    for host, answer in sorted(result.results.get(AGENT_TASK, {}).items()):
        hosts.append({"host": host, **_agent(answer)})
    served = next((app["base_url"] for app in apps if app["base_url"].endswith("/v1")), None)
    return Status(
        reachable=bool(seen.get("reachable")), base_url=served, nodes=seen.get("nodes", []), apps=apps, hosts=hosts
    )


def verify(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> list[Check]:
    """Ask every replica for real tokens. The checks say what failed; only an unreachable head raises."""
    checks: list[Check] = []

    def collect(event: Event) -> None:
        if event.task == PROBE_TASK and "checks" in event.result:
            checks[:] = [Check(**item) for item in event.result["checks"]]
        on_event(event)

    try:
        runner.run("verify.yml", inventory, options, on_event=collect)
    except ClusterkitError:
        if not checks:
            raise
    return checks


def remove(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Result:
    """Take away what the kit made, on every host of the inventory."""
    return runner.run("remove.yml", inventory, options, on_event=on_event)


def serve_config(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> dict[str, Any]:
    """The Serve config that `deploy` would apply."""
    config: dict[str, Any] = validate(inventory, options, on_event=on_event)["serve_config"]
    return config


def _cluster(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = _first(result, SPEC_TASK).get("cluster", {})
    return found


def _first(result: Result, task: str) -> dict[str, Any]:
    return next(iter(result.results.get(task, {}).values()), {})


def _agent(answer: dict[str, Any]) -> dict[str, Any]:
    try:
        said = json.loads(answer.get("stdout") or "{}")
    except ValueError:
        said = {}
    return {
        "state": said.get("state", "not installed"),
        "instance_id": said.get("instance_id"),
        "since": said.get("since"),
    }


def _diff(result: dict[str, Any]) -> str:
    diffs = result.get("diff") or []
    if isinstance(diffs, dict):
        diffs = [diffs]
    lines = []
    for item in diffs:
        if item.get("prepared"):
            lines.append(str(item["prepared"]))
        elif "after" in item and isinstance(item.get("after"), dict | str):
            header = item.get("after_header") or item.get("before_header") or ""
            lines.append(str(header))
    return "\n".join(line for line in lines if line)
