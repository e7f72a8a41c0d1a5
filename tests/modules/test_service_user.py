"""service_user: the plan as a table, and real users where root runs the tests."""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

users = load_module("service_user")

NAME = "clusterkit-svc"
WANT = {"name": "ray", "home": "/var/lib/kit/home", "shell": "/usr/sbin/nologin"}
OURS = {"home": "/var/lib/kit/home", "shell": "/usr/sbin/nologin", "home_there": True, "uid": 999}


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        (OURS, []),
        (None, [("user", {"home": WANT["home"], "shell": WANT["shell"]}, "missing")]),
        ({**OURS, "shell": "/bin/bash"}, [("user", "/usr/sbin/nologin", "/bin/bash")]),
        ({**OURS, "home_there": False}, [("folder", "the home of ray", "missing")]),
        # Somebody's own user of that name: used as it is.
        ({**OURS, "home": "/home/ray", "shell": "/bin/bash", "home_there": False}, []),
    ],
)
def test_plan(have: Json | None, expected: list[tuple[str, Any, str]]) -> None:
    told = users.plan(have, WANT)
    assert [(item["what"], item["wanted"], item["actual"]) for item in told] == expected


# ------------------------------------------------------------------ real users

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="making a user needs root")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["userdel", NAME], capture_output=True, check=False)
    tmp_path.chmod(0o755)
    yield tmp_path / "state/home"
    subprocess.run(["userdel", NAME], capture_output=True, check=False)


def run(home: Path, **more: Any) -> Json:
    return call(users, name=NAME, home=str(home), **more)


@as_root
def test_a_user_is_made_once_and_goes(home: Path) -> None:
    assert run(home, check=True)["changed"]
    with pytest.raises(KeyError):
        pwd.getpwnam(NAME)
    assert run(home)["changed"]
    entry = pwd.getpwnam(NAME)
    assert (entry.pw_dir, entry.pw_shell, entry.pw_uid < 1000) == (str(home), "/usr/sbin/nologin", True)
    assert (home.owner(), home.stat().st_mode & 0o777, home.parent.owner()) == (NAME, 0o700, "root")
    assert not run(home)["changed"]

    subprocess.run(["usermod", "--shell", "/bin/sh", NAME], check=True)
    home.rmdir()
    assert len(run(home)["changes"]) == 2
    assert pwd.getpwnam(NAME).pw_shell == "/usr/sbin/nologin"
    assert home.is_dir()

    assert run(home, state="absent", check=True)["changed"]
    assert run(home, state="absent")["changed"]
    with pytest.raises(KeyError):
        pwd.getpwnam(NAME)
    assert not home.exists()
    assert not run(home, state="absent")["changed"]


@as_root
def test_a_user_of_the_sites_is_never_touched(home: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    subprocess.run(["useradd", "--create-home", "--home-dir", str(theirs), "--shell", "/bin/sh", NAME], check=True)
    before = pwd.getpwnam(NAME)
    for state in ("present", "absent"):
        done = run(home, state=state)
        assert (done["changed"], done["ours"]) == (False, False)
        assert pwd.getpwnam(NAME) == before
        assert theirs.is_dir()


@as_root
def test_a_user_stays_while_weights_are_his(home: Path, tmp_path: Path) -> None:
    """Else the next user that somebody makes gets his number, and the weights with it."""
    run(home)
    weights = tmp_path / "models/tiny/weights"
    weights.parent.mkdir(parents=True)
    weights.touch()
    os.chown(weights, pwd.getpwnam(NAME).pw_uid, -1)
    run(home, state="absent", keep=str(tmp_path / "models"))
    assert pwd.getpwnam(NAME)
    assert not home.exists()
    weights.unlink()
    run(home, state="absent", keep=str(tmp_path / "models"))
    with pytest.raises(KeyError):
        pwd.getpwnam(NAME)


@as_root
def test_a_user_that_still_runs_something_is_named(home: Path) -> None:
    run(home)
    process = subprocess.Popen(["sleep", "60"], user=NAME, cwd="/")
    try:
        failed = run(home, state="absent")
        assert failed["failed"]
        assert "userdel" in failed["msg"]
        assert str(process.pid) in failed["msg"]
    finally:
        process.kill()
        process.wait()
