"""The host agent with a launcher and a systemd that only pretend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clusterkit import operations
from clusterkit.runner import Event, Options

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "roles/host_agent/files/host-agent"
# The interpreter below the virtual environment, if there is one: the scripts need nothing from it, and it starts
# in a third of the time.
PYTHON = getattr(sys, "_base_executable", sys.executable)

# A node that is nothing but a file: what it runs as.
LAUNCHER = """
import json, os, sys
folder = os.path.dirname(os.path.abspath(sys.argv[0]))
node, word = folder + "/running", sys.argv[3]
with open(folder + "/calls", "a") as calls:
    calls.write(" ".join(sys.argv[3:]) + "\\n")
if word == "start":
    if os.path.exists(folder + "/broken"):
        print(json.dumps({"failed": True, "reason": "no memory", "log": ["a line"]}))
        sys.exit(1)
    text = open(folder + "/instance.env").read()
    open(node, "w").write(text.split("=")[1].strip())
if word == "drain" and os.path.exists(folder + "/stuck"):
    print(json.dumps({"failed": True, "reason": "work is still on the node after 120 s", "log": []}))
    sys.exit(1)
changed = word == "start" or (word == "drain" and os.path.exists(node))
if word == "stop":
    changed = os.path.exists(node)
    if changed:
        os.unlink(node)
answer = {"state": "stopped", "reason": "stopped", "instance_id": None, "changed": changed, "drained": word == "drain"}
if os.path.exists(folder + "/half"):
    answer.update(state="degraded", reason="no raylet yet")
if os.path.exists(node):
    answer.update(state="running", reason=None, instance_id=open(node).read(), generation="g1", since="now")
print(json.dumps(answer))
"""

SYSTEMCTL = """#!/bin/sh
echo "$@" >> FOLDER/systemctl
case "$2" in
  start) exec PYTHON FOLDER/launcher --config x start ;;
  stop) rm -f FOLDER/running FOLDER/half ;;
  is-active) cat FOLDER/active 2>/dev/null || echo active ;;
