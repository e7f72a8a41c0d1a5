"""The runner: what Ansible says becomes events, findings or a failure; what a run leaves holds no secret."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clusterkit import operations, runner, workspace
from clusterkit.errors import SpecError, UsageError
from clusterkit.runner import Event, Options, Result
from clusterkit.spec.findings import Place
from tests.support import until

ROOT = Path(__file__).resolve().parents[2]

Json = dict[str, Any]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "state"


# ------------------------------------------------------------------ what Ansible refuses before any play

WARNING = "[WARNING]: Could not match supplied host pattern, ignoring: nosuch\n"
# As ansible-core 2.19 wrote them; {} is the inventory.
REFUSALS = {
    "vault file": (
        "\nPLAY [Validate the inventory] ***\n[ERROR]: Attempting to decrypt but no vault secrets found.\n",
        ("group_vars/all/vault.yml", 1),
        "vault file",
        "--ask-vault-pass or --vault-id",
    ),
    "vault file, wrong password": (
        "[ERROR]: Decryption failed (no vault secrets were found that could decrypt).\n"
        "Origin: {}/group_vars/all/vault.yml\n",
        ("group_vars/all/vault.yml", 0),
        "vault file",
        "--ask-vault-pass or --vault-id",
    ),
    "vault password file": (
        "[WARNING]: Error getting vault password file (None): The vault password file {}/pw was not found\n"
        "[ERROR]: The vault password file {}/pw was not found\n",
        ("pw", 0),
        "--vault-id",
        "name the file that holds the vault password",
    ),
    "variables that do not parse": (
        "[ERROR]: YAML parsing failed: While parsing a flow sequence did not find expected ',' or ']'.\n",
        ("host_vars/w1.yml", 2),
        "inventory",
        "mend the YAML there",
    ),
    "a playbook that does not parse": (
        "[ERROR]: YAML parsing failed: Mapping values are not allowed in this context.\nOrigin: {}/site.yml:7:12\n",
        ("site.yml", 7),
        "file",
        "mend the YAML there",
    ),
    "variables that are a list": (
        "[ERROR]: Could not process '{}/group_vars/all.yml': failed to combine variables, expected dicts but got a "
        "'dict' and a '_AnsibleTaggedList'.\n",
        ("group_vars/all.yml", 0),
        "file",
        "begin with `name: value`",
    ),
    "a file that may not be read": (
        "[ERROR]: An error occurred while trying to read the file '{}/group_vars/all.yml': [Errno 13] Permission "
        "denied: '{}/group_vars/all.yml'\n",
        ("group_vars/all.yml", 0),
        "file",
        "give the user who runs this the right to",
    ),
    "a file of -e that is not there": (
        "[ERROR]: Unable to retrieve file contents.\nCould not find or access '{}/vars.yml' on the Ansible Controller."
        "\nIf you are using a module and expect the file to exist on the remote, see the remote_src option\n",
        ("vars.yml", 0),
        "file",
        "name one that is",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_of_ansible_becomes_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    text, (file, line), subject, fix = REFUSALS[name]
    for path, content in {
        "hosts.yml": "all: {}\n",
        "group_vars/all/vault.yml": "$ANSIBLE_VAULT;1.1;AES256\n3132\n",
        "host_vars/w1.yml": "a: [b\nc: d\n",
    }.items():
        (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / path).write_text(content)
    monkeypatch.chdir(tmp_path)
    found = runner.refusal(text.replace("{}", str(tmp_path / "site")), str(tmp_path / "site"))
    assert isinstance(found, SpecError)
    (only,) = found.findings
    assert only.place == Place(f"site/{file}", line)
    assert only.subject == subject
    assert fix in only.fix


def test_a_limit_that_matches_nothing() -> None:
    text = WARNING + "[ERROR]: Specified inventory, host pattern and/or --limit leaves us with no hosts to target.\n"
    found = runner.refusal(text, "nowhere")
    assert isinstance(found, SpecError)
    assert [(str(item.place), item.subject) for item in found.findings] == [("inventory", "--limit")]


def test_a_value_of_the_command_line_that_does_not_parse() -> None:
    text = "[ERROR]: YAML parsing failed: While parsing a flow node.\nOrigin: <CLI option '-e'>:2:1\n"
    found = runner.refusal(text, "nowhere")
    assert isinstance(found, SpecError)
    assert [item.place for item in found.findings] == [Place("-e")]


def test_an_option_that_ansible_does_not_know() -> None:
    found = runner.refusal("usage: ansible-playbook\nansible-playbook: error: unrecognized arguments: --bogus\n", "x")
    assert isinstance(found, UsageError)
    assert found.message == "unrecognized arguments: --bogus"


def test_what_is_no_refusal_stays_in_its_own_words() -> None:
    assert runner.refusal("[ERROR]: Unexpected Exception, this is probably a bug: 'x'\n", "nowhere") is None


# ------------------------------------------------------------------ events


def collect(*raw: Json) -> tuple[Result, list[Event]]:
    seen: list[Event] = []
    result = Result(folder=Path("unused"))
    collector = runner._Collector(result, seen.append)
    for item in raw:
        collector.handle(item)
    return result, seen


def event(name: str, answer: Json | None = None, **more: Any) -> Json:
    data = {"play": "Run Ray", "role": "ray_node", "task": "Start", "host": "w1", "duration": 1.5, **more}
    return {"event": name, "event_data": {**data, "res": answer or {}}}


def test_events_say_what_happened_where() -> None:
    result, seen = collect(
        {"event": "playbook_on_start", "event_data": {}},
        {"event": "playbook_on_play_start", "event_data": {"name": "Run Ray"}},
        event("playbook_on_task_start", host=""),
        event("runner_on_ok"),
        event("runner_on_ok", {"changed": True}, host="w2"),
        event("runner_on_skipped"),
        event("runner_on_failed", {"msg": "no"}, host="w3"),
        event("runner_on_unreachable", {"msg": "no route"}, host="w4"),
        {"event": "verbose", "event_data": {}},
    )
    assert [item.kind for item in seen] == ["play", "task", "ok", "changed", "skipped", "failed", "unreachable"]
    changed = seen[3]
    assert (changed.play, changed.role, changed.task, changed.host, changed.duration_s) == (
        "Run Ray",
        "ray_node",
        "Start",
        "w2",
        1.5,
    )
    assert [(item.host, item.message) for item in result.failures] == [("w3", "no"), ("w4", "no route")]
    assert set(result.results["Start"]) == {"w1", "w2", "w3", "w4"}
    assert result.plays == 1


def test_an_ignored_failure_is_no_failure() -> None:
    result, seen = collect(event("runner_on_failed", {"msg": "no"}, ignore_errors=True))
    assert result.failures == []
    assert seen[0].ignored


def test_counts_come_from_ansible() -> None:
    data = {"ok": {"w1": 5, "w2": 4}, "changed": {"w1": 2}, "failures": {"w2": 1}, "dark": {"w3": 1}, "skipped": {}}
    result, _ = collect({"event": "playbook_on_stats", "event_data": data})
    assert result.hosts["w1"] == runner.HostCount(ok=5, changed=2)
    assert result.hosts["w2"].failed == 1
    assert result.hosts["w3"].unreachable == 1
    assert result.changed == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"msg": "it broke"}, "it broke"),
        ({"msg": "non-zero return code", "rc": 2, "stderr": "no such file"}, "non-zero return code: no such file"),
        ({"msg": "MODULE FAILURE", "rc": 1, "module_stderr": "boom"}, "MODULE FAILURE: boom"),
        ({"msg": "fine", "rc": 0, "stdout": "talk"}, "fine"),
        ({"results": [{"msg": "one", "failed": True}, {"msg": "two"}, {"msg": "three", "failed": True}]}, "one; three"),
        ({}, ""),
    ],
)
def test_the_message_of_a_failure(answer: Json, message: str) -> None:
    result, _ = collect(event("runner_on_failed", answer))
    assert result.failures[0].message == message


@pytest.mark.parametrize(
    "answer",
    [
        {"censored": "the output has been hidden due to the fact that 'no_log: true' was specified for this result"},
        {"_ansible_no_log": True, "msg": "hush", "rc": 1, "stderr": "hush"},
    ],
)
def test_a_task_that_hides_its_output_says_so(answer: Json) -> None:
    result, _ = collect(event("runner_on_failed", answer))
    assert "hides its output" in result.failures[0].message
    assert "hush" not in result.failures[0].message


def test_a_failure_names_host_role_task_and_fix() -> None:
    result, _ = collect(event("runner_on_failed", {"msg": "no engine\nFix: another stack"}))
    failed = runner._run_failed(result)
    assert (failed.host, failed.role, failed.task) == ("w1", "ray_node", "Start")
    assert (failed.message, failed.hint) == ("no engine", "another stack")


def test_an_unreachable_host_is_one_to_try_by_hand() -> None:
    result, _ = collect(event("runner_on_unreachable", {"msg": "Connection refused"}))
    assert "ssh w1" in str(runner._run_failed(result).hint)


# ------------------------------------------------------------------ arguments


def test_options_become_arguments() -> None:
    options = Options(
        limit="w1",
        tags="ray_node",
        check=True,
        diff=True,
        forks=3,
        extra_vars=("a=1", "@vars.yml"),
        vault_ids=("site@pw",),
        verbosity=2,
        become_password="hush",
        vault_password="hush",
        rest=("--start-at-task", "Start"),
    )
    assert options.arguments() == [
        *("--limit", "w1", "--tags", "ray_node", "--check", "--diff", "--forks", "3"),
        *("--extra-vars", "a=1", "--extra-vars", "@vars.yml", "--vault-id", "site@pw"),
        *("--ask-become-pass", "--ask-vault-pass", "-vv", "--start-at-task", "Start"),
    ]
    assert "hush" not in repr(options)
    assert Options().arguments() == []


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        ("token=hush", ["token"]),
        ("token=hush=hush user=hush", ["token", "user"]),
        ('{"token": "hush", "user": "hush"}', ["token", "user"]),
        ("{token: hush", []),
        ("[hush]", []),
        ("hush", []),
        ("@/srv/vars.yml", ["@/srv/vars.yml"]),
    ],
)
def test_only_names_of_extra_variables_are_noted(tmp_path: Path, given: str, noted: list[str]) -> None:
    runner._note_inputs(tmp_path, "site.yml", "inventory/x", Options(extra_vars=(given,)))
    assert json.loads((tmp_path / "inputs.json").read_text())["extra_vars"] == noted


# ------------------------------------------------------------------ folders of runs


def ended(folder: Path) -> Path:
    (folder / "report.json").write_text("{}")
    return folder


def test_a_runs_folder_is_the_users_alone(state: Path) -> None:
    previous = os.umask(0)
    try:
        folder = workspace.new_run()
    finally:
        os.umask(previous)
    assert folder.parent == state / "clusterkit/runs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_the_last_twenty_runs_are_kept() -> None:
    """In the same second, too. One that goes on is not taken away under its feet."""
    going_on = workspace.new_run()
    made = [ended(workspace.new_run()) for _ in range(workspace.KEPT_RUNS + 3)]
    assert len(set(made)) == len(made)
    newest = workspace.new_run()
    left = set(newest.parent.iterdir())
    assert len(left) == workspace.KEPT_RUNS + 2
    assert {going_on, newest, made[-1]} <= left
    assert made[0] not in left


def test_a_run_that_was_killed_goes_some_day() -> None:
    killed = workspace.new_run()
    long_ago = time.time() - 10 * workspace.ABANDONED_AFTER_S
    os.utime(killed, (long_ago, long_ago))
    workspace.new_run()
    assert not killed.exists()


# ------------------------------------------------------------------ one real run


def test_a_real_run_leaves_its_report_and_no_secret(state: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither a password nor the value of an extra variable is anywhere under the folder."""
    options = Options(
        extra_vars=("site_token=hush-word", '{"site_key": "hush-json"}'),
        become_password="hush-become",
        vault_password="hush-vault",
        verbosity=2,
    )
    seen: list[Event] = []
    cluster = operations.validate(str(ROOT / "inventory/h100"), options, on_event=seen.append)
    assert cluster["name"] == "h100"
    assert {item.kind for item in seen} >= {"play", "task", "ok"}

    (folder,) = (state / "clusterkit/runs").iterdir()
    report = json.loads((folder / "report.json").read_text())
    assert (report["return_code"], report["failures"]) == (0, [])
    assert json.loads((folder / "inputs.json").read_text())["extra_vars"] == ["site_token", "site_key"]
    assert "Read the cluster from the inventory" in (folder / "artifacts/run/stdout").read_text()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"hush" in path.read_bytes()] == []
    # The runner tells its caller; it prints nothing.
    assert capfd.readouterr() == ("", "")


def test_after_a_run_ctrl_c_is_the_program_s_own_again(state: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    operations.validate(str(ROOT / "inventory/h100"))
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_counts_when_the_run_is_just_over(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a watch would go on."""

    def at_the_end(_folder: Path, status: dict[str, Any]) -> None:
        if status["status"] == "successful":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "_forget_command", at_the_end)
    with pytest.raises(KeyboardInterrupt):
        operations.validate(str(ROOT / "inventory/h100"))


def test_a_run_that_is_stopped_says_so(state: Path) -> None:
    """Its hosts are addresses that nobody has, so it waits for them."""
    words = [sys.executable, "-m", "clusterkit", "status", "--watch", "-i", str(ROOT / "inventory/h100")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        until(lambda: list((state / "clusterkit/runs").glob("*/artifacts/run/job_events/*.json")))
        watch.send_signal(signal.SIGINT)
        _, said = watch.communicate(timeout=60)
    assert watch.returncode == 1
    assert "stopped; the same command again goes on from here" in said
