"""Files of a role in one task: what is written, what is shown, and what never is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def call(files: list[dict[str, Any]], *, check: bool = False, code: int = 0) -> tuple[dict[str, Any], str]:
    """The module as Ansible starts it; its answer, and everything that it printed."""
    arguments = {"files": files, "_ansible_check_mode": check, "_ansible_diff": True}
    done = subprocess.run(
        [sys.executable, str(ROOT / "plugins/modules/host_files.py")],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout), done.stdout + done.stderr


def test_files_are_written_once(tmp_path: Path) -> None:
    files = [
        {"path": str(tmp_path / "a"), "content": "one\n", "mode": "0755"},
        {"path": str(tmp_path / "b"), "secret_content": "hush-7\n", "mode": "0600"},
    ]
    planned, _ = call(files, check=True)
    assert (planned["changed"], list(tmp_path.iterdir())) == (True, [])
    answer, said = call(files)
    assert answer["written"] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert (tmp_path / "b").read_text() == "hush-7\n"
    assert [oct((tmp_path / name).stat().st_mode)[-3:] for name in "ab"] == ["755", "600"]
    assert "hush-7" not in said
    assert call(files)[0]["changed"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"], "no temporary file is left"


@pytest.mark.parametrize("change", ["content", "mode"])
def test_what_was_changed_by_hand_is_put_right_and_told(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a"
    files = [{"path": str(path), "content": "one\n"}]
    call(files)
    path.chmod(0o600) if change == "mode" else path.write_text("two\n")
    answer, _ = call(files)
    assert change in answer["diff"][0]["after_header"]
    assert (path.read_text(), oct(path.stat().st_mode)[-3:]) == ("one\n", "644")


def test_a_changed_secret_is_in_no_diff(tmp_path: Path) -> None:
    path = tmp_path / "b"
    path.write_text("old-secret\n")
    answer, said = call([{"path": str(path), "secret_content": "new-secret\n", "mode": "0600"}])
    assert answer["changed"]
    assert "old-secret" not in said
    assert "new-secret" not in said


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("not mine\n")
    (tmp_path / "a").symlink_to(other)
    call([{"path": str(tmp_path / "a"), "content": "one\n"}])
    assert other.read_text() == "not mine\n"
    assert not (tmp_path / "a").is_symlink()


def test_a_missing_folder_and_a_missing_user_are_named(tmp_path: Path) -> None:
    failed, _ = call([{"path": str(tmp_path / "no" / "a"), "content": "x"}], code=1)
    assert f"cannot write {tmp_path}/no/a: No such file or directory" in failed["msg"]
    owned = [{"path": str(tmp_path / "a"), "content": "x", "owner": "there-is-none"}]
    failed, _ = call(owned, code=1)
    assert "there-is-none, and this host has none of that name" in failed["msg"]
    assert call(owned, check=True)[0]["changed"], "a plan goes on: the user is yet to be made"


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_owner_is_held(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files = [{"path": str(path), "content": "x", "owner": "nobody"}]
    call(files)
    assert path.owner() == "nobody"
    os.chown(path, 0, 0)
    assert call(files)[0]["changed"]
    assert path.owner() == "nobody"
