"""Run a playbook and tell what happens, as typed events. The only module that knows ansible-runner."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import ansible_runner
import yaml

from clusterkit import workspace
from clusterkit.errors import Failure, RunFailed, SpecError, UsageError
from clusterkit.spec import files
from clusterkit.spec.findings import Finding, Place

Kind = Literal["play", "task", "ok", "changed", "failed", "unreachable", "skipped"]

_KINDS: dict[str, Kind] = {
    "playbook_on_play_start": "play",
    "playbook_on_task_start": "task",
    "runner_on_ok": "ok",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
    "runner_on_skipped": "skipped",
}


@dataclass(frozen=True)
class Event:
    """One thing that happened. `duration_s` is set when a task ends on a host."""

    kind: Kind
    play: str = ""
    role: str = ""
    task: str = ""
    host: str = ""
    duration_s: float = 0.0
    message: str = ""
    ignored: bool = False
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class HostCount:
    ok: int = 0
    changed: int = 0
    failed: int = 0
    unreachable: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Options:
    """What `deploy` and its like pass on to ansible-playbook."""

    limit: str | None = None
    tags: str | None = None
    check: bool = False
    diff: bool = False
    forks: int | None = None
    extra_vars: Sequence[str] = ()
    vault_ids: Sequence[str] = ()
    verbosity: int = 0
    become_password: str | None = field(default=None, repr=False)
    vault_password: str | None = field(default=None, repr=False)
    rest: Sequence[str] = ()

    def arguments(self) -> list[str]:
        words: list[str] = []
        if self.limit:
            words += ["--limit", self.limit]
        if self.tags:
            words += ["--tags", self.tags]
        if self.check:
            words.append("--check")
        if self.diff:
            words.append("--diff")
        if self.forks:
            words += ["--forks", str(self.forks)]
        for item in self.extra_vars:
            words += ["--extra-vars", item]
        for item in self.vault_ids:
            words += ["--vault-id", item]
        if self.become_password is not None:
            words.append("--ask-become-pass")
        if self.vault_password is not None:
            words.append("--ask-vault-pass")
        if self.verbosity:
            words.append("-" + "v" * self.verbosity)
        return [*words, *self.rest]


@dataclass
class Result:
    """How a run ended. `results` holds what each task returned, by task name and host."""

    folder: Path
    status: str = ""
    return_code: int = 0
    hosts: dict[str, HostCount] = field(default_factory=dict)
    failures: list[Event] = field(default_factory=list)
    results: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    plays: int = 0

    @property
    def log(self) -> Path:
        return self.folder / "artifacts" / "run" / "stdout"

    @property
    def changed(self) -> int:
        return sum(count.changed for count in self.hosts.values())


def run(
    playbook: str,
    inventory: str,
    options: Options | None = None,
    *,
    on_event: Callable[[Event], None] = lambda _event: None,
) -> Result:
    """Run `playbook` (a name under the checkout) on `inventory`.

    Raises SpecError where the inventory is wrong (nothing was touched), RunFailed where a host failed,
    KeyboardInterrupt where it was stopped by a signal.
    """
    chosen = options or Options()
    result = Result(folder=workspace.new_run())
    collect = _Collector(result, on_event)
    passwords = {}
    if chosen.become_password is not None:
        passwords[r"BECOME password.*:\s*?$"] = chosen.become_password
    if chosen.vault_password is not None:
        passwords[r"Vault password.*:\s*?$"] = chosen.vault_password
    _note_inputs(result.folder, playbook, inventory, chosen)
    with _stoppable() as stopped:
        done = ansible_runner.run(
            private_data_dir=str(result.folder),
            # Where the command was given: what it names (`-e @file`, `--vault-id`) is relative to there.
            project_dir=os.getcwd(),
            # A second run of the same folder would inherit the first one's files.
            ident="run",
            playbook=str(workspace.playbook(playbook)),
            # Not as `inventory=`: what does not exist would be written into a file as a host's name.
            cmdline=shlex.join(["--inventory", inventory, *chosen.arguments()]),
            envvars=_environment(),
            passwords=passwords or None,
            # Without this, passwords would be written into the folder in clear.
            suppress_env_files=True,
            event_handler=collect.handle,
            status_handler=lambda status, **_: _forget_command(result.folder, status),
            cancel_callback=stopped,
            quiet=True,
        )
    result.status, result.return_code = done.status, done.rc
    (result.folder / "report.json").write_text(json.dumps(_report(result), indent=1), encoding="utf-8")
    if result.status == "canceled" or stopped():
        raise KeyboardInterrupt
    # What was ignored stands among them, too: Ansible's own verdict counts.
    if result.failures and done.rc != 0:
        findings = _findings(result)
        if findings:
            raise SpecError(findings)
        raise _run_failed(result)
    if done.rc != 0:
        text = result.log.read_text(encoding="utf-8") if result.log.exists() else ""
        raise refusal(text, inventory) or RunFailed(
            host="", role="", task="", message=_last_words(text), log=str(result.log)
        )
    return result


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or a TERM came meanwhile. ansible_runner would take them for itself, keep them after its run, and
    forget one that comes while it ends."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(_number: int, _frame: object) -> None:
        asked.set()

    kept = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


class _Collector:
    def __init__(self, result: Result, on_event: Callable[[Event], None]) -> None:
        self.result = result
        self.on_event = on_event

    def handle(self, raw: dict[str, Any]) -> bool:
        name, data = raw.get("event", ""), raw.get("event_data", {})
        if name == "playbook_on_stats":
            self.result.hosts = _stats(data)
        kind = _KINDS.get(name)
        if kind is None:
            return True
        answer = data.get("res") if isinstance(data.get("res"), dict) else {}
        if kind == "ok" and answer.get("changed"):
            kind = "changed"
        event = Event(
            kind=kind,
            play=data.get("play", "") or data.get("name", ""),
            role=data.get("role", ""),
            task=data.get("task", ""),
            host=data.get("host", ""),
            duration_s=float(data.get("duration") or 0.0),
            message=_message(answer),
            ignored=bool(data.get("ignore_errors")),
            result=answer,
        )
        if kind == "play":
            self.result.plays += 1
        if event.host and kind in {"ok", "changed", "failed", "unreachable"}:
            self.result.results.setdefault(event.task, {})[event.host] = answer
        if kind in {"failed", "unreachable"} and not event.ignored:
            self.result.failures.append(event)
        self.on_event(event)
        return True


def _message(answer: dict[str, Any]) -> str:
    text = str(answer.get("msg") or "")
    if answer.get("_ansible_no_log") or "censored" in answer:
        return "the task hides its output, since it handles a secret"
    for key in ("stderr", "stdout", "module_stderr"):
        words = str(answer.get(key) or "").strip()
        if words and answer.get("rc"):
            text = f"{text}: {words[-800:]}" if text else words[-800:]
            break
    if not text and isinstance(answer.get("results"), list):
        return "; ".join(filter(None, (_message(item) for item in answer["results"] if item.get("failed"))))
    return text


def _stats(data: dict[str, Any]) -> dict[str, HostCount]:
    names = {"ok": "ok", "changed": "changed", "failures": "failed", "dark": "unreachable", "skipped": "skipped"}
    counts: dict[str, dict[str, int]] = {}
    for theirs, ours in names.items():
        for host, number in (data.get(theirs) or {}).items():
            counts.setdefault(host, {})[ours] = number
    return {host: HostCount(**numbers) for host, numbers in sorted(counts.items())}


def _findings(result: Result) -> list[Finding]:
    for event in result.failures:
        if "findings" in event.result and all("file" in item for item in event.result["findings"]):
            return [Finding.from_dict(item) for item in event.result["findings"]]
    return []


def _run_failed(result: Result) -> RunFailed:
    first = result.failures[0]
    hint = None
    message = first.message or "failed without a message"
    if "\nFix: " in message:
        message, _, hint = message.partition("\nFix: ")
    if first.kind == "unreachable":
        hint = f"try: ssh {first.host}; the others may have gone on. Run the same command again afterwards"
    return RunFailed(
        host=first.host,
        role=first.role,
        task=first.task,
        message=message,
        log=str(result.log),
        hint=hint,
        failures=[
            Failure(event.host, event.kind, event.role, event.task, event.message.partition("\nFix: ")[0])
            for event in result.failures
        ],
        hosts={host: vars(count) for host, count in result.hosts.items()},
    )


# What Ansible refuses before any play: what it says, and what validation would say of it.
_REFUSALS: tuple[tuple[str, str, str, str], ...] = (
    (
        r"vault password file .* was not found",
        "--vault-id",
        "names a file that is not there",
        "name the file that holds the vault password",
    ),
    (
        r"no vault secrets|[Vv]ault password|Decryption failed|Attempting to decrypt",
        "vault file",
        "is encrypted, and the vault password is missing or wrong",
        "give it with --ask-vault-pass or --vault-id",
    ),
    (r"YAML parsing failed|[Ss]yntax [Ee]rror", "file", "does not parse", "mend the YAML there"),
    (r"failed to combine variables", "file", "is no mapping of variables", "begin with `name: value`"),
    (r"no hosts to target", "--limit", "matches no host of the inventory", "name a host or group that is in it"),
    (r"[Pp]ermission denied|Unable to read", "file", "cannot be read", "give the user who runs this the right to"),
    (r"Could not find or access", "file", "is not there", "name one that is"),
)


def refusal(text: str, inventory: str) -> SpecError | UsageError | None:
    """Ansible's own refusal as findings with a place; None where `text` is something else."""
    words = _last_words(text)
    wrong = re.search(r"^ansible-playbook: error: (.+)$", text, re.MULTILINE)
    if wrong:
        return UsageError(wrong.group(1), hint="ansible-playbook --help lists what may stand after --")
    where = Place()
    if place := re.search(r"(?:Origin: |[Ff]ile |process |access )'?(/[^\s':]+)(?::(\d+))?", words):
        where = Place(_shown(place.group(1)), int(place.group(2) or 0))
    elif "<CLI option '-e'>" in words:
        where = Place("-e")
    for pattern, subject, problem, fix in _REFUSALS:
        if not re.search(pattern, words):
            continue
        found = [] if where.file else _suspects(subject, problem, fix, inventory)
        return SpecError(found or [Finding(where, subject, problem, fix)])
    return None


