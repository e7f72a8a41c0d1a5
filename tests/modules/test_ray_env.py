"""ray_env: the plan as a table, and real environments from a folder of tiny wheels, without a network."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

Json = dict[str, Any]

ray_env = load_module("ray_env")

VERSION = "{}.{}".format(*sys.version_info[:2])
PIP = importlib.metadata.distribution("pip")
# pip is pinned as everything else: a host may have none.
PINS = ["app==1.0", "lib==2.0", f"pip=={PIP.version}"]


def wheel(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def offline(patch: pytest.MonkeyPatch) -> None:
    """pip may look at the folders it is given, and nowhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        patch.delenv(name)
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels; among them the pip that runs these tests, as a wheel again."""
    folder = tmp_path_factory.mktemp("shop")
    for name, version in (("app", "1.0"), ("lib", "1.0"), ("lib", "2.0"), ("more", "1.0")):
        wheel(folder, name, version)
    with zipfile.ZipFile(folder / f"pip-{PIP.version}-py3-none-any.whl", "w") as file:
        for item in PIP.files or ():
            if item.parts[0].startswith("pip") and item.suffix != ".pyc":
                file.write(str(item.locate()), str(item))
    return folder


def without_ensurepip(path: Path) -> str:
    """An interpreter as Debian leaves it without python3-venv."""
    answer = json.dumps({"python": VERSION, "glibc": "2.36", "machine": "x86_64", "ensurepip": False})
    path.write_text(
        f"#!/bin/sh\ncase \"$*\" in *'import ensurepip'*) echo '{answer}';; *) exec {sys.executable} \"$@\";; esac\n"
    )
    path.chmod(0o755)
    return str(path)


@dataclass(frozen=True)
class Made:
    path: Path
    arguments: Json
    result: Json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, shop: Path) -> Made:
    """From nothing, on a host without an index and without ensurepip: all there is comes in a wheelhouse."""
    folder = tmp_path_factory.mktemp("host")
    with tarfile.open(folder / "house.tar", "w") as tar:
        for pin in PINS:
            name = f"{pin.replace('==', '-')}-py3-none-any.whl"
            tar.add(shop / name, arcname=name)
    arguments: Json = {
        # Its parent is not there either.
        "path": str(folder / "opt/env"),
        "python": without_ensurepip(folder / "python"),
        "pins": PINS,
        "inputs": "digest",
        "wheelhouse": str(folder / "house.tar"),
    }
    with pytest.MonkeyPatch.context() as patch:
        offline(patch)
        return Made(folder / "opt/env", arguments, call(ray_env, **arguments))


@pytest.fixture
def env(made: Made, tmp_path: Path) -> Path:
    """The same for each test. Linked, not copied: pip replaces files, and writes into none."""
    return Path(shutil.copytree(made.path, tmp_path / "env", symlinks=True, copy_function=os.link))


def present(path: Path, shop: Path, *, pins: list[str] | None = None, **more: Any) -> Json:
    given = {"pins": PINS if pins is None else pins, "inputs": "digest", "find_links": [str(shop)], **more}
    return call(ray_env, path=str(path), python=sys.executable, **given)


def have(path: Path) -> dict[str, str]:
    found: dict[str, str] = ray_env.installed(str(path))
    return {name: version for name, version in found.items() if name not in {"pip", "setuptools"}}


def site_packages(path: Path) -> Path:
    return path / f"lib/python{VERSION}/site-packages"


# ------------------------------------------------------------------ plan


@pytest.mark.parametrize(
    ("installed", "wanted", "missing", "extra"),
    [
        ({}, [], [], []),
        ({}, ["ray==2.60.0"], ["ray==2.60.0"], []),
        ({"ray": "2.60.0"}, ["ray==2.60.0"], [], []),
        ({"ray": "2.59.0"}, ["ray==2.60.0"], ["ray==2.60.0"], []),
        ({"ray": "2.60.0", "numpy": "2.0"}, ["ray==2.60.0"], [], ["numpy"]),
        ({"PyYAML": "6.0.2", "typing_extensions": "4.1"}, ["pyyaml==6.0.2", "typing-extensions==4.1"], [], []),
        ({"zope.interface": "7"}, ["zope_interface==7"], [], []),
        ({"ray": "2.60.0", "pip": "24.0", "setuptools": "70"}, ["ray==2.60.0"], [], []),
        ({"torch": "2.13.0"}, ["torch==2.13.0+cpu"], ["torch==2.13.0+cpu"], []),
        ({"a": "1"}, ["b==1", "a==2"], ["a==2", "b==1"], []),
    ],
)
def test_plan(installed: dict[str, str], wanted: list[str], missing: list[str], extra: list[str]) -> None:
    assert ray_env.plan(installed, wanted) == (missing, extra)


@pytest.mark.parametrize(
    ("missing", "extra", "lock_differs", "fresh", "expected"),
    [
        ([], [], False, "", []),
        (["ray==2.60.0"], [], False, "", [("ray", "2.60.0", "2.59.0", None)]),
        (["torch==2.13.0+cpu"], [], False, "", [("torch", "2.13.0+cpu", "missing", None)]),
        ([], ["more"], False, "", [("more", "gone", "1.0", None)]),
        (["ray==2.60.0", "torch==2"], [], False, "missing", [("/opt/env", "2 distributions", "missing", None)]),
        ([], [], True, "", [("/opt/env", "a lock with these pins", "another lock", ["node"])]),
    ],
)
def test_what_a_plan_shows(
    missing: list[str], extra: list[str], lock_differs: bool, fresh: str, expected: list[tuple[Any, ...]]
) -> None:
    """Other pins make a node that runs from the environment stale; a repair to the same pins does not."""
    told = ray_env.described("/opt/env", {"Ray": "2.59.0", "more": "1.0"}, missing, extra, lock_differs, fresh)
    assert [(item["name"], item["wanted"], item["actual"], item.get("disrupts")) for item in told] == expected


def test_the_pin_of_a_wheel_file() -> None:
    assert ray_env.wheel_pin("/srv/typing_extensions-4.1-py3-none-any.whl") == "typing-extensions==4.1"
    assert ray_env.wheel_pin("vllm-0.32.0+cpu-py3-none-any.whl") == "vllm==0.32.0+cpu"


# ------------------------------------------------------------------ real environments


def test_a_wheelhouse_is_enough(made: Made) -> None:
    """No index, no links, no ensurepip; the second run changes nothing."""
    assert (made.result["changed"], made.result["missing"], made.result["python"]) == (True, PINS, VERSION)
    assert have(made.path) == {"app": "1.0", "lib": "2.0"}
    lock = json.loads((made.path / "clusterkit.lock.json").read_text())
    assert (lock["pins"], lock["inputs"], lock["digest"]) == (PINS, "digest", made.result["digest"])
    # What was unpacked is gone.
    assert list(made.path.parent.iterdir()) == [made.path]
    second = call(ray_env, **made.arguments)
    assert (second["changed"], second["missing"], second["extra"]) == (False, [], [])
    assert second["digest"] == made.result["digest"]


def test_what_is_taken_out_by_hand_comes_back(env: Path, shop: Path) -> None:
    """The lock still lists it: what counts is what is installed."""
    for path in site_packages(env).glob("lib*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = present(env, shop)
    assert (again["changed"], again["missing"]) == (True, ["lib==2.0"])
    assert have(env) == {"app": "1.0", "lib": "2.0"}
    assert not present(env, shop)["changed"]


def test_another_version_is_replaced(env: Path, shop: Path) -> None:
    assert present(env, shop, pins=[*PINS[:1], "lib==1.0", *PINS[2:]])["missing"] == ["lib==1.0"]
    assert have(env) == {"app": "1.0", "lib": "1.0"}


def test_what_is_too_many_goes(env: Path, shop: Path) -> None:
    command = [str(env / "bin/python"), "-m", "pip", "install", "--quiet", "--find-links", str(shop), "more"]
    subprocess.run(command, check=True)
    again = present(env, shop)
    assert (again["changed"], again["extra"]) == (True, ["more"])
    assert have(env) == {"app": "1.0", "lib": "2.0"}


def test_check_mode_tells_and_leaves(env: Path, shop: Path, tmp_path: Path) -> None:
    told = present(env, shop, pins=[PINS[0], PINS[2]], check=True)
    assert (told["changed"], told["extra"]) == (True, ["lib"])
    assert [(item["name"], item["actual"]) for item in told["changes"]] == [("lib", "2.0"), (str(env), "another lock")]
    assert have(env) == {"app": "1.0", "lib": "2.0"}
    new = present(tmp_path / "new", shop, check=True)
    # Nothing runs from what is not there.
    assert [(item["actual"], item.get("disrupts")) for item in new["changes"]] == [("missing", None)]
    assert not (tmp_path / "new").exists()
    assert present(env, shop, check=True)["changes"] == []
    assert not (tmp_path / "new").exists()
    assert call(ray_env, path=str(env), state="absent", check=True)["changed"]
    assert env.exists()


def test_a_lock_that_was_lost_is_written_again(env: Path, shop: Path) -> None:
    """Workers are told stale by it."""
    (env / "clusterkit.lock.json").unlink()
    (env / "clusterkit.lock.json").write_text("{")
    assert present(env, shop)["changed"]
    assert not present(env, shop)["changed"]


def test_a_broken_environment_is_made_anew(env: Path, shop: Path) -> None:
    (env / "bin/python").unlink()
    again = present(env, shop)
    assert (again["changed"], again["missing"]) == (True, PINS)
    assert have(env) == {"app": "1.0", "lib": "2.0"}


def test_extra_wheels_are_installed_by_their_file(env: Path, shop: Path, tmp_path: Path) -> None:
    own = wheel(tmp_path / "own", "vllm", "0.32.0+cpu")
    again = present(env, shop, extra_wheels=[str(own)])
    assert again["missing"] == ["vllm==0.32.0+cpu"]
    assert have(env)["vllm"] == "0.32.0+cpu"
    assert not present(env, shop, extra_wheels=[str(own)])["changed"]


def test_what_is_not_to_be_had_fails_in_words(env: Path, shop: Path) -> None:
    failed = present(env, shop, pins=[*PINS, "absent==1.0"])
    assert failed["failed"]
    assert "pip install failed" in failed["msg"]
    assert "absent==1.0" in failed["msg"]


def test_an_environment_goes_and_stays_away(env: Path) -> None:
    assert call(ray_env, path=str(env), state="absent")["changed"]
    assert not env.exists()
    assert not call(ray_env, path=str(env), state="absent")["changed"]


def test_info_changes_nothing(env: Path, tmp_path: Path) -> None:
    info = call(ray_env, path=str(env), python=sys.executable, state="info")
    assert (info["changed"], info["python"], info["missing"], info["lock"]["pins"]) == (False, VERSION, [], PINS)
    assert float(info["glibc"]) > 2
    nothing = call(ray_env, path=str(tmp_path / "new"), python=sys.executable, state="info")
    assert (nothing["changed"], nothing["lock"], nothing["missing"]) == (False, {}, [])


def test_no_interpreter(tmp_path: Path) -> None:
    failed = call(ray_env, path=str(tmp_path / "env"), python="python9.9", state="info")
    assert failed["failed"]
    assert "python9.9" in failed["msg"]
    assert "ray_env_python" in failed["msg"]


def test_without_ensurepip_and_without_a_wheel_of_pip(shop: Path, tmp_path: Path) -> None:
    python = without_ensurepip(tmp_path / "python")
    failed = call(ray_env, path=str(tmp_path / "env"), python=python, pins=PINS, find_links=[str(shop)])
    assert failed["failed"]
    assert "apt-get install python3-venv" in failed["msg"]
    assert not (tmp_path / "env").exists()