esac
"""


class Host:
    def __init__(self, folder: Path, unit: str | None = None) -> None:
        self.folder = folder
        (folder / "launcher").write_text(LAUNCHER)
        (folder / "generation").write_text("g1\n")
        self.record = folder / "host.json"
        self.config = folder / "host-agent.json"
        self.config.write_text(
            json.dumps(
                {
                    "launcher": str(folder / "launcher"),
                    "launcher_config": str(folder / "node.json"),
                    "python": PYTHON,
                    "systemd_unit": unit,
                    "record": str(self.record),
                    "instance_env": str(folder / "instance.env"),
                    "generation_file": str(folder / "generation"),
                    "start_timeout_s": 2,
                }
            )
        )
        self.env = dict(os.environ)
        if unit:
            programs = folder / "bin"
            programs.mkdir()
            text = SYSTEMCTL.replace("FOLDER", str(folder)).replace("PYTHON", PYTHON)
            for name, content in (("systemctl", text), ("journalctl", "#!/bin/sh\necho from the journal\n")):
                (programs / name).write_text(content)
                (programs / name).chmod(0o755)
            self.env["PATH"] = f"{programs}:{self.env['PATH']}"

    def call(self, *words: str, given: str = "") -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [PYTHON, str(AGENT), "--config", str(self.config), *words],
            input=given,
            capture_output=True,
            text=True,
            env=self.env,
            check=False,
        )
        lines = done.stdout.splitlines()
        assert len(lines) == 1, done.stdout + done.stderr
        return done.returncode, json.loads(lines[0])

    def read_record(self) -> dict[str, Any]:
        found = json.loads(self.record.read_text())
        assert isinstance(found, dict)
        return found

    def write_record(self, **values: Any) -> None:
        self.record.write_text(json.dumps(values))


MISSING = object()
SYSTEM_PYTHON = "/usr/bin/python3"
NOBODY = 65534


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize("unit", [None, "clusterkit-ray.service"])
def test_the_life_of_a_node(tmp_path: Path, unit: str | None) -> None:
    host = Host(tmp_path, unit)
    code, answer = host.call("start")
    assert (code, answer["changed"], answer["state"]) == (0, True, "running")
    first = answer["instance_id"]
    assert re.fullmatch(r"[A-Za-z0-9._-]+-\d{13}", first)
    assert (tmp_path / "instance.env").read_text() == f"RAY_CLOUD_INSTANCE_ID={first}\n"
    record = host.read_record()
    assert (record["instance_id"], record["stopped"]) == (first, None)
    assert host.record.stat().st_mode & 0o777 == 0o644

    code, answer = host.call("start")
    assert (code, answer["changed"], answer["instance_id"]) == (0, False, first)
    code, answer = host.call("status")
    assert (code, answer["changed"], answer["generation_on_disk"]) == (0, False, "g1")
    code, answer = host.call("drain")
    assert (code, answer["changed"], answer["drained"]) == (0, True, True)
    assert host.call("drain", "--deadline")[0] == 0
    assert (tmp_path / "calls").read_text().splitlines()[-2:] == ["drain --deadline", "status"]
    host.call("drain", "--timeout", "900")
    assert (tmp_path / "calls").read_text().splitlines()[-2] == "drain --timeout 900"
    for wrong in (["--now"], ["--timeout"], ["--timeout", "0"], ["--timeout", "1; id"], ["--deadline", "x"]):
        assert host.call("drain", *wrong)[0] == 2

    code, answer = host.call("stop")
    assert (code, answer["changed"], answer["state"]) == (0, True, "stopped")
    assert host.read_record()["instance_id"] is None
    code, answer = host.call("stop")
    assert (code, answer["changed"]) == (0, False)

    _, answer = host.call("start")
    assert answer["instance_id"] != first, "Ray must never see an id again"


def test_with_systemd_the_unit_is_started_and_strays_are_swept(tmp_path: Path) -> None:
    host = Host(tmp_path, "clusterkit-ray.service")
    host.call("start")
    host.call("stop")
    lines = (tmp_path / "systemctl").read_text().splitlines()
    start = lines.index("--no-ask-password start clusterkit-ray.service")
    assert "--no-ask-password daemon-reload" in lines[:start], "a unit file may be newer than what systemd knows"
    assert "--no-ask-password stop clusterkit-ray.service" in lines
    assert "stop" in (tmp_path / "calls").read_text().splitlines(), "systemd knows only its own"


@pytest.mark.parametrize(("unit", "cleared"), [("activating", False), ("failed", True)])
def test_a_start_that_was_cut_is_waited_for_and_what_is_left_of_a_node_is_cleared_away(
    tmp_path: Path, unit: str, cleared: bool
) -> None:
    host = Host(tmp_path, "clusterkit-ray.service")
    host.call("start", "w-1")
    (tmp_path / "running").rename(tmp_path / "half")
    (tmp_path / "active").write_text(unit)
    code, answer = host.call("start", "w-1")
    assert (code, answer["state"], answer["instance_id"]) == (0, "running", "w-1")
    stopped = "--no-ask-password stop clusterkit-ray.service" in (tmp_path / "systemctl").read_text().splitlines()
    assert stopped is cleared


def test_another_instance_does_not_take_over_a_start_that_was_cut(tmp_path: Path) -> None:
    host = Host(tmp_path, "clusterkit-ray.service")
    host.call("start", "w-1")
    (tmp_path / "running").rename(tmp_path / "half")
    (tmp_path / "active").write_text("activating")
    assert host.call("start", "w-2")[1]["instance_id"] == "w-2"
    assert "--no-ask-password stop clusterkit-ray.service" in (tmp_path / "systemctl").read_text().splitlines()


def test_a_given_instance(host: Host) -> None:
    code, answer = host.call("start", "w-7_a.b")
    assert (code, answer["instance_id"]) == (0, "w-7_a.b")
    assert host.call("start", "w-7_a.b")[1]["changed"] is False
    code, answer = host.call("start", "w-8")
    assert (code, answer["refused"], answer["instance_id"]) == (3, "instance", "w-7_a.b")
    assert host.read_record()["instance_id"] == "w-7_a.b"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("quarantine", {"reason": "ECC errors", "since": "today"}, "in quarantine: ECC errors (since today)"),
        ("maintenance", {"owner": "kim", "reason": "new fan"}, "in maintenance: new fan (by kim)"),
        ("maintenance", True, "in maintenance: no reason given"),
    ],
)
def test_a_host_that_is_out_of_service_refuses(host: Host, key: str, value: Any, says: str) -> None:
    host.write_record(**{key: value}, tags={"rack": "b2"}, later="kept")
    code, answer = host.call("start")
    assert (code, answer["refused"], answer["changed"]) == (3, key, False)
    assert says in answer["reason"]
    assert not (host.folder / "running").exists()
    code, answer = host.call("status")
    assert (code, answer[key]) == (0, value)
    host.write_record(tags={"rack": "b2"}, later="kept")
    assert host.call("start")[0] == 0
    record = host.read_record()
    assert (record["tags"], record["later"]) == ({"rack": "b2"}, "kept"), "what others will add is not lost"


def test_a_hold_keeps_the_node_off_until_it_is_released(host: Host) -> None:
    host.write_record(tags={"rack": "b2"}, later="kept")
    reason = 'new fan; "quoted" $(reboot) {{ x }} \N{SNOWMAN}'
    code, answer = host.call("hold", "--owner", "kim@ctl", "--reason", reason)
    assert (code, answer["changed"]) == (0, True)
    entry = answer["maintenance"]
    assert (entry["owner"], entry["reason"]) == ("kim@ctl", reason)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["since"])
    assert answer["held"] == f"in maintenance: {reason} (by kim@ctl, since {entry['since']})"
    assert host.read_record()["maintenance"] == entry
    assert host.read_record()["later"] == "kept"

    assert host.call("hold", "--reason", reason, "--owner", "kim@ctl")[1]["changed"] is False
    code, answer = host.call("start")
    assert (code, answer["refused"]) == (3, "maintenance")
    assert reason in answer["reason"]
    assert host.call("status")[1]["held"] == f"in maintenance: {reason} (by kim@ctl, since {entry['since']})"

    code, answer = host.call("release")
    assert (code, answer["changed"], answer["maintenance"], answer["held"]) == (0, True, None, None)
    assert host.call("release")[1]["changed"] is False
    assert host.call("start")[0] == 0
    assert host.call("status")[1]["held"] is None


def test_the_owner_may_change_the_reason_and_nobody_else(host: Host) -> None:
    host.call("hold", "--owner", "kim", "--reason", "new fan")
    since = host.read_record()["maintenance"]["since"]
    code, answer = host.call("hold", "--owner", "lee", "--reason", "new disk")
    assert (code, answer["refused"], answer["changed"]) == (3, "maintenance", False)
    assert "new fan (by kim" in answer["reason"]
    assert host.call("hold", "--owner", "kim", "--reason", "new fan and disk")[1]["changed"] is True
    assert host.read_record()["maintenance"] == {"owner": "kim", "reason": "new fan and disk", "since": since}


def test_a_release_ends_both_and_says_what_it_lifted(host: Host) -> None:
    entries = {"quarantine": {"reason": "ECC errors"}, "maintenance": {"owner": "kim", "reason": "new fan"}}
    host.write_record(**entries, tags={"rack": "b2"})
    assert host.call("status")[1]["held"] == "in quarantine: ECC errors; in maintenance: new fan (by kim)"
    code, answer = host.call("release")
    assert (code, answer["changed"], answer["held"], answer["released"]) == (0, True, None, entries)
    record = host.read_record()
    assert (record["quarantine"], record["maintenance"], record["tags"]) == (None, None, {"rack": "b2"})
    lifted = record["quarantine_lifted"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lifted)
    code, answer = host.call("release")
    assert (answer["changed"], answer["released"]) == (False, {})
    assert host.read_record()["quarantine_lifted"] == lifted
    assert host.call("start")[0] == 0


def test_a_host_without_ray_can_be_looked_at_kept_out_and_stopped(host: Host) -> None:
    """A sick GPU is found before ray_node comes; `remove` has to work there too."""
    (host.folder / "launcher").unlink()
    host.write_record(quarantine={"reason": "ECC errors"})
    code, answer = host.call("status")
    assert (code, answer["state"], answer["held"]) == (0, "stopped", "in quarantine: ECC errors")
    code, answer = host.call("stop")
    assert (code, answer["changed"]) == (0, False)
    assert host.call("drain")[1]["drained"] is True
    host.call("release")
    code, answer = host.call("start")
    assert (code, "there is no launcher" in answer["reason"]) == (1, True)


def test_a_release_of_one_leaves_the_other(host: Host) -> None:
    entries = {"quarantine": {"reason": "ECC errors"}, "maintenance": {"owner": "kim", "reason": "new fan"}}
    host.write_record(**entries)
    _, answer = host.call("release", "maintenance")
    assert (answer["released"], answer["held"]) == (
        {"maintenance": entries["maintenance"]},
        "in quarantine: ECC errors",
    )
    assert host.call("start")[0] == 3
    assert host.call("release", "quarantine")[1]["held"] is None


def test_the_end_of_a_maintenance_is_no_end_of_a_quarantine(host: Host) -> None:
    host.call("hold", "--owner", "kim", "--reason", "new fan")
    assert set(host.call("release")[1]["released"]) == {"maintenance"}
    assert host.read_record()["quarantine_lifted"] is None


def finding(**changes: Any) -> dict[str, Any]:
    said = {"subject": "GPU 3 (0000:c5:00.0)", "problem": "2 errors", "fix": 'reset it; "$(reboot)" \N{SNOWMAN}'}
    return {"check": "ecc_uncorrectable", "severity": "error", **said, **changes}


def found(*findings: Any, **changes: Any) -> str:
    return json.dumps({"owner": "gpu_health", "reason": "1 GPU error", "findings": list(findings), **changes})


def test_a_quarantine_keeps_the_node_off_with_its_findings(host: Host) -> None:
    host.call("start")
    host.write_record(**{**host.read_record(), "later": "kept"})
    code, answer = host.call("quarantine", given=found(finding()))
    assert (code, answer["changed"]) == (0, True)
    entry = answer["quarantine"]
    assert (entry["owner"], entry["reason"], entry["findings"]) == ("gpu_health", "1 GPU error", [finding()])
    assert answer["held"] == f"in quarantine: 1 GPU error (by gpu_health, since {entry['since']})"
    assert host.read_record()["later"] == "kept"
    status = host.call("status")[1]
    assert status["quarantine"]["findings"] == [finding()]
    assert status["state"] == "running", "drain and stop are words of their own"
    host.call("stop")
    code, answer = host.call("start")
    assert (code, answer["refused"]) == (3, "quarantine")


def test_the_same_fault_changes_nothing_and_another_keeps_since(host: Host) -> None:
    host.write_record(quarantine={**json.loads(found(finding())), "since": "2026-01-01T00:00:00Z"})
    code, answer = host.call("quarantine", given=found(finding(problem="3 errors", severity="warning")))
    assert (code, answer["changed"]) == (0, False)
    assert answer["quarantine"]["findings"] == [finding()], "a count that grows is no other fault"
    for given in (
        found(finding(), finding(subject="GPU 4 (0000:e5:00.0)")),
        found(finding(check="links")),
        found(finding(check="links"), reason="another"),
        found(finding(check="links"), reason="another", owner="kim"),
    ):
        answer = host.call("quarantine", given=given)[1]
        assert (answer["changed"], answer["quarantine"]["since"]) == (True, "2026-01-01T00:00:00Z")
        assert host.call("quarantine", given=given)[1]["changed"] is False


def test_a_quarantine_that_somebody_wrote_by_hand_is_taken_over(host: Host) -> None:
    host.write_record(quarantine=True)
    answer = host.call("quarantine", given=found(finding()))[1]
    assert answer["quarantine"]["findings"] == [finding()]
    assert answer["quarantine"]["since"]


@pytest.mark.parametrize(
    "given",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps({"owner": "x", "reason": "y"}),
        found(later="x"),
        found(owner=""),
        found(owner=None),
        found(reason="x" * 201),
        found(reason="a\nb"),
        found(findings={}),
        found(findings=[[]]),
        found(*[finding()] * 201),
        found(finding(check="Not A Slug")),
        found(finding(check="../x")),
        found(finding(severity="fatal")),
        found(finding(severity=["error"])),
        found(finding(subject=7)),
        found(finding(problem="")),
        found(finding(problem="\x1b[31mred")),
        found(finding(fix="x" * 1001)),
        found(finding(later="x")),
        found(finding(problem="x" * 1000, fix="y" * 1000), *[finding(problem="z" * 900)] * 80),
    ],
)
def test_findings_of_another_shape_are_refused(host: Host, given: str) -> None:
    code, answer = host.call("quarantine", given=given)
    assert (code, answer["failed"], answer["changed"]) == (2, True, False)
    assert not host.record.exists()


def test_a_host_whose_launcher_is_broken_can_be_held(host: Host) -> None:
    (host.folder / "launcher").write_text("raise SystemExit(1)")
    assert host.call("status")[0] == 1
    assert host.call("hold", "--owner", "kim", "--reason", "new disk")[0] == 0
    assert host.read_record()["maintenance"]["reason"] == "new disk"


# ------------------------------------------------------------------ from outside


def test_a_host_without_a_node_can_be_switched_off(tmp_path: Path) -> None:
    host = Host(tmp_path, "clusterkit-ray.service")
    code, answer = host.call("poweroff")
    assert (code, answer["changed"], answer["state"]) == (0, True, "stopped")
    assert (tmp_path / "systemctl").read_text().splitlines() == ["--no-ask-password poweroff --no-block"]


@pytest.mark.parametrize("why", ["running", "maintenance", "quarantine"])
def test_nothing_that_runs_or_is_held_is_switched_off(tmp_path: Path, why: str) -> None:
    host = Host(tmp_path, "clusterkit-ray.service")
    if why == "running":
        host.call("start")
    else:
        host.write_record(**{why: {"owner": "kim", "reason": "new fan"}})
    code, answer = host.call("poweroff")
    assert (code, answer["refused"]) == (3, why)
    asked = tmp_path / "systemctl"
    assert not asked.exists() or "poweroff" not in asked.read_text()
    host.call("stop")
    host.write_record()
    assert host.call("poweroff")[0] == 0


def test_a_machine_that_is_only_lent_is_not_switched_off(host: Host) -> None:
    code, answer = host.call("poweroff")
    assert (code, answer["refused"]) == (3, "poweroff")


def remote(host: Host, asked: str | None) -> tuple[int, dict[str, Any]]:
    host.env.pop("SSH_ORIGINAL_COMMAND", None)
    if asked is not None:
        host.env["SSH_ORIGINAL_COMMAND"] = asked
    return host.call("remote", given=found(finding()))


@pytest.mark.skipif(os.geteuid() != 0, reason="the words are root's")
def test_the_fleet_may_say_its_words(host: Host) -> None:
    assert remote(host, "start w-1")[1]["instance_id"] == "w-1"
    assert remote(host, "status")[1]["state"] == "running"
    assert remote(host, "drain --timeout 5")[1]["drained"] is True
    assert remote(host, "stop")[1]["changed"] is True
    assert remote(host, "quarantine")[1]["held"].startswith("in quarantine: 1 GPU error")
    code, answer = remote(host, "start w-2")
    assert (code, answer["refused"]) == (3, "quarantine")


@pytest.mark.parametrize(
    "asked",
    [
        None,
        "",
        "bash",
        "status; reboot",
        "start a;reboot",
        "start $(reboot)",
        "start a\nreboot",
        "start  a",
        "status --config /tmp/mine",
        "--config /tmp/mine status",
        "hold --owner kim --reason x",
        "release",
        "remote",
        "drain --timeout 5; id",
        "start " + "x" * 300,
    ],
)
def test_the_fleet_may_say_nothing_else(host: Host, asked: str | None) -> None:
    code, answer = remote(host, asked)
    assert (code, answer["failed"]) == (2, True)
    assert not (host.folder / "calls").exists(), "the launcher was not even asked"


@pytest.mark.parametrize("asked", ["release", "hold --owner kim --reason x", "remote", "remote-root", "start a;id", ""])
def test_root_checks_the_word_again(host: Host, asked: str) -> None:
    """Whoever has become the fleet's user may run `remote-root` by sudo, with any stdin."""
    code, answer = host.call("remote-root", given=f"{asked}\n{found(finding())}")
    assert (code, answer["failed"]) == (2, True)
    assert not (host.folder / "calls").exists()
    assert not host.record.exists()
    assert host.call("remote-root", given="status\n")[1]["state"] == "stopped"
    assert host.call("remote-root", "status")[0] == 2, "no word from its arguments"


