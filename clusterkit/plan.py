"""What a converge would change, read from the events of `site.yml --check --diff`. Pure: events in, plan out.

`Plan.as_dict()` is what `clusterkit plan --json` prints; its shape is stable:

    changes      what differs, in the order of the run; each has
                 host, role, task
                 what      file, folder, user, package, kernel setting, authority, unit, environment, distribution,
                           image, model, app, node, secret; `step` for what a task does not describe
                 name      which one: a path, the name of a package, of a setting, of an app, ...
                 wanted, actual   text, or a mapping of what differs; null where the diff says it all
                 diff      unified, of a file; "" otherwise
                 disrupts  what it would stop: node (Ray on that host), docker, host, app; often empty
                 left      true: a converge lists it and leaves it, for want of consent
                 note      of an app: how its replicas are replaced, and what is missing meanwhile; "" otherwise
    disruptions  per host, what a converge would stop; each has
                 host, what (node, docker, host, app), because (the changes behind it),
                 replicas  app → number of replicas on that host that go with it; null where nobody could be asked
                 needs_consent, consent (clusterkit_allow_disruption), would_happen
    failed       what stopped the plan of a host: host, role, task, message
    unreachable  host, message
    hosts        host → state (planned, incomplete, failed, unreachable), changes (number), node (running, degraded,
                 stopped, not installed; unknown where it was not asked); of a GPU host, driver (state, summary,
                 kernels, what is loaded and wanted, as gpu_driver tells it) and gpus (model, address, firmware)
    consent      clusterkit_allow_disruption
    complete     false: the run ended early, and later roles were not looked at

What a task tells: a module returns `changes`, a list of mappings with what, name, wanted, actual, and instead of the
last two `before` and `after` where they are the text of a file; `disrupts` there or beside it; `left: true` where it
is listed and does not count as a change. A `debug` task in check mode says the same as the mapping in its `msg`.
Everything else is read from the results of Ansible's own modules.

Secrets: what the shown cluster has as `***` is hidden wherever its key or its surroundings appear, and so is what is
named like a secret.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clusterkit.runner import Event

Json = dict[str, Any]

# What is read by name; a test holds them to the playbooks and roles.
SPEC_TASK = "Read the cluster from the inventory"
NODE_TASK = "Read the node's state"
SERVE_TASK = "Apply the Serve config"
DRIVER_TASK = "Load the driver, or find out what keeps it from being loaded"
GPUS_TASK = "Judge the GPUs"
LAST_PLAY = "Prove that the cluster answers"

HIDDEN = "<hidden>"
# `tokenizers: 0.22` is no secret.
_SECRET_NAME = re.compile(
    r"TOKENS?(?![A-Za-z])|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE", re.IGNORECASE
)
# Names that say where a secret lies, or how long it lives.
_NO_SECRET_NAME = re.compile(r"(_file|_path|_s)$", re.IGNORECASE)
_ASSIGNMENT = re.compile(r"""["']?(?P<key>[A-Za-z_][\w.-]*)["']?\s*[:=]\s*""")
_NOTHING = re.compile(r"""["']{2}|null|none|\{|\[|\{\}|\[\]|true|false|""", re.IGNORECASE)
_URL_PASSWORD = re.compile(r"(?<=://)([^/\s:@]+):[^/\s@]+(?=@)")

# host_files names in the header what differs.
_DIFFERS = re.compile(r"(?P<path>/.*) \((?P<keys>(?:content|mode|owner|group)(?:, \w+)*)\)")

# Stopping these stops replicas; a converge does it by consent only. An app that is declared anew is its own consent.
NEEDS_CONSENT = frozenset({"node", "docker", "host"})
NO_NODE = frozenset({"stopped", "not installed"})


@dataclass(frozen=True)
class Change:
    """One thing that differs."""

    host: str
    role: str
    task: str
    what: str
    name: str
    wanted: Any = None
    actual: Any = None
    diff: str = ""
    disrupts: tuple[str, ...] = ()
    left: bool = False
    note: str = ""


@dataclass(frozen=True)
class Disruption:
    """What a converge would stop on a host."""

    host: str
    what: str
    because: tuple[str, ...]
    replicas: dict[str, int] | None
    needs_consent: bool
    consent: bool

    @property
    def would_happen(self) -> bool:
        return self.consent or not self.needs_consent


@dataclass(frozen=True)
class Failure:
    """Why a host's plan is not whole."""

    host: str
    role: str
    task: str
    message: str


@dataclass(frozen=True)
class HostPlan:
    """How far the plan of a host goes, and how its node is now."""

    state: str
    changes: int
    node: str
    driver: Mapping[str, Any] | None = None
    gpus: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that a converge would do; the module says what each part means."""

    changes: tuple[Change, ...] = ()
    disruptions: tuple[Disruption, ...] = ()
    failed: tuple[Failure, ...] = ()
    unreachable: tuple[Failure, ...] = ()
    hosts: Mapping[str, HostPlan] = field(default_factory=dict)
    consent: bool = False
    complete: bool = True

    @property
    def whole(self) -> bool:
        """Every host could be planned."""
        return self.complete and not self.failed and not self.unreachable

    @property
    def empty(self) -> bool:
        """A converge would change nothing."""
        return self.whole and all(change.left for change in self.changes)

    def as_dict(self) -> Json:
        return {
            "changes": [asdict(change) for change in self.changes],
            "disruptions": [{**asdict(item), "would_happen": item.would_happen} for item in self.disruptions],
            "failed": [asdict(failure) for failure in self.failed],
            "unreachable": [{"host": failure.host, "message": failure.message} for failure in self.unreachable],
            "hosts": {host: asdict(plan) for host, plan in self.hosts.items()},
            "consent": self.consent,
            "complete": self.complete,
        }


def plan(events: Iterable[Event], changed: Mapping[str, int] | None = None) -> Plan:
    """The plan that the events of a check-mode run of `site.yml` tell.

    changed: tasks that changed something, by host, as Ansible counts them: a task that hides its result (`no_log`)
    shows up in this number alone.
    """
    seen = list(events)
    cluster = _cluster(seen)
    hide = Hider(cluster)
    changes = [change for event in seen for change in _changes(event)]
    changes += _hidden(seen, changed or {})
    changes = [hide.change(change) for change in changes]
    failures = [event for event in seen if event.kind in {"failed", "unreachable"} and not event.ignored]
    failed = tuple(_failure(event, hide) for event in failures if event.kind == "failed")
    unreachable = tuple(_failure(event, hide) for event in failures if event.kind == "unreachable")
    complete = not failures or any(event.kind == "play" and event.play == LAST_PLAY for event in seen)
    nodes = {event.host: _node(event.result) for event in seen if event.task == NODE_TASK and event.host}
    drivers = {event.host: _driver(event.result) for event in seen if event.task == DRIVER_TASK and event.host}
    gpus = {event.host: _gpus(event.result) for event in seen if event.task == GPUS_TASK and event.host}
    bad = {item.host: "failed" for item in failed} | {item.host: "unreachable" for item in unreachable}
    hosts = {
        host: HostPlan(
            state=bad.get(host, "planned" if complete else "incomplete"),
            changes=sum(change.host == host and not change.left for change in changes),
            node=nodes.get(host, "unknown"),
            driver=drivers.get(host),
            gpus=gpus.get(host, ()),
        )
        for host in _planned_hosts(seen, cluster)
    }
    consent = bool(cluster.get("allow_disruption"))
    idle = {host for host in {*nodes, *drivers} if _idle(nodes.get(host), drivers.get(host))}
    disruptions = tuple(_disruptions(changes, cluster, idle, _replicas(seen, cluster), consent))
    return Plan(tuple(changes), disruptions, failed, unreachable, hosts, consent, complete)


def unified(before: str, after: str) -> str:
    """The difference of two texts; `before` is what the host has."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "on the host", "wanted", lineterm="")
    return "\n".join(lines)


# --------------------------------------------------------------------------- what an event tells


def _changes(event: Event) -> Iterator[Change]:
    """Of a task on a host: everything that it says differs."""
    if event.kind not in {"ok", "changed"} or not event.host:
        return
    result = event.result
    base = Change(event.host, event.role, event.task, "step", event.task, disrupts=_words(result.get("disrupts")))
    said = result.get("msg")
    if isinstance(said, Mapping) and "what" in said:
        if event.kind == "changed" or said.get("left"):
            yield _told(base, said)
    elif isinstance(result.get("changes"), list):
        told = (_told(base, item) for item in result["changes"])
        yield from (change for change in told if change.left or event.kind == "changed")
    elif event.kind != "changed":
        return
    elif isinstance(result.get("results"), list):
        for item in result["results"]:
            if isinstance(item, Mapping) and item.get("changed"):
                yield from _builtin(base, item)
    else:
        yield from _builtin(base, result)


def _told(base: Change, item: Mapping[str, Any]) -> Change:
    """What one of our modules, or a `debug`, says."""
    diff = unified(str(item["before"]), str(item["after"])) if "before" in item and "after" in item else ""
    return replace(
        base,
        what=str(item.get("what", base.what)),
        name=str(item.get("name", base.name)),
        wanted=item.get("wanted", _wanted(item.get("after")) if diff else None),
        actual=item.get("actual", _actual(item.get("before")) if diff else None),
        diff=diff,
        disrupts=_words(item.get("disrupts")) or base.disrupts,
        left=bool(item.get("left")),
        note=str(item.get("note", "")),
    )


def _builtin(base: Change, result: Mapping[str, Any]) -> Iterator[Change]:
    """What one of Ansible's own modules says in check mode."""
    given = _arguments(result)
    diffs = result.get("diff") or []
    found = False
    for item in [diffs] if isinstance(diffs, Mapping) else diffs:
        before, after = item.get("before"), item.get("after")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            path = str(after.get("path") or before.get("path") or base.name)
            keys = [key for key in after if key != "path" and after[key] != before.get(key)]
            what = "folder" if "directory" in {after.get("state"), result.get("state")} else "file"
            wanted, actual = ({key: side.get(key) for key in keys} for side in (after, before))
            found = True
            yield replace(base, what=what, name=path, wanted=wanted, actual=_missing(actual))
        elif item:
            found = True
            yield _file(
                base, item, str(given.get("dest") or given.get("path") or item.get("after_header") or base.name)
            )
    if found:
        return
    if "status" in result and ("enabled" in given or "state" in given):
        status = result["status"] or {}
        wanted = {key: given[key] for key in ("enabled", "state") if given.get(key) is not None}
        known = {"enabled": status.get("UnitFileState"), "state": status.get("ActiveState")}
        yield replace(
            base, what="unit", name=str(result.get("name")), wanted=wanted, actual={key: known[key] for key in wanted}
        )
    elif given.get("creates"):
        yield replace(base, what="file", name=str(given["creates"]), wanted="made by a command", actual="missing")
    elif "shell" in given and "home" in given and "name" in given:
        yield replace(base, what="user", name=str(given["name"]), wanted=str(given.get("state")), actual=None)
    else:
        said = result.get("msg")
        yield replace(base, wanted=said if isinstance(said, str) and said else None)


def _file(base: Change, item: Mapping[str, Any], path: str) -> Change:
    """One entry of Ansible's diff that is the text of a file."""
    before, after = item.get("before"), item.get("after")
    texts = isinstance(before, str) and isinstance(after, str)
    differs = _DIFFERS.fullmatch(path)
    path = differs["path"] if differs else path
    unit = path.startswith("/etc/systemd/") or path.endswith(".service")
    what = "unit" if unit else "file" if "/" in path else base.what
    diff = unified(str(before), str(after)) if texts else ""
    if not diff:
        why = differs["keys"] if differs else "content (too large or binary to show)"
        return replace(base, what=what, name=path, wanted=f"another {why}", actual=_actual(before))
    return replace(base, what=what, name=path, wanted=_wanted(after), actual=_actual(before), diff=diff)


def _hidden(events: Sequence[Event], changed: Mapping[str, int]) -> Iterator[Change]:
    """Changes of tasks that hide their results: Ansible counts them, and says no more."""
    for host, number in changed.items():
        told = sum(event.host == host and event.kind == "changed" for event in events)
        if number <= told:
            continue
        silent = {event.task: event for event in events if event.host == host and "censored" in event.result}
        silent.pop(SPEC_TASK, None)
        first = next(iter(silent.values()), None)
        names = " or ".join(f"{name!r}" for name in silent) or "a task"
        yield Change(
            host,
            first.role if first else "",
            first.task if first else "",
            "secret",
            f"{number - told} in {names}",
            wanted=HIDDEN,
            actual="differs",
        )


def _arguments(result: Mapping[str, Any]) -> Mapping[str, Any]:
    invocation = result.get("invocation")
    given = invocation.get("module_args") if isinstance(invocation, Mapping) else None
    return given if isinstance(given, Mapping) else {}


def _wanted(text: Any) -> str | None:
    return None if not isinstance(text, str) else "as rendered" if text else "gone"


def _actual(text: Any) -> str | None:
    return None if not isinstance(text, str) else "other content" if text else "missing or empty"


def _missing(actual: Mapping[str, Any]) -> Any:
    return "missing" if actual.get("state") == "absent" else dict(actual)


def _words(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(item) for item in value or ())


def _failure(event: Event, hide: Hider) -> Failure:
    return Failure(event.host, event.role, event.task, hide.text(event.message or "failed without a message"))


# --------------------------------------------------------------------------- the cluster around it


def _cluster(events: Sequence[Event]) -> Json:
    """The cluster as the validation shows it: with `***` for its secrets."""
    found: Json = next(filter(None, (event.result.get("cluster") for event in events if event.task == SPEC_TASK)), {})
    return found


def _planned_hosts(events: Sequence[Event], cluster: Json) -> list[str]:
    """Hosts that a role looked at, or could not; in the order of the inventory."""
    asked = {event.host for event in events if event.host and (event.role or event.kind in {"failed", "unreachable"})}
    known = list(cluster.get("hosts", {}))
    return [host for host in known if host in asked] + sorted(asked - set(known))


def _node(result: Json) -> str:
    """The state of a host's node, as its agent says."""
    try:
        said = json.loads(result.get("stdout") or "")
    except ValueError:
        return "not installed"
    return str(said.get("state") or "not installed") if isinstance(said, dict) else "not installed"


def _idle(node: str | None, driver: Json | None) -> bool:
    """Whether no node runs; where nobody was asked, a driver that is not loaded says so: the gate lets none start."""
    if node is not None:
        return node in NO_NODE
    return driver is not None and "loaded" in driver and driver["loaded"] is None


def _driver(result: Json) -> Json | None:
    """What gpu_driver saw of kernel and driver; None where it told nothing."""
    keys = ("state", "summary", "loaded", "wanted", "running_kernel", "next_kernel", "dkms", "secure_boot")
    return {key: result[key] for key in keys if key in result} or None


def _gpus(result: Json) -> tuple[Json, ...]:
    """The GPUs that tier 0 saw."""
    try:
        said = json.loads(result.get("stdout") or "{}")
    except ValueError:
        return ()
    return tuple(said.get("gpus") or ()) if isinstance(said, dict) else ()


def _replicas(events: Sequence[Event], cluster: Json) -> dict[str, dict[str, int]] | None:
    """host → app → replicas that run there now; None where Serve was not asked or did not answer."""
    answers = [event.result for event in events if event.task == SERVE_TASK and "applications" in event.result]
    if not answers:
        return None
    hosts = {address: host for host, address in cluster.get("node_addresses", {}).items()}
    found: dict[str, dict[str, int]] = {}
    for name, app in answers[0]["applications"].items():
        for deployment in app["deployments"].values():
            for replica in deployment["replicas"]:
                host = hosts.get(replica.get("node_ip"))
                if host and replica.get("state") == "RUNNING":
                    on_host = found.setdefault(host, {})
                    on_host[name] = on_host.get(name, 0) + 1
    return found


def _disruptions(
    changes: Sequence[Change],
    cluster: Json,
    idle: Collection[str],
    replicas: dict[str, dict[str, int]] | None,
    consent: bool,
) -> Iterator[Disruption]:
    reasons: dict[tuple[str, str], list[str]] = {}
    apps: dict[str, dict[str, list[str]]] = {}
    for change in changes:
        for what in change.disrupts:
            reason = f"{change.what} {change.name}"
            if what == "app":
                for host in replicas or {}:
                    if change.name in (replicas or {})[host]:
                        apps.setdefault(host, {}).setdefault(change.name, []).append(reason)
            else:
                reasons.setdefault((change.host, what), []).append(reason)
    head = cluster.get("head", {}).get("host")
    for (host, what), because in reasons.items():
        # Where no node runs, there is nothing to stop; a reboot is told all the same.
        if what in {"node", "docker"} and host in idle:
            continue
        lost = None if replicas is None else dict(replicas.get(host, {}))
        if replicas is not None and host == head and what != "app":
            # Everything ends with Ray's head.
            lost = {}
            for on_host in replicas.values():
                for app, number in on_host.items():
                    lost[app] = lost.get(app, 0) + number
        yield Disruption(
            host, what, tuple(dict.fromkeys(because)), lost, what in NEEDS_CONSENT and host not in idle, consent
        )
    for host, names in apps.items():
        lost = {name: (replicas or {})[host][name] for name in names}
        because = [reason for inner in names.values() for reason in inner]
        yield Disruption(host, "app", tuple(dict.fromkeys(because)), lost, False, consent)


# --------------------------------------------------------------------------- secrets


class Hider:
    """Takes secrets out of what is shown. cluster: as the validation shows it, with `***` for its secrets."""

    def __init__(self, cluster: Json) -> None:
        self.names: set[str] = set()
        self.patterns: list[re.Pattern[str]] = []
        self._learn(cluster, "")

    def _learn(self, value: Any, key: str) -> None:
        """From the places where the shown cluster has `***`."""
        if isinstance(value, Mapping):
            for name, inner in value.items():
                self._learn(inner, str(name))
        elif isinstance(value, (list, tuple)):
            for inner in value:
                self._learn(inner, key)
        elif isinstance(value, str) and "***" in value:
            rest = value.split("***")
            if sum(map(len, rest)) >= 8:
                # `http://user:***@proxy`: enough around it to know it again, whatever it is called there.
                self.patterns.append(re.compile(r"[^\s\"']+?".join(map(re.escape, rest))))
            elif key:
                self.names.add(key)

    def change(self, change: Change) -> Change:
        return replace(
            change,
            wanted=self.value(change.wanted),
            actual=self.value(change.actual),
            diff="\n".join(self.line(line) for line in change.diff.splitlines()),
        )

    def value(self, value: Any, key: str = "") -> Any:
        if isinstance(value, Mapping):
            return {name: self.value(inner, str(name)) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(inner, key) for inner in value]
        if isinstance(value, str):
            return HIDDEN if value and self._secret(key.rpartition(".")[2], value) else self.text(value)
        return value

    def text(self, text: str) -> str:
        for pattern in self.patterns:
            text = pattern.sub(HIDDEN, text)
        return _URL_PASSWORD.sub(rf"\1:{HIDDEN}", text)

    def line(self, line: str) -> str:
        """One line of a diff: `+  "HF_TOKEN": "...",` keeps its name."""
        for match in _ASSIGNMENT.finditer(line):
            value = line[match.end() :].rstrip().rstrip(",")
            if not _NOTHING.fullmatch(value) and self._secret(match["key"], value):
                return line[: match.end()] + HIDDEN + ("," if line.rstrip().endswith(",") else "")
        return self.text(line)

    def _secret(self, key: str, value: str) -> bool:
        if key in self.names:
            return True
        # `max_num_batched_tokens: 2048` is no secret.
        number = value.strip("\"'").isdigit() and key.lower().endswith("tokens")
        return bool(_SECRET_NAME.search(key)) and not _NO_SECRET_NAME.search(key) and not number