def _suspects(subject: str, problem: str, fix: str, inventory: str) -> list[Finding]:
    """Ansible does not always say which file it means: those of the inventory that it can only be."""
    candidates = files.variable_files(inventory)
    if subject == "vault file":
        locked = [path for path in candidates if files.encrypted(path)]
        return [Finding(Place(_shown(str(path)), 1), subject, problem, fix) for path in locked]
    if problem == "does not parse":
        broken = files.unparsable(candidates)
        return [replace(item, place=replace(item.place, file=_shown(item.place.file))) for item in broken]
    return []


def _last_words(text: str) -> str:
    """The error with which Ansible gave up, without the talk before it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    start = re.search(r"^(?:ERROR!|\[ERROR\]:)", text, re.MULTILINE)
    return text[start.start() :].strip() if start else "\n".join(text.strip().splitlines()[-5:])


def _shown(path: str) -> str:
    """Relative to where the command was given, if below it."""
    return path.removeprefix(os.getcwd() + os.sep)


def _environment() -> dict[str, str]:
    """What ansible-playbook needs; a user's own ansible.cfg elsewhere has no part in it."""
    return {
        "ANSIBLE_CONFIG": str(workspace.ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "PATH": os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)]),
    }


def _forget_command(folder: Path, status: dict[str, Any]) -> None:
    """ansible-runner notes the whole command and environment: the values of -e would stay in the folder."""
    if status.get("status") == "running":
        (folder / "artifacts" / "run" / "command").unlink(missing_ok=True)