SUDO = """#!/bin/sh
printf "%s\\n" "$*" > FOLDER/sudo
cat > FOLDER/stdin
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason="needs an interpreter that everybody may run")
@pytest.mark.parametrize(
    ("asked", "stdin", "passed"),
    [("start w-1", "more", "start w-1\n"), ("quarantine", found(finding()), f"quarantine\n{found(finding())}")],
)
def test_the_fleet_s_user_asks_root_by_one_command(open_folder: Path, asked: str, stdin: str, passed: str) -> None:
    os.chmod(open_folder, 0o777)
    program, agent = open_folder / "sudo-here", open_folder / "host-agent"
    program.mkdir()
    (program / "sudo").write_text(SUDO.replace("FOLDER", str(open_folder)))
    (program / "sudo").chmod(0o755)
    agent.write_text(AGENT.read_text())
    env = {"PATH": f"{program}:/usr/bin:/bin", "SSH_ORIGINAL_COMMAND": asked}
    words = [SYSTEM_PYTHON, str(agent), "remote"]
    done = subprocess.run(words, env=env, user=NOBODY, input=stdin, text=True, check=False)
    assert done.returncode == 0
    said = (open_folder / "sudo").read_text()
    assert said == f"-n {agent} --config /etc/clusterkit/host-agent.json remote-root\n"
    assert (open_folder / "stdin").read_text() == passed


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """pytest's own folders are closed to everybody else."""
    with tempfile.TemporaryDirectory(prefix="host-agent-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason="needs an interpreter that everybody may run")
@pytest.mark.parametrize(
    ("wanted", "owner", "runs_as"),
    [(None, NOBODY, NOBODY), (None, 0, 0), ("root", NOBODY, 0), ("nobody", 0, NOBODY), (MISSING, NOBODY, NOBODY)],
)
def test_who_calls_the_launcher(open_folder: Path, wanted: Any, owner: int, runs_as: int) -> None:
    host = Host(open_folder)
    (open_folder / "launcher").write_text('import json, os\nprint(json.dumps({"state": "-", "reason": os.getuid()}))\n')
    config = {**json.loads(host.config.read_text()), "python": SYSTEM_PYTHON}
    if wanted is not MISSING:
        config["launcher_user"] = wanted
    host.config.write_text(json.dumps(config))
    os.chown(open_folder, owner, 0)
    code, answer = host.call("status")
    assert (code, answer["reason"]) == (0, runs_as)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize(("wanted", "says"), [("no-such-user", "no-such-user"), (["root"], "name or null")])
def test_a_user_that_is_none_is_refused(host: Host, wanted: Any, says: str) -> None:
    host.config.write_text(json.dumps({**json.loads(host.config.read_text()), "launcher_user": wanted}))
    code, answer = host.call("status")
    assert code == 2
    assert says in answer["reason"]


def test_a_host_that_was_never_converged_refuses(host: Host) -> None:
    (host.folder / "generation").unlink()
    code, answer = host.call("start")
    assert (code, answer["refused"]) == (3, "generation")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["reboot"],
        ["--help"],
        ["start", "a b"],
        ["start", "-x"],
        ["start", "a;rm"],
        ["start", "a\nb"],
        ["start", "x" * 64],
        ["start", ""],
        ["start", "a", "b"],
        ["stop", "a"],
        ["status", "; reboot"],
        ["hold"],
        ["hold", "--owner", "kim"],
        ["hold", "--owner", "kim", "--owner", "lee"],
        ["hold", "--owner", "kim", "--reason", "x", "--force"],
        ["hold", "--owner", "kim", "--reason", ""],
        ["hold", "--owner", "kim", "--reason", "   "],
        ["hold", "--owner", "kim", "--reason", "a\nb"],
        ["hold", "--owner", "kim", "--reason", "\x1b[31mred"],
        ["hold", "--owner", "kim", "--reason", "x" * 201],
        ["hold", "--owner", "k" * 201, "--reason", "x"],
        ["release", "now"],
        ["quarantine", "now"],
        ["poweroff", "now"],
        ["remote", "status"],
    ],
)
def test_anything_else_is_refused(host: Host, words: list[str]) -> None:
    code, answer = host.call(*words)
    assert (code, answer["failed"], answer["changed"]) == (2, True, False)
    assert not (host.folder / "calls").exists(), "the launcher was not even asked"


