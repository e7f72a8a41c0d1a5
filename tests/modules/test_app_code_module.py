"""app_code on a host: the plan as a table, and the module on folders of the test's own."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module, run_module

module = load_module("app_code")

ONE, TWO = b"one", b"two"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def app(data: bytes, folder: str = "/srv/shop") -> dict[str, str]:
    return {"digest": digest(data), "template": "", "folder": folder}


@pytest.fixture
def apps(tmp_path: Path) -> Path:
    return tmp_path / "cache/apps"


def call(apps: Path, *wanted: bytes, incoming: dict[bytes, bytes] | None = None, **options: Any) -> dict[str, Any]:
    """As the action plugin calls it; `incoming` is what arrives for which digest."""
    brought = {}
    for data, arrived in (incoming or {}).items():
        source = apps.parents[1] / f"{digest(data)}.incoming"
        source.write_bytes(arrived)
        brought[digest(data)] = str(source)
    given = {"path": str(apps), "apps": [app(data) for data in wanted], "incoming": brought, **options}
    return run_module(module, **given)


def there(apps: Path) -> set[str]:
    return {path.name for path in apps.iterdir()} if apps.exists() else set()


def zips(*data: bytes) -> set[str]:
    return {f"{digest(item)}.zip" for item in data}


# ------------------------------------------------------------------ plan


def have(*digests: str, **changes: Any) -> dict[str, Any]:
    entry = {"whole": True, "readable": True, "time": 0, **changes}
    return {name: {**entry, "time": number} for number, name in enumerate(digests)}


@pytest.mark.parametrize(
    ("found", "wanted", "keep", "expected"),
    [
        ({}, ["a"], 20, (["a"], [], [])),
        (have("a"), ["a"], 20, ([], [], [])),
        (have("a", whole=False), ["a"], 20, (["a"], [], [])),
        (have("a", readable=False), ["a"], 20, ([], ["a"], [])),
        # The newest of the others stay.
        (have("a", "b", "c"), [], 1, ([], [], ["a", "b"])),
        (have("a", "b", "c"), ["a"], 1, ([], [], ["b"])),
        (have("a", "b", "c"), ["d"], 20, (["d"], [], [])),
    ],
)
def test_plan(found: Any, wanted: list[str], keep: int, expected: Any) -> None:
    assert module.plan(found, wanted, keep) == expected


# ------------------------------------------------------------------ a host


def test_what_is_wanting_is_asked_for_and_then_put_in_place(apps: Path) -> None:
    looked = call(apps, ONE, TWO)
    assert sorted(looked["wanting"]) == sorted([digest(ONE), digest(TWO)])
    assert there(apps) == set()
    put = call(apps, ONE, TWO, incoming={ONE: ONE, TWO: TWO})
    assert (put["changed"], put["wanting"]) == (True, [])
    assert [item["name"] for item in put["changes"]] == sorted(f"{digest(data)[:12]} (shop)" for data in (ONE, TWO))
    assert there(apps) == zips(ONE, TWO)
    assert (apps / f"{digest(ONE)}.zip").read_bytes() == ONE
    # Ray's user reads them through the folders above, which are his.
    modes = [path.stat().st_mode & 0o777 for path in (apps.parent, apps, *apps.iterdir())]
    assert modes == [0o700, 0o755, 0o644, 0o644]
    again = call(apps, ONE, TWO)
    assert (again["changed"], again["changes"], again["wanting"]) == (False, [], [])


def test_check_mode_says_what_would_come(apps: Path) -> None:
    planned = call(apps, ONE, check=True)
    (change,) = planned["changes"]
    assert planned["changed"]
    assert (change["what"], change["wanted"], change["actual"]) == ("app code", "there", "missing")
    assert not apps.parent.exists()


def test_damage_is_seen_and_mended(apps: Path) -> None:
    call(apps, ONE, incoming={ONE: ONE})
    path = apps / f"{digest(ONE)}.zip"
    path.write_bytes(b"odd")
    assert call(apps, ONE)["wanting"] == [digest(ONE)]
    assert call(apps, ONE, incoming={ONE: ONE})["changes"][0]["actual"] == "damaged"
    path.chmod(0o666)
    assert call(apps, ONE)["changed"]
    assert oct(path.stat().st_mode)[-3:] == "644"
    assert not call(apps, ONE)["changed"]


def test_what_did_not_arrive_whole_is_never_in_place(apps: Path) -> None:
    failed = call(apps, ONE, incoming={ONE: b"on"})
    assert failed["failed"]
    assert "did not arrive as it was sent" in failed["msg"]
    assert there(apps) == set()


def test_what_a_killed_run_left_goes(apps: Path) -> None:
    call(apps, ONE, incoming={ONE: ONE})
    (apps / f".{digest(TWO)}.new").write_bytes(b"t")
    call(apps, ONE, TWO, incoming={TWO: TWO})
    assert there(apps) == zips(ONE, TWO)


def test_the_newest_of_the_others_stay(apps: Path) -> None:
    old = [b"old %d" % number for number in range(4)]
    call(apps, *old, incoming={data: data for data in old})
    for number, data in enumerate(old):
        os.utime(apps / f"{digest(data)}.zip", (number, number))
    (apps / "notes.txt").write_text("somebody's")
    gone = call(apps, ONE, incoming={ONE: ONE}, keep=2)
    assert there(apps) == zips(ONE, *old[2:]) | {"notes.txt"}
    assert [item["wanted"] for item in gone["changes"]] == ["there", "gone", "gone"]


def test_what_was_declared_until_now_goes_last(apps: Path) -> None:
    """It may have come before all others, and be what runs when its successor fails."""
    others = [b"other %d" % number for number in range(3)]
    call(apps, ONE, *others, incoming={data: data for data in (ONE, *others)})
    for number, data in enumerate([ONE, *others], 1):
        os.utime(apps / f"{digest(data)}.zip", (number, number))
    assert not call(apps, ONE, check=True)["changed"]
    assert (apps / f"{digest(ONE)}.zip").stat().st_mtime == 1
    assert not call(apps, ONE)["changed"]
    call(apps, TWO, incoming={TWO: TWO}, keep=1)
    assert there(apps) == zips(ONE, TWO)


def test_what_nobody_wants_is_not_read(apps: Path) -> None:
    call(apps, ONE, TWO, incoming={ONE: ONE, TWO: TWO})
    folder = os.open(apps, os.O_RDONLY)
    try:
        found = module.read(folder, [digest(ONE)])
    finally:
        os.close(folder)
    # Only its bytes could tell.
    assert {name: entry["whole"] for name, entry in found.items()} == {digest(ONE): True, digest(TWO): False}
    assert not call(apps, ONE)["changed"]


def test_remove(apps: Path) -> None:
    assert not call(apps, state="absent")["changed"]
    call(apps, ONE, incoming={ONE: ONE})
    assert call(apps, state="absent", check=True)["changed"]
    assert there(apps) == zips(ONE)
    assert call(apps, state="absent")["changed"]
    assert not apps.exists()
    assert apps.parent.exists()


def test_remove_leaves_what_is_somebody_elses(apps: Path) -> None:
    call(apps, ONE, incoming={ONE: ONE})
    (apps / "notes.txt").write_text("somebody's")
    failed = call(apps, state="absent")
    assert "holds more than the code of apps" in failed["msg"]
    assert there(apps) == {"notes.txt"}


# ------------------------------------------------------------------ root in a folder of Ray's user

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders to another user")
RAY = 12345


@root_only
@pytest.mark.parametrize("rays", [True, False], ids=["rays", "roots"])
def test_links_of_rays_user_are_not_followed(apps: Path, tmp_path: Path, rays: bool) -> None:
    """Root would put files into, or take them out of, any folder that Ray's user names. A link that root made in a
    folder of root's own is a site's way to a larger disk, and followed: the other half shows what is kept out."""
    target = tmp_path / "etc"
    target.mkdir()
    apps.parent.mkdir()
    apps.symlink_to(target)
    if rays:
        os.chown(apps.parent, RAY, RAY)
    done = call(apps, ONE, incoming={ONE: ONE})
    if rays:
        assert "is a link of somebody else's" in done["msg"]
        assert there(target) == set()
        (target / f"{digest(ONE)}.zip").write_bytes(ONE)
        assert call(apps, state="absent")["failed"]
        assert there(target) == zips(ONE)
    else:
        assert there(target) == zips(ONE)


@root_only
def test_a_folder_that_rays_user_made_becomes_roots(apps: Path) -> None:
    apps.mkdir(parents=True)
    os.chown(apps, RAY, RAY)
    (apps / f"{digest(ONE)}.zip").write_bytes(ONE)
    os.chown(apps / f"{digest(ONE)}.zip", RAY, RAY)
    told = call(apps, ONE)
    assert told["changed"]
    assert {path.stat().st_uid for path in (apps, *apps.iterdir())} == {0}
    assert not call(apps, ONE)["changed"]


@root_only
def test_folders_above_are_given_to_rays_user(apps: Path) -> None:
    """The launcher refuses a cache that is not its own."""
    call(apps, ONE, incoming={ONE: ONE}, user="nobody")
    assert apps.parent.stat().st_uid == 65534
    assert apps.stat().st_uid == 0
