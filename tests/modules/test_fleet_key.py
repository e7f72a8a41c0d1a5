"""fleet_key: a real ssh-keygen makes it; what keeps one, and what is put right."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

pytestmark = pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="makes keys: needs ssh-keygen")

Json = dict[str, Any]

module = load_module("fleet_key")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "etc/fleet/id_ed25519"


def run(path: Path, **more: Any) -> Json:
    return call(module, path=str(path), **more)


def test_it_is_made_once_and_kept(path: Path) -> None:
    planned = run(path, check=True)
    assert (planned["changed"], planned["public"], path.parent.exists()) == (True, "", False)
    made = run(path)
    assert [change["actual"] for change in made["changes"]] == ["missing", "missing"]
    kind, _, body = made["public"].partition(" ")
    assert (kind, len(body) > 60, " " in body) == ("ssh-ed25519", True, False)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["id_ed25519"]
    private = path.read_text()
    assert private.splitlines()[1] not in str(made)
    again = run(path)
    assert (again["changed"], again["public"]) == (False, made["public"])
    assert path.read_text() == private


def test_the_public_half_is_the_keys(path: Path) -> None:
    public = run(path)["public"]
    (path.parent / "signers").write_text(f"fleet {public}\n")
    (path.parent / "text").write_text("it\n")
    words = ["ssh-keygen", "-Y", "sign", "-q", "-f", str(path), "-n", "x", str(path.parent / "text")]
    subprocess.run(words, check=True, capture_output=True)
    words = ["ssh-keygen", "-Y", "verify", "-q", "-f", str(path.parent / "signers"), "-I", "fleet", "-n", "x"]
    signature = str(path.parent / "text.sig")
    subprocess.run([*words, "-s", signature], check=True, input=b"it\n")


def test_where_none_may_be_made_none_is(path: Path) -> None:
    found = run(path, make=False)
    assert (found["changed"], found["public"], path.parent.exists()) == (False, "", False)
    public = run(path)["public"]
    assert run(path, make=False)["public"] == public


def test_a_key_that_others_may_read_is_closed(path: Path) -> None:
    public = run(path)["public"]
    path.chmod(0o644)
    path.parent.chmod(0o755)
    assert run(path, check=True)["changed"]
    assert path.stat().st_mode & 0o777 == 0o644
    assert run(path, make=False)["public"] == public
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_what_is_no_key_is_told(path: Path) -> None:
    run(path)
    path.write_text("half a k")
    said = run(path)
    assert said["failed"]
    assert "ssh-keygen failed" in said["msg"]


def test_a_link_is_not_followed(path: Path) -> None:
    path.parent.mkdir(parents=True)
    (path.parent / "other").write_text("x")
    path.symlink_to("other")
    assert "is a link" in run(path)["msg"]
    assert (path.parent / "other").stat().st_mode & 0o777 != 0o600


def test_without_ssh_keygen(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "OpenSSH client" in run(path)["msg"]