@pytest.mark.parametrize("unit", [None, "clusterkit-ray.service"])
def test_a_start_that_fails_is_told_and_leaves_no_instance(tmp_path: Path, unit: str | None) -> None:
    host = Host(tmp_path, unit)
    (host.folder / "broken").touch()
    code, answer = host.call("start")
    assert (code, answer["failed"]) == (1, True)
    assert "no memory" in answer["reason"]
    assert answer["log"] == (["from the journal"] if unit else ["a line"])
    assert host.read_record()["instance_id"] is None


def test_a_broken_record_stops_a_start(host: Host) -> None:
    host.record.write_text("{")
    code, answer = host.call("start")
    assert (code, answer["failed"]) == (1, True)
    assert "host's record" in answer["reason"]
    assert host.record.read_text() == "{"


def test_the_record_is_never_half_written(host: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("untouched")
    host.record.symlink_to(elsewhere)
    elsewhere.write_text("{}")
    host.call("start")
    assert elsewhere.read_text() == "{}", "a link is replaced, not followed"
    assert not host.record.is_symlink()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# ------------------------------------------------------------------ the playbooks that call it


DRAIN = ROOT / "playbooks/drain.yml"


class Cluster:
    """A head and two workers that are this machine, with the pretended launcher below their agent."""

    def __init__(self, folder: Path) -> None:
        self.inventory = folder / "inventory"
        self.paths = {name: folder / name for name in ("root", "config", "state", "log", "models")}
        for path in (self.inventory, *self.paths.values(), self.paths["root"] / "bin"):
            path.mkdir(parents=True, exist_ok=True)
        self.host = Host(self.paths["state"])
        self.agent = self.paths["root"] / "bin/host-agent"
        self.agent.symlink_to(AGENT)
        (self.paths["config"] / "host-agent.json").symlink_to(self.host.config)
        local = {"ansible_connection": "local", "ansible_python_interpreter": "{{ ansible_playbook_python }}"}
        facts = {
            "clusterkit_name": "pretended",
            "clusterkit_stack": "cpu",
            "clusterkit_accelerator": "cpu",
            "clusterkit_paths": {**{name: str(path) for name, path in self.paths.items()}, "ray_temp": "/tmp/none"},
        }
        workers = {"w1": {"clusterkit_node_ip": "127.0.0.2"}, "w2": {"clusterkit_node_ip": "127.0.0.3"}}
        groups = {
            "ray_head": {"hosts": {"h1": {"clusterkit_node_ip": "127.0.0.1"}}},
            "ray_workers": {"children": {"cpus": {"hosts": workers}}},
        }
        tree = {"all": {"vars": {**local, **facts}, "children": groups}}
        (self.inventory / "hosts.yml").write_text(json.dumps(tree))
        self.env = {**os.environ, "XDG_STATE_HOME": str(folder / "runs"), "ANSIBLE_NOCOLOR": "1"}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def clusterkit(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "clusterkit", *words, "-i", str(self.inventory))

    def playbook(self, path: Path, *words: str) -> subprocess.CompletedProcess[str]:
        program = str(Path(sys.executable).with_name("ansible-playbook"))
        return self.run(program, str(path), "-i", str(self.inventory), *words)

    def drain(self, reason: str, *words: str) -> subprocess.CompletedProcess[str]:
        return self.clusterkit("host", "drain", "w1", "--reason", reason, "--json", *words)

    @property
    def calls(self) -> list[str]:
        file = self.host.folder / "calls"
        words = file.read_text().split() if file.exists() else []
        return [word for word in words if word != "status"]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_drained_host_is_empty_off_and_held_and_nobody_else_is_touched(cluster: Cluster) -> None:
    cluster.host.call("start")
    reason = 'new {{ fan }}: "loud"'
    done = cluster.drain(reason)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["changed"], set(answer["hosts"])) == (True, {"w1"})
    assert answer["maintenance"]["reason"] == reason
    assert re.fullmatch(r"\S+@\S+", answer["maintenance"]["owner"])
    assert cluster.host.read_record()["maintenance"] == answer["maintenance"]
    assert cluster.calls == ["start", "drain", "--timeout", "900", "stop"]
    again = cluster.playbook(DRAIN, "--limit", "w1", "-e", json.dumps({"drain_reason": "the same"}))
    assert "changed=1" in again.stdout, "its owner may give another reason"
    again = cluster.playbook(DRAIN, "--limit", "w1", "-e", json.dumps({"drain_reason": "the same"}))
    assert "changed=0" in again.stdout
    assert cluster.host.read_record()["maintenance"]["since"] == answer["maintenance"]["since"]

    seen = json.loads(cluster.clusterkit("status", "--json").stdout)["hosts"]
    assert {host["state"] for host in seen} == {"stopped"}
    assert all(host["held"].startswith("in maintenance: the same (by ") for host in seen)


