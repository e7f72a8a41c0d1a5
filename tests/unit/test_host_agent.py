"""The host agent with a launcher and a systemd that only pretend."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    calls.write(word + "\\n")
if word == "start":
    if os.path.exists(folder + "/broken"):
        print(json.dumps({"failed": True, "reason": "no memory", "log": ["a line"]}))
        sys.exit(1)
    text = open(folder + "/instance.env").read()
    open(node, "w").write(text.split("=")[1].strip())
changed = word in ("start", "stop", "drain")
if word == "stop":
    changed = os.path.exists(node)
    if changed:
        os.unlink(node)
answer = {"state": "stopped", "reason": "stopped", "instance_id": None, "changed": changed, "drained": word == "drain"}
if os.path.exists(node):
    answer.update(state="running", reason=None, instance_id=open(node).read(), generation="g1", since="now")
print(json.dumps(answer))
"""

SYSTEMCTL = """#!/bin/sh
echo "$@" >> FOLDER/systemctl
case "$2" in
  start) exec PYTHON FOLDER/launcher --config x start ;;
  stop) rm -f FOLDER/running ;;
  is-active) echo active ;;
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

    def call(self, *words: str) -> tuple[int, dict[str, Any]]:
        done = subprocess.run(
            [PYTHON, str(AGENT), "--config", str(self.config), *words],
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
    assert "--no-ask-password start clusterkit-ray.service" in lines
    assert "--no-ask-password stop clusterkit-ray.service" in lines
    assert "stop" in (tmp_path / "calls").read_text().splitlines(), "systemd knows only its own"


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
