"""restricted_login: the plan as a table, and a real user where root runs the tests.

sudo itself, and sshd, are in tests/roles/test_fleet_role.py; here a program in visudo's place says yes or no.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

module = load_module("restricted_login")

NAME = "clusterkit-login"
WANT = {"name": "u", "home": "/h", "paths": {"/h": (0o755, None), "/s": (0o440, "rules\n")}}
GONE = {**WANT, "paths": {}}
OURS = {"home": "/h", "shell": "/bin/sh", "uid": 999}
THERE = {"/h": (0, 0o755, None), "/s": (0, 0o440, "rules\n")}


@pytest.mark.parametrize(
    ("user", "paths", "want", "expected"),
    [
        (OURS, THERE, WANT, []),
        (None, dict.fromkeys(THERE), WANT, ["u", "/h", "/s"]),
        ({**OURS, "shell": "/bin/bash"}, THERE, WANT, ["u"]),
        (OURS, {**THERE, "/h": (999, 0o755, None)}, WANT, ["/h"]),
        (OURS, {**THERE, "/s": (0, 0o644, "rules\n")}, WANT, ["/s"]),
        (OURS, {**THERE, "/s": (0, 0o440, "others\n")}, WANT, ["/s"]),
        (None, dict.fromkeys(THERE), GONE, []),
        (OURS, THERE, GONE, ["/h", "/s", "u"]),
        (None, {**THERE, "/h": None}, GONE, ["/s"]),
        # Somebody's own user of that name.
        ({**OURS, "home": "/home/u"}, dict.fromkeys(THERE), GONE, []),
    ],
)
def test_plan(user: Json | None, paths: Json, want: Json, expected: list[str]) -> None:
    assert [change["name"] for change in module.plan({"user": user, "paths": paths}, want)] == expected


def test_a_user_that_is_somebody_elses_is_refused() -> None:
    with pytest.raises(module.Problem, match="which the kit did not make"):
        module.plan({"user": {**OURS, "home": "/home/u"}, "paths": dict.fromkeys(THERE)}, WANT)


# ------------------------------------------------------------------ a real user

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="making a user needs root")
VISUDO = '#!/bin/sh\n! grep -n wrong "$3"\n'


@dataclass
class Site:
    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def keys(self) -> Path:
        return self.home / ".ssh/authorized_keys"

    @property
    def sudoers(self) -> Path:
        return self.folder / "sudoers"

    def run(self, *, check: bool = False, **more: Any) -> Json:
        given = {"name": NAME, "home": str(self.home), "sudoers": str(self.sudoers)}
        texts = {} if more.get("state") == "absent" else {"authorized_keys": "restrict key\n", "rules": "rules\n"}
        return call(module, check=check, **{**given, **texts, **more})


def remove_user() -> None:
    subprocess.run(["userdel", NAME], capture_output=True, check=False)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    remove_user()
    tmp_path.chmod(0o755)
    program = tmp_path / "bin/visudo"
    program.parent.mkdir()
    program.write_text(VISUDO)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "ssh_host_ed25519_key.pub").write_text("ssh-ed25519 AAAA root@box\n")
    monkeypatch.setattr(module, "HOST_KEYS", f"{tmp_path}/ssh_host_*_key.pub")
    yield Site(tmp_path)
    remove_user()


@as_root
def test_it_is_made_once_corrected_and_goes(site: Site) -> None:
    planned = site.run(check=True)
    assert len(planned["changes"]) == 5
    assert not site.home.exists()
    assert site.run()["host_keys"] == ["ssh-ed25519 AAAA"]
    entry = pwd.getpwnam(NAME)
    assert (entry.pw_dir, entry.pw_shell, entry.pw_uid < 1000) == (str(site.home), "/bin/sh", True)
    # Whoever has become that user cannot let others in.
    for path, mode in ((site.home, 0o755), (site.keys.parent, 0o755), (site.keys, 0o644), (site.sudoers, 0o440)):
        assert (path.owner(), path.stat().st_mode & 0o7777) == ("root", mode)
    assert not site.run()["changed"]

    os.chown(site.keys, entry.pw_uid, -1)
    site.sudoers.write_text("others\n")
    changed = site.run()
    assert [change["name"] for change in changed["changes"]] == [str(site.keys), str(site.sudoers)]
    assert (site.keys.owner(), site.sudoers.read_text()) == ("root", "rules\n")

    assert site.run(state="absent", check=True)["changed"]
    assert site.run(state="absent")["changed"]
    with pytest.raises(KeyError):
        pwd.getpwnam(NAME)
    assert not site.home.exists()
    assert not site.sudoers.exists()
    assert not site.run(state="absent")["changed"]


@as_root
def test_what_the_user_still_runs_ends(site: Site) -> None:
    """As a connection that is kept open; userdel alone would refuse."""
    site.run()
    held = subprocess.Popen(["/bin/sh", "-c", "read line"], stdin=subprocess.PIPE, user=NAME)
    refused = subprocess.run(["userdel", NAME], capture_output=True, text=True, check=False)
    assert "currently used by process" in refused.stderr
    # A dead child counts until somebody has waited for it.
    waits = threading.Thread(target=held.wait)
    waits.start()
    assert site.run(state="absent")["changed"]
    waits.join()
    assert held.returncode == -signal.SIGKILL
    with pytest.raises(KeyError):
        pwd.getpwnam(NAME)


@as_root
def test_rules_that_visudo_refuses_never_land(site: Site) -> None:
    site.run()
    refused = site.run(rules="wrong\n")
    assert "visudo refuses" in refused["msg"]
    assert site.sudoers.read_text() == "rules\n"
    assert sorted(path.name for path in site.folder.iterdir()) == ["bin", "home", "ssh_host_ed25519_key.pub", "sudoers"]


@as_root
def test_a_host_without_sudo_or_without_a_key_of_its_own(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.folder / "ssh_host_ed25519_key.pub").unlink()
    assert site.run(check=True)["host_keys"] == []
    assert "install openssh-server" in site.run()["msg"]
