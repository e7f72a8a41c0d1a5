"""The verbs, as functions: what the command line does, without printing or exiting."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clusterkit import inventory_file, runner, scaffold
from clusterkit import plan as planning
from clusterkit.errors import ClusterkitError, RunFailed, SpecError, UsageError
from clusterkit.inventory_file import Edit
from clusterkit.plan import Plan
from clusterkit.runner import Event, HostCount, Options, Result
from clusterkit.spec.findings import Finding, Place, did_you_mean

OnEvent = Callable[[Event], None]

PROBE_TASK = "Ask every proxy that holds a replica"
STATUS_TASK = "Ask Ray"
APPS_TASK = "Compare the apps"
ROLLBACK_TASK = "Apply an earlier Serve config"
SCALE_TASK = "Set the number of replicas"
# All that an app needs of a cluster that runs.
APP_TAGS = "model_store,app_code,serve_apps,verify"
FLEET_TASK = "Ask the fleet"
AGENT_TASK = "Ask the agent"
NODE_TASK = "Read the node's state"
HOLD_TASK = "Keep the host out of service"
RELEASE_TASK = "End quarantine and maintenance"

REASON_LIMIT = 200  # the agent's own
STAY_TASKS = ("Say which packages stay", "Say what stays")


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
class Status:
    """What runs now. `fleet`: what the daemon of an autoscaled cluster says; None where pools are fixed. `demands`:
    what Ray waits for, in its own words."""

    reachable: bool
    base_url: str | None
    nodes: list[dict[str, Any]] = field(default_factory=list)
    apps: list[dict[str, Any]] = field(default_factory=list)
    hosts: list[dict[str, Any]] = field(default_factory=list)
    fleet: dict[str, Any] | None = None
    demands: list[str] = field(default_factory=list)

    def replicas_on(self, host: str) -> int:
        """Replicas that run there, of all apps."""
        addresses = {node["node_ip"] for node in self.nodes if node["host"] == host}
        every = (replica for app in self.apps for replica in app["replicas"])
        return sum(replica["node_ip"] in addresses and replica["state"] == "RUNNING" for replica in every)

    def as_dict(self) -> dict[str, Any]:
        return {
            "reachable": self.reachable,
            "base_url": self.base_url,
            "nodes": self.nodes,
            "apps": self.apps,
            "hosts": self.hosts,
            "fleet": self.fleet,
            "demands": self.demands,
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


def plan(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Plan:
    """What `deploy` would change: site.yml with --check --diff, made readable.

    A host that fails or cannot be reached is part of the answer; what was wrong with the request raises.
    """
    checked = replace(options or Options(), check=True, diff=True)
    seen: list[Event] = []

    def collect(event: Event) -> None:
        seen.append(event)
        on_event(event)

    try:
        result = runner.run("site.yml", inventory, checked, on_event=collect)
    except RunFailed as error:
        if not error.host:
            raise
        return planning.plan(seen, {host: count["changed"] for host, count in error.hosts.items()})
    return planning.plan(seen, {host: count.changed for host, count in result.hosts.items()})


def status(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Status:
    """Nodes, apps and every host's agent. A cluster that does not run is no error."""
    result = runner.run("status.yml", inventory, options, on_event=on_event)
    seen = _first(result, STATUS_TASK)
    apps = seen.get("apps", [])
    hosts = []
    for host, answer in sorted(result.results.get(AGENT_TASK, {}).items()):
        hosts.append({"host": host, **_agent(answer)})
    served = next((app["base_url"] for app in apps if app["base_url"].endswith("/v1")), None)
    told = _first(result, FLEET_TASK)
    return Status(
        reachable=bool(seen.get("reachable")),
        base_url=served,
        nodes=seen.get("nodes", []),
        apps=apps,
        hosts=hosts,
        demands=seen.get("demands", []),
        fleet={key: told[key] for key in ("running", "hosts", "pools", "open", "trouble")}
        if "running" in told
        else None,
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


def remove(inventory: str, options: Options | None = None, *, data: bool = False, on_event: OnEvent = _quiet) -> Result:
    """Take away what the kit made, on every host of the inventory or of --limit; the weights with `data` only."""
    given = options or Options()
    if data:
        given = replace(given, extra_vars=(*given.extra_vars, "remove_data=true"))
    return runner.run("remove.yml", inventory, given, on_event=on_event)


def stays(removed: Result) -> list[tuple[str, str]]:
    """(host, what stays there) after a removal."""
    said = (removed.results.get(task, {}) for task in STAY_TASKS)
    return [(host, str(answer["msg"])) for answers in said for host, answer in answers.items() if "msg" in answer]


def serve_config(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> dict[str, Any]:
    """The Serve config that `deploy` would apply."""
    config: dict[str, Any] = validate(inventory, options, on_event=on_event)["serve_config"]
    return config


# --------------------------------------------------------------------------- apps


@dataclass(frozen=True)
class Apps:
    """The apps as they run, and what an `apply` would do to them.

    apps       each with name, status, message, route_prefix, since, model, declared, deployments
    changes    what differs: what, name, wanted, actual; `disrupts` where replicas are replaced, `note` how;
               `left` where it needs consent
    rollouts   apps whose replicas would be replaced: app, how, room, deployments, missing, seconds
    history    what was applied, oldest first; `runs` is the number in it of what runs
    effective  every option that Ray runs with, defaults included
    """

    reachable: bool
    apps: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    runs: int | None = None
    effective: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RolledBack:
    """An earlier config runs: its number in the history, and what was changed for it."""

    number: int
    changed: bool
    changes: list[dict[str, Any]] = field(default_factory=list)
    log: Path | None = None


def apps(inventory: str, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Apps:
    """Look at the apps. A cluster that does not run is no error."""
    result = runner.run("apps.yml", inventory, options, on_event=on_event)
    seen, cluster = _first(result, APPS_TASK), _cluster(result)
    hide = planning.Hider(cluster)
    declared = {app["name"]: app for app in cluster.get("apps", [])}
    running = seen.get("applications", {})
    return Apps(
        reachable=bool(seen.get("reachable")),
        apps=[
            {
                **_app(app, hide),
                "model": declared.get(name, {}).get("model_id") or None,
                "declared": name in declared,
            }
            for name, app in sorted(running.items())
        ],
        changes=_app_changes(seen, hide),
        rollouts=seen.get("rollouts", []),
        history=[{**entry, "message": hide.text(entry["message"])} for entry in seen.get("history", [])],
        runs=seen.get("runs"),
        effective=hide.value(seen.get("effective", {})),
    )


def apply_apps(
    inventory: str,
    options: Options | None = None,
    *,
    rollout: str | None = None,
    skip_off: bool = False,
    on_event: OnEvent = _quiet,
) -> Deployed:
    """Bring weights, code and apps to what the inventory says, and ask for an answer. No node is restarted.

    `rollout` is how replicas are replaced, for this time. Raises RunFailed with each app's own message where an app
    does not come up; what ran before was put back then.
    """
    given = replace(options or Options(), tags=APP_TAGS)
    if rollout:
        given = replace(given, extra_vars=(*given.extra_vars, json.dumps({"serve_apps_rollout": rollout})))
    if skip_off:
        given = replace(given, extra_vars=(*given.extra_vars, "skip_off=true"))
    return deploy(inventory, given, on_event=on_event)


def rollback_apps(
    inventory: str, options: Options | None = None, *, number: int | None = None, on_event: OnEvent = _quiet
) -> RolledBack:
    """Apply a config of the history again: `number`, or the newest that ran and is not what runs. Raises RunFailed
    where there is none, or it does not come up."""
    given = options or Options()
    if number is not None:
        given = replace(given, extra_vars=(*given.extra_vars, json.dumps({"serve_apps_number": number})))
    result = runner.run("rollback.yml", inventory, given, on_event=on_event)
    done = _first(result, ROLLBACK_TASK)
    changes = _app_changes(done, planning.Hider(_cluster(result)))
    return RolledBack(int(done["number"]), bool(done.get("changed")), changes, result.log)


def scale_app(
    inventory: str,
    app: str,
    deployment: str,
    replicas: int,
    options: Options | None = None,
    *,
    on_event: OnEvent = _quiet,
) -> Result:
    """Give a deployment so many replicas, and wait until they run. Raises UsageError where the inventory does not
    leave that to a scaler outside, or not this number; RunFailed where they do not come to run."""
    given = options or Options()
    _check_scale(validate(inventory, options, on_event=on_event), app, deployment, replicas)
    wish = {"app": app, "deployment": deployment, "replicas": replicas}
    given = replace(given, extra_vars=(*given.extra_vars, json.dumps({"serve_apps_scale": wish})))
    return runner.run("scale.yml", inventory, given, on_event=on_event)


def _check_scale(cluster: Mapping[str, Any], name: str, deployment: str, replicas: int) -> None:
    apps = {app["name"]: app for app in cluster.get("apps", [])}
    if name not in apps:
        raise UsageError(
            f"no app {name!r} is declared", hint=did_you_mean(name, tuple(apps)) or f"one of {', '.join(apps)}"
        )
    bounds = apps[name].get("external")
    if bounds is None:
        raise UsageError(
            f"app {name} is not scaled from outside: Serve decides itself",
            hint="set external_scaler of the app to true and apply that, or change min_replicas and max_replicas",
        )
    if deployment not in bounds:
        known = (
            did_you_mean(deployment, tuple(bounds)) or f"one of {', '.join(bounds) or 'those that the inventory names'}"
        )
        raise UsageError(f"app {name} has no deployment {deployment!r} that the inventory knows of", hint=known)
    if bounds[deployment] is None:
        hint = "give it min_replicas and max_replicas in the inventory"
        raise UsageError(f"{deployment} of app {name} has no bounds to be scaled between", hint=hint)
    low, high = bounds[deployment]
    if not low <= replicas <= high:
        hint = f"between {low} and {high}: min_replicas (1 at least) and max_replicas of the inventory"
        raise UsageError(f"{deployment} of app {name} may not have {replicas} replicas", hint=hint)


def _app(app: dict[str, Any], hide: planning.Hider) -> dict[str, Any]:
    """An app as it runs: Serve's messages may repeat what it was given."""
    deployments = {
        name: {**item, "message": hide.text(item["message"] or "")} for name, item in app["deployments"].items()
    }
    return {**app, "message": hide.text(app["message"] or ""), "deployments": deployments}


def _app_changes(answer: dict[str, Any], hide: planning.Hider) -> list[dict[str, Any]]:
    """What differs, without what the inventory keeps secret: the head knows no secrets but by their names."""
    sides = ("wanted", "actual")
    return [
        {key: hide.value(value) if key in sides else value for key, value in change.items()}
        for change in answer.get("changes", [])
    ]


def _cluster(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = _first(result, planning.SPEC_TASK).get("cluster", {})
    return found


def _first(result: Result, task: str) -> dict[str, Any]:
    return next(iter(result.results.get(task, {}).values()), {})


def _agent(answer: dict[str, Any]) -> dict[str, Any]:
    said = _said(answer)
    return {
        "state": said.get("state", "unreachable" if answer.get("unreachable") else "not installed"),
        "instance_id": said.get("instance_id"),
        "since": said.get("since"),
        "held": said.get("held"),
        "maintenance": said.get("maintenance"),
        "quarantine": said.get("quarantine"),
    }


# --------------------------------------------------------------------------- a new inventory


@dataclass(frozen=True)
class Initialised:
    """A new inventory. With `findings` it was written all the same: they are to be mended in its files."""

    folder: Path
    files: list[Path]
    stack: str
    cluster: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def init(request: scaffold.Request, options: Options | None = None, *, on_event: OnEvent = _quiet) -> Initialised:
    """Write the inventory that was asked for, and validate it. Raises UsageError, and then nothing was written.

    Where no stack is named, it is the first row of the version table that validates.
    """
    scaffold.check(request)
    rows = scaffold.rows(request)
    row = rows[-1]
    for candidate in rows[:-1]:
        with tempfile.TemporaryDirectory(prefix="clusterkit-init-") as trial:
            scaffold.draft(Path(trial), request, candidate)
            try:
                validate(trial, options, on_event=on_event)
            except SpecError:
                continue
        row = candidate
        break
    files = scaffold.write(request, row)
    try:
        cluster = validate(str(request.folder), options, on_event=on_event)
    except SpecError as error:
        return Initialised(request.folder, files, row.name, findings=error.findings)
    return Initialised(request.folder, files, row.name, cluster)


# --------------------------------------------------------------------------- single hosts

_FORCE = "or --force: it leaves the inventory all the same, and what may be left on it is listed"


@dataclass(frozen=True)
class HostChange:
    """What a `host` verb did.

    files        inventory files that were edited, and `diff` how
    held         why the host is off by policy now, in words; None where it is not
    maintenance  owner, reason and since of its maintenance
    released     what was lifted: quarantine and maintenance, as they were
    left         what stays on a host that was removed, or may stay where it could not be reached
    hosts        what Ansible counted, on every host that it touched
    """

    host: str
    changed: bool
    files: list[str] = field(default_factory=list)
    diff: str = ""
    held: str | None = None
    maintenance: dict[str, Any] | None = None
    released: dict[str, Any] | None = None
    left: list[str] = field(default_factory=list)
    hosts: dict[str, HostCount] = field(default_factory=dict)
    log: Path | None = None


def add_host(
    inventory: str,
    host: str,
    *,
    pool: str | None = None,
    variables: Mapping[str, Any] | None = None,
    options: Options | None = None,
    on_event: OnEvent = _quiet,
) -> HostChange:
    """Put a host into the inventory and converge it alone; one that is in it is released from maintenance first.

    `variables` stand below the host in the inventory's file. Raises SpecError where the inventory would not
    validate with the host in it, and UsageError where it cannot be edited; the file is then as it was.
    """
    given, words = options or Options(), dict(variables or {})
    try:
        cluster = validate(inventory, given, on_event=on_event)
    except SpecError:
        # The host may be what it lacks; whatever else is wrong, the check of the edited inventory says.
        if pool not in inventory_file.groups(inventory) or inventory_file.place(inventory, host) is not None:
            raise
        cluster = {}
    known = cluster.get("hosts", {}).get(host)
    only = replace(given, limit=host)
    results: list[Result] = []
    edits: list[Edit] = []
    if known is None:
        edits = _new_host(inventory, host, pool, words, cluster, given, on_event)
        inventory_file.write(edits)
    else:
        _same_host(inventory, host, known, pool, words)
        # A quarantine is ended by whoever mended the host: host release.
        ended = replace(only, extra_vars=(*only.extra_vars, '{"release_only": "maintenance"}'))
        results.append(runner.run("release.yml", inventory, ended, on_event=on_event))
    results.append(runner.run("site.yml", inventory, only, on_event=on_event))
    held = _agent(results[-1].results.get(NODE_TASK, {}).get(host, {}))["held"]
    if held:
        raise ClusterkitError(
            f"{host} is converged, and stays off: it is {held}",
            hint=f"mend what caused it, then: clusterkit host release {host}, and the same command again",
        )
    return _host_change(host, edits, results)


def drain_host(
    inventory: str,
    host: str,
    *,
    reason: str,
    force: bool = False,
    options: Options | None = None,
    on_event: OnEvent = _quiet,
) -> HostChange:
    """Move the replicas of a worker away, stop its node, and hold it off until `add_host` releases it.

    Raises RunFailed where work cannot move, and then the host runs on; `force` cuts it off.
    """
    if not reason.strip() or len(reason) > REASON_LIMIT or not reason.isprintable():
        raise UsageError(f"--reason must be 1 to {REASON_LIMIT} printable characters in one line")
    given = options or Options()
    _worker(validate(inventory, given, on_event=on_event), inventory, host)
    result = _drain(inventory, host, reason, force, given, on_event)
    said = _said(result.results.get(HOLD_TASK, {}).get(host, {}))
    return replace(_host_change(host, [], [result]), held=said.get("held"), maintenance=said.get("maintenance"))


def release_host(
    inventory: str, host: str, *, options: Options | None = None, on_event: OnEvent = _quiet
) -> HostChange:
    """End a host's quarantine and maintenance; starts nothing. Raises UsageError where there is no such host."""
    given = options or Options()
    names = list(validate(inventory, given, on_event=on_event)["hosts"])
    if host not in names:
        hint = did_you_mean(host, names) or f"one of {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
        raise UsageError(f"there is no host {host!r} in {inventory}", hint=hint)
    result = runner.run("release.yml", inventory, replace(given, limit=host), on_event=on_event)
    said = _said(result.results.get(RELEASE_TASK, {}).get(host, {}))
    return replace(_host_change(host, [], [result]), held=said.get("held"), released=said.get("released"))


def remove_host(
    inventory: str,
    host: str,
    *,
    force: bool = False,
    options: Options | None = None,
    on_event: OnEvent = _quiet,
) -> HostChange:
    """Drain a worker, take away what the kit made on it, then take it out of the inventory.

    Raises SpecError where the inventory would not validate without it (then nothing was touched), RunFailed where
    the host cannot be reached or its work cannot move. `force` takes it out of the inventory all the same.
    """
    given = options or Options()
    cluster = validate(inventory, given, on_event=on_event)
    known = cluster["hosts"].get(host)
    if known is not None:
        _worker(cluster, inventory, host)
    edits = inventory_file.remove(inventory, host)
    if known is None and not edits:
        return HostChange(host, changed=False)
    if not edits:
        raise UsageError(
            f"{host} stands in no YAML file of {inventory}: it comes from a range, an INI file or a program",
            hint=f"clusterkit host drain {host}; clusterkit remove --limit {host}; then take it out by hand",
        )
    _validated(inventory, edits, given, on_event)
    results: list[Result] = []
    left: list[str] = []
    if known is not None:
        try:
            _take_away(inventory, host, force, given, on_event, results)
        except RunFailed as error:
            if not force:
                error.hint = f"{error.hint}\n{_FORCE}" if error.hint else _FORCE
                raise
            left = _left(cluster, host, error)
        else:
            left = [line for _, line in stays(results[-1])]
    # The drain took minutes: whoever edited the file meanwhile keeps what he wrote.
    edits = inventory_file.remove(inventory, host)
    inventory_file.write(edits)
    return replace(_host_change(host, edits, results), left=left)


def _new_host(
    inventory: str,
    host: str,
    pool: str | None,
    variables: Mapping[str, Any],
    cluster: Mapping[str, Any],
    options: Options,
    on_event: OnEvent,
) -> list[Edit]:
    """The edits that bring a host into the inventory, once it has been validated with them."""
    pools = list(cluster.get("pools", {}))
    if not scaffold.HOST_NAME.fullmatch(host):
        raise UsageError(f"{host!r} is no host name", hint="letters, digits, '.', '_' and '-', at most 63 of them")
    if host in {*scaffold.RESERVED, *pools, *inventory_file.groups(inventory)}:
        raise UsageError(f"{host!r} is the name of a group, or has a meaning of its own", hint="name it otherwise")
    if pool is None:
        if len(pools) != 1:
            raise UsageError("--pool is missing", hint=f"one of {', '.join(pools)}" if pools else None)
        pool = pools[0]
    if pools and pool not in pools:
        raise UsageError(f"there is no pool {pool!r}", hint=did_you_mean(pool, pools) or f"one of {', '.join(pools)}")
    edits = inventory_file.add(inventory, host, pool, variables)
    after = _validated(inventory, edits, options, on_event)
    if (after["hosts"].get(host) or {}).get("pool") != pool:
        raise UsageError(f"{pool} is no pool: it is no child group of ray_workers", hint="name one that is")
    others = [after["hosts"][name]["managed"] for name in after["pools"][pool]["hosts"] if name != host]
    if others and all(others) and not after["hosts"][host]["managed"]:
        raise UsageError(
            f"the other hosts of {pool} are in managed_hosts, and {host} would not be",
            hint=f"put {host} into managed_hosts by hand, then give the same command again",
        )
    return edits


def _same_host(
    inventory: str, host: str, known: Mapping[str, Any], pool: str | None, variables: Mapping[str, Any]
) -> None:
    """Raises where a host that is there already is not what the request says."""
    if known["head"]:
        raise UsageError(f"{host} is the head", hint="clusterkit deploy brings it to what the inventory says")
    if pool is not None and pool != known["pool"]:
        raise UsageError(
            f"{host} is in the pool {known['pool']}", hint=f"to move it: clusterkit host remove {host}, then add it"
        )
    if other := inventory_file.differing(inventory, host, variables):
        raise UsageError(
            f"{host} is there already, and {', '.join(other)} not as given here",
            hint=f"change it in {inventory_file.place(inventory, host)}, or leave it out here",
        )


def _worker(cluster: Mapping[str, Any], inventory: str, host: str) -> None:
    """Raises where this is no worker that can be spared."""
    known = cluster["hosts"].get(host)
    if known is None:
        names = list(cluster["hosts"])
        hint = did_you_mean(host, names) or f"one of {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
        raise UsageError(f"there is no host {host!r} in {inventory}", hint=hint)
    if host in {*cluster["pools"], *inventory_file.groups(inventory)}:
        raise UsageError(f"{host!r} is the name of a group too: all of it would be meant", hint="rename one of them")
    if known["head"]:
        where = inventory_file.place(inventory, host) or Place(inventory)
        fix = "name a worker; `clusterkit remove` takes the whole cluster away"
        raise SpecError([Finding(where, host, "is the head: without it there is no cluster", fix)])


def _validated(inventory: str, edits: Sequence[Edit], options: Options, on_event: OnEvent) -> dict[str, Any]:
    """The cluster as it would be with these edits. Raises SpecError; the files are as they were in any case."""
    with inventory_file.candidate(inventory, edits) as trial:
        first, *more = trial.sources
        sources = [word for source in more for word in ("--inventory", source)]
        try:
            return validate(first, replace(options, rest=(*options.rest, *sources)), on_event=on_event)
        except SpecError as error:
            raise SpecError([trial.told(finding) for finding in error.findings]) from None


def _drain(inventory: str, host: str, reason: str, force: bool, options: Options, on_event: OnEvent) -> Result:
    # The operator's own words: `!unsafe` keeps Ansible from reading braces in them as a template.
    words = f'{{"drain_reason": !unsafe {json.dumps(reason, ensure_ascii=False)}, "drain_force": {json.dumps(force)}}}'
    chosen = replace(options, limit=host, extra_vars=(*options.extra_vars, words))
    return runner.run("drain.yml", inventory, chosen, on_event=on_event)


def _take_away(
    inventory: str, host: str, force: bool, options: Options, on_event: OnEvent, results: list[Result]
) -> None:
    """Drain a host that has an agent, then take away what the kit made."""
    only = replace(options, limit=host)
    seen = runner.run("status.yml", inventory, only, on_event=on_event)
    if _said(seen.results.get(AGENT_TASK, {}).get(host, {})):
        results.append(_drain(inventory, host, "leaves the cluster", force, options, on_event))
    results.append(remove(inventory, only, on_event=on_event))


def _left(cluster: Mapping[str, Any], host: str, error: RunFailed) -> list[str]:
    """What may be on a host that was given up."""
    unit = ", under the unit clusterkit-ray" if cluster["hosts"][host]["managed"] else ""
    return [
        f"not finished there: {error.task or 'connecting'}: {error.message}",
        f"a running Ray node and its replicas{unit}",
        *sorted(set(cluster["paths"].values())),
    ]


def _host_change(host: str, edits: Sequence[Edit], results: Sequence[Result]) -> HostChange:
    counts: dict[str, HostCount] = {}
    for result in results:
        for name, count in result.hosts.items():
            known = counts.get(name, HostCount())
            counts[name] = HostCount(**{key: value + getattr(known, key) for key, value in vars(count).items()})
    return HostChange(
        host=host,
        changed=bool(edits) or any(result.changed for result in results),
        files=[str(edit.path) for edit in edits],
        diff="\n".join(edit.diff for edit in edits),
        hosts=counts,
        log=results[-1].log if results else None,
    )


def _said(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What an agent printed; nothing where there is no agent."""
    try:
        said = json.loads(answer.get("stdout") or "{}")
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