def test_a_host_that_somebody_holds_already_stays_his(cluster: Cluster) -> None:
    cluster.host.call("hold", "--owner", "kim", "--reason", "new disk")
    done = cluster.drain("new fan")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["maintenance"]["owner"] == "kim"
    assert cluster.host.read_record()["maintenance"]["reason"] == "new disk"


def test_work_that_cannot_move_keeps_the_host_in_service_unless_forced(cluster: Cluster) -> None:
    cluster.host.call("start")
    (cluster.host.folder / "stuck").touch()
    done = cluster.drain("new fan")
    assert done.returncode == 1
    assert "w1 was not drained, and is not held: work is still on the node after 120 s" in done.stderr
    assert "--force" in done.stderr
    assert [failure["host"] for failure in json.loads(done.stdout)["failures"]] == ["w1"]
    assert cluster.host.read_record()["maintenance"] is None
    assert "stop" not in cluster.calls
    forced = cluster.drain("new fan", "--force")
    assert forced.returncode == 0, forced.stderr
    assert cluster.host.read_record()["maintenance"]["reason"] == "new fan"
    assert cluster.calls[-1] == "stop"


def test_a_host_without_an_agent_is_told(cluster: Cluster) -> None:
    cluster.agent.unlink()
    done = cluster.drain("new fan")
    assert done.returncode == 1
    assert "w1 was not drained" in done.stderr
    assert str(cluster.agent) in done.stderr


