"""host_folders: real folders with owner and mode, and what a removal leaves alone."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

folders = load_module("host_folders")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="another owner and a mount need root")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def make(*wanted: Json, check: bool = False) -> Json:
    return call(folders, folders=list(wanted), check=check)


def remove(*paths: Path, keep: list[Path] | None = None, check: bool = False) -> Json:
    kept = [str(path) for path in keep or []]
    return call(folders, state="absent", paths=[str(path) for path in paths], keep=kept, check=check)


# ------------------------------------------------------------------ plan

WANTED = {"path": "/srv/kit", "owner": "ray", "group": "ray", "mode": "0750"}


@pytest.mark.parametrize(
    ("have", "wanted", "actual"),
    [
        (None, {"owner": "ray", "group": "ray", "mode": "0750"}, "missing"),
        ({"owner": "ray", "group": "ray", "mode": "0777"}, {"mode": "0750"}, {"mode": "0777"}),
        (
            {"owner": "root", "group": "root", "mode": "0750"},
            {"owner": "ray", "group": "ray"},
            {"owner": "root", "group": "root"},
        ),
    ],
)
def test_plan(have: Json | None, wanted: Json, actual: Any) -> None:
    told = folders.plan({"/srv/kit": have}, [WANTED])
    assert told == [{"what": "folder", "name": "/srv/kit", "wanted": wanted, "actual": actual}]


def test_nothing_differs() -> None:
    assert folders.plan({"/srv/kit": {"owner": "ray", "group": "ray", "mode": "0750"}}, [WANTED]) == []
    # What is not asked for does not matter.
    some = {**WANTED, "owner": None, "group": None, "mode": None}
    assert folders.plan({"/srv/kit": {"owner": "x", "group": "y", "mode": "0000"}}, [some]) == []


# ------------------------------------------------------------------ present


def test_folders_are_made_with_their_parents_and_once(tmp_path: Path) -> None:
    previous = os.umask(0o077)
    try:
        wanted = [
            {"path": str(tmp_path / "a/b/c"), "mode": "0700"},
            {"path": str(tmp_path / "a/d"), "mode": "1755"},
        ]
        done = make(*wanted)
    finally:
        os.umask(previous)
    assert done["changed"]
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/b/c", "a/d")] == [0o755, 0o755, 0o700, 0o1755]
    assert not make(*wanted)["changed"]


def test_a_mode_changed_by_hand_comes_back_and_contents_stay(tmp_path: Path) -> None:
    (tmp_path / "kit/inner").mkdir(parents=True)
    (tmp_path / "kit/inner").chmod(0o711)
    (tmp_path / "kit").chmod(0o777)
    done = make({"path": str(tmp_path / "kit"), "mode": "0750"})
    assert done["changes"][0]["actual"] == {"mode": "0777"}
    assert (mode(tmp_path / "kit"), mode(tmp_path / "kit/inner")) == (0o750, 0o711)


def test_check_mode_makes_nothing_also_for_a_user_that_is_still_to_come(tmp_path: Path) -> None:
    told = make({"path": str(tmp_path / "kit"), "owner": "not-yet-there", "mode": "0750"}, check=True)
    wanted = {"owner": "not-yet-there", "group": "not-yet-there", "mode": "0750"}
    assert (told["changed"], told["changes"][0]["wanted"], told["changes"][0]["actual"]) == (True, wanted, "missing")
    assert "not-yet-there" in told["diff"]["after"]
    assert not (tmp_path / "kit").exists()
    failed = make({"path": str(tmp_path / "kit"), "owner": "not-yet-there", "mode": "0750"})
    assert "there is no user 'not-yet-there'" in failed["msg"]


@as_root
def test_an_owner_brings_his_own_group(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    assert make({"path": str(kit), "owner": "nobody", "mode": "0700"})["changed"]
    assert (kit.owner(), kit.group()) == ("nobody", "nogroup")
    assert not make({"path": str(kit), "owner": "nobody", "mode": "0700"})["changed"]


@pytest.mark.parametrize(
    ("prepare", "given", "words"),
    [
        (lambda path: path.touch(), {}, "is no folder"),
        (lambda path: path.symlink_to("/nonexistent"), {}, "link to nothing"),
        (lambda path: None, {"mode": "rwx"}, "no octal number"),
        (lambda path: None, {"path": "relative"}, "no absolute path"),
    ],
)
def test_what_cannot_be_says_so_and_touches_nothing(tmp_path: Path, prepare: Any, given: Json, words: str) -> None:
    prepare(tmp_path / "kit")
    failed = make({"path": str(tmp_path / "first")}, {"path": str(tmp_path / "kit"), **given})
    assert failed["failed"]
    assert words in failed["msg"]
    assert not (tmp_path / "first").exists()


@as_root
def test_a_link_to_a_larger_disk_is_followed_but_not_one_of_an_ordinary_user(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "kit").symlink_to(tmp_path / "disk")
    assert make({"path": str(tmp_path / "kit"), "mode": "0755"})["changed"]
    assert mode(tmp_path / "disk") == 0o755
    os.lchown(tmp_path / "kit", 65534, 65534)
    failed = make({"path": str(tmp_path / "kit"), "mode": "0777"})
    assert "a link that belongs to uid 65534" in failed["msg"]
    assert mode(tmp_path / "disk") == 0o755


# ------------------------------------------------------------------ absent


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def test_a_tree_goes_and_a_second_removal_changes_nothing(tmp_path: Path) -> None:
    kit = tree(tmp_path / "kit", "bin/ray-node", "a/b/c")
    (kit / "link").symlink_to(tmp_path)
    told = remove(kit, check=True)
    assert (told["changed"], kit.exists()) == (True, True)
    assert remove(kit)["changes"] == [{"what": "folder", "name": str(kit), "wanted": "gone", "actual": "there"}]
    assert list(tmp_path.iterdir()) == []
    assert not remove(kit)["changed"]


def test_what_is_kept_stays_with_its_parents(tmp_path: Path) -> None:
    state = tree(tmp_path / "state", "node/token", "models/tiny/weights", "packages.json", "host.json")
    keep = [state / "models", state / "packages.json", state / "never-there"]
    done = remove(state, keep=keep)
    assert done["kept"] == [str(state / "models"), str(state / "packages.json")]
    assert {path.name for path in state.rglob("*") if path.is_file()} == {"weights", "packages.json"}
    again = remove(state, keep=keep)
    assert (again["changed"], again["kept"]) == (False, done["kept"])


def test_an_empty_folder_that_was_to_be_kept_goes(tmp_path: Path) -> None:
    (tmp_path / "state/models").mkdir(parents=True)
    done = remove(tmp_path / "state", tmp_path / "state/models", keep=[tmp_path / "state/models"])
    assert (done["changed"], done["kept"], (tmp_path / "state").exists()) == (True, [], False)


def test_a_kept_folder_outside_of_the_others(tmp_path: Path) -> None:
    models = tree(tmp_path / "data", "site/weights")
    done = remove(models, keep=[models])
    assert (done["changed"], done["kept"]) == (False, [str(models)])
    assert (models / "site/weights").exists()


@pytest.mark.parametrize("path", ["/", "/opt", "/var/lib", "/etc", "/home/somebody", "/var/lib/../lib"])
def test_a_folder_of_the_system_is_refused(path: str) -> None:
    """In check mode: if the safeguard failed, nothing would be lost."""
    refused = remove(Path(path), check=True)
    assert refused["failed"]
    assert "folder of the system" in refused["msg"]


def test_a_link_of_the_sites_stays_and_what_is_behind_it_goes(tmp_path: Path) -> None:
    disk = tree(tmp_path / "disk", "bin/ray-node", "models/weights")
    (tmp_path / "kit").symlink_to(disk)
    done = remove(tmp_path / "kit", keep=[tmp_path / "kit/models"])
    assert done["kept"] == [str(tmp_path / "kit"), str(tmp_path / "kit/models")]
    assert [path.name for path in disk.rglob("*")] == ["models", "weights"]
    assert (tmp_path / "kit").is_symlink()


@as_root
def test_what_somebody_mounted_below_is_not_looked_into(tmp_path: Path) -> None:
    mounted = tree(tmp_path / "kit", "bin/ray-node", "share/under") / "share"
    made = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(mounted)], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {made.stderr.strip()}")
    try:
        (mounted / "theirs").write_text("x")
        done = remove(tmp_path / "kit")
        assert done["kept"] == [str(mounted)]
        assert (mounted / "theirs").exists()
        assert not (tmp_path / "kit/bin").exists()
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
