"""`make deploy` on this machine: an ordinary user without sudo, an empty home, a minimal PATH.

Where the tests run as root, the user is made for them; else they run as who they are, with an empty home.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, check_openai, site_environment

pytestmark = pytest.mark.engine

USER = "clusterkit-test"


@dataclass
class Person:
    """Somebody with a checkout in an empty home."""

    home: Path
    uid: int
    gid: int
    # An ordinary user in a test run by root.
    switched: bool

    @property
    def kit(self) -> Path:
        return self.home / "kit"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {**site_environment(), "HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        who = {"user": self.uid, "group": self.gid, "extra_groups": []} if self.switched else {}
        return subprocess.run(
            command, cwd=self.kit, env=environment, capture_output=True, text=True, check=False, **who
        )

    def clusterkit(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(".venv/bin/python", "-m", "clusterkit", *words)

    def processes(self) -> list[str]:
        """Command lines of the user's processes that belong to the cluster."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and entry.stat().st_uid == self.uid:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if self.switched or "ray" in line.lower():
                        found.append(f"{entry.name} {line}".strip())
            except OSError:
                continue
        return [line for line in found if str(os.getpid()) not in line.split()[:1]]

    def changed(self) -> int:
        done = self.clusterkit("deploy", "--json")
        assert done.returncode == 0, done.stderr
        return sum(count["changed"] for count in json.loads(done.stdout)["hosts"].values())

    @property
    def agent(self) -> list[str]:
        return [
            str(self.kit / ".venv/bin/python"),
            str(self.home / ".local/share/clusterkit/bin/host-agent"),
            "--config",
            str(self.home / ".config/clusterkit/local/host-agent.json"),
        ]


def _copy_checkout(target: Path) -> None:
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    for name in files.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


@pytest.fixture(scope="module")
def person(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    if os.getuid() != 0:
        home = tmp_path_factory.mktemp("home")
        someone = Person(home, os.getuid(), os.getgid(), switched=False)
        _copy_checkout(someone.kit)
        yield someone
        someone.clusterkit("remove", "--yes")
        return
    subprocess.run(["userdel", "--remove", USER], capture_output=True, check=False)
    # No skeleton: the home is empty.
    subprocess.run(["useradd", "--create-home", "--skel", "/nonexistent", USER], check=True)
    entry = pwd.getpwnam(USER)
    someone = Person(Path(entry.pw_dir), entry.pw_uid, entry.pw_gid, switched=True)
    assert not list(someone.home.iterdir())
    # The number of an earlier user may have come back, and a killed test run cleans nothing up.
    shutil.rmtree(f"/tmp/clusterkit-{entry.pw_uid}", ignore_errors=True)
    _copy_checkout(someone.kit)
    subprocess.run(["chown", "-R", f"{entry.pw_uid}:{entry.pw_gid}", str(someone.kit)], check=True)
    yield someone
    someone.clusterkit("remove", "--yes")
    subprocess.run(["pkill", "-KILL", "-u", USER], check=False)
    subprocess.run(["userdel", "--remove", USER], capture_output=True, check=False)


@pytest.fixture(scope="module")
def deployed(person: Person) -> str:
    """What `make deploy` printed."""
    done = person.run("make", "deploy")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_make_deploy_ends_with_a_real_answer(person: Person, deployed: str) -> None:
    assert "base URL: http://127.0.0.1:8000/v1" in deployed
    assert re.search(r"it answered: '.+'", deployed)
    line = next(line for line in deployed.splitlines() if line.startswith("curl "))
    done = person.run("bash", "-c", f"{line} --silent --show-error --fail")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["usage"]["completion_tokens"] >= 1


def test_the_openai_client_works(deployed: str) -> None:
    check_openai("http://127.0.0.1:8000/v1")


def test_status_tells_base_url_nodes_apps_and_replicas(person: Person, deployed: str) -> None:
    done = person.clusterkit("status", "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["base_url"] == "http://127.0.0.1:8000/v1"
    assert [(node["host"], node["alive"]) for node in status["nodes"]] == [("localhost", True)]
    (app,) = status["apps"]
    assert (app["name"], app["state"]) == ("tiny", "RUNNING")
    assert any(replica["deployment"].startswith("LLMServer") for replica in app["replicas"])


def test_a_second_run_changes_nothing(person: Person, deployed: str) -> None:
    assert person.changed() == 0


@pytest.mark.slow
def test_a_stop_and_start_through_the_agent_changes_nothing(person: Person, deployed: str) -> None:
    stopped = person.run(*person.agent, "stop")
    assert json.loads(stopped.stdout)["changed"] is True, stopped.stderr
    down = person.clusterkit("verify", "--json")
    assert down.returncode == 1
    assert json.loads(down.stdout)["ok"] is False
    started = person.run(*person.agent, "start")
    assert json.loads(started.stdout)["state"] == "running", started.stderr
    # The apps are not kept on disk: without the head's memory the first run applies them again.
    person.clusterkit("deploy")
    assert person.changed() == 0


@pytest.mark.slow
def test_what_was_broken_by_hand_is_repaired(person: Person, deployed: str) -> None:
    """Each role's outcome, broken behind the kit's back: the next run sees and mends it."""
    share = person.home / ".local/share/clusterkit"
    weights = share / "models/tiny-llama/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    agent = share / "bin/host-agent"
    agent.unlink()
    gone = person.run(str(share / "ray-env/bin/python"), "-m", "pip", "uninstall", "--yes", "--quiet", "smart-open")
    assert gone.returncode == 0, gone.stderr
    seen = json.loads(person.clusterkit("plan", "--json").stdout)
    assert {"ray_env", "model_store", "host_agent"} <= {change["role"] for change in seen["changes"]}
    assert person.changed() >= 3
    assert agent.exists()
    back = person.run(str(share / "ray-env/bin/python"), "-c", "import smart_open")
    assert back.returncode == 0, back.stderr
    assert person.changed() == 0


def test_verify_asks_every_replica(person: Person, deployed: str) -> None:
    done = person.clusterkit("verify", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, checks
    assert checks["tiny replicas"]["ok"]
    assert any(name.startswith("tiny stream") for name in checks)


def test_remove_takes_everything_away_strays_included(person: Person, deployed: str) -> None:
    supervisor = next(line for line in person.processes() if "ray-node" in line and "supervise" in line)
    os.kill(int(supervisor.split()[0]), signal.SIGKILL)
    assert any("raylet" in line for line in person.processes()), "the safeguard has something to do"
    done = person.clusterkit("remove", "--yes")
    assert done.returncode == 0, done.stderr
    assert not [line for line in person.processes() if "ray" in line.lower()]
    left = [".local/share/clusterkit", ".config/clusterkit/local", ".local/state/clusterkit/local"]
    assert not [name for name in left if (person.home / name).exists()]
    assert not Path(f"/tmp/clusterkit-{person.uid}").exists()
    again = person.clusterkit("remove", "--yes")
    assert again.returncode == 0, again.stderr