def test_a_release_needs_a_name_and_changes_nothing_twice(cluster: Cluster) -> None:
    cluster.host.call("hold", "--owner", "kim", "--reason", "new disk")
    release = ROOT / "playbooks/release.yml"
    refused = cluster.playbook(release)
    assert refused.returncode == 2
    assert "name one with --limit" in refused.stdout
    assert cluster.host.read_record()["maintenance"] is not None
    assert "changed=1" in cluster.playbook(release, "--limit", "w1").stdout
    assert cluster.host.read_record()["maintenance"] is None
    assert "changed=0" in cluster.playbook(release, "--limit", "w1").stdout
    cluster.agent.unlink()
    assert cluster.playbook(release, "--limit", "w1").returncode == 0, "a host that was never converged"


@pytest.mark.parametrize("words", [(), ("--limit", "w1")])
def test_a_drain_needs_a_host_and_a_reason(cluster: Cluster, words: tuple[str, ...]) -> None:
    done = cluster.playbook(DRAIN, *words, *(("-e", "drain_reason=fan") if not words else ()))
    assert done.returncode == 2
    assert "a host and a reason have to be named" in done.stdout
    assert cluster.calls == []


@pytest.mark.parametrize("key", ["maintenance", "quarantine"])
def test_a_deploy_reports_a_held_host_and_leaves_it(cluster: Cluster, tmp_path: Path, key: str) -> None:
    play = tmp_path / "play.yml"
    play.write_text(
        f"""\
- import_playbook: {ROOT}/playbooks/validate.yml
- hosts: w1
  gather_facts: false
  tasks:
    - ansible.builtin.include_role:
        name: ray_node
        tasks_from: run
"""
    )
    cluster.host.write_record(**{key: {"owner": "kim", "reason": "new disk", "since": "today"}})
    held = cluster.playbook(play)
    assert held.returncode == 0, held.stdout
    assert f"w1 is in {key}: new disk (by kim, since today)" in held.stdout
    assert "changed=0" in held.stdout
    assert cluster.calls == []
    cluster.host.write_record()
    free = cluster.playbook(play)
    assert "changed=1" in free.stdout
    assert cluster.calls == ["start"]


def test_verify_excuses_a_held_host(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", cluster.env["XDG_STATE_HOME"])
    cluster.host.write_record(maintenance={"owner": "kim", "reason": "new disk"})
    asked: list[dict[str, Any]] = []

    def note(event: Event) -> None:
        if event.task == operations.PROBE_TASK and event.result:
            asked.append(event.result["invocation"]["module_args"])

    operations.verify(str(cluster.inventory), on_event=note)
    operations.verify(str(cluster.inventory), Options(limit="h1"), on_event=note)
    cluster.host.write_record()
    operations.verify(str(cluster.inventory), on_event=note)
    held, alone, free = (call["excused"] for call in asked)
    assert held == dict.fromkeys(("w1", "w2"), "in maintenance: new disk (by kim)")
    assert alone == dict.fromkeys(("w1", "w2"), "not asked: --limit leaves it out")
    assert set(free.values()) == {""}