def _note_inputs(folder: Path, playbook: str, inventory: str, options: Options) -> None:
    """What was asked for; values given with -e may be secret, so only their names are kept."""
    names = [name for item in options.extra_vars for name in _names(item)]
    inputs = {
        "playbook": playbook,
        "inventory": inventory,
        "limit": options.limit,
        "tags": options.tags,
        "check": options.check,
        "extra_vars": names,
    }
    (folder / "inputs.json").write_text(json.dumps(inputs, indent=1), encoding="utf-8")


def _names(extra_vars: str) -> list[str]:
    """The names in one `-e`: a file, YAML or JSON, or `name=value` words."""
    if extra_vars.startswith("@"):
        return [extra_vars]
    if extra_vars.lstrip().startswith(("{", "[")):
        try:
            data = yaml.safe_load(extra_vars)
        except yaml.YAMLError:
            return []
        return [str(name) for name in data] if isinstance(data, dict) else []
    return re.findall(r"(?:^|\s)([A-Za-z_]\w*)=", extra_vars)


def _report(result: Result) -> dict[str, Any]:
    return {
        "status": result.status,
        "return_code": result.return_code,
        "hosts": {host: vars(count) for host, count in result.hosts.items()},
        "failures": [
            {"host": event.host, "role": event.role, "task": event.task, "message": event.message}
            for event in result.failures
        ],
    }
