"""What names an image from wheels, and which docker client builds it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from clusterkit import images
from clusterkit.errors import ToolMissing
from clusterkit.wheels import Target, Wish

PLAN = images.WheelImage("cpu", ("python3",), Wish(requirements=("ray==2.60.0",)), Target("3.11", "2.36", "x86_64"))
PINS = ["ray==2.60.0"]


@pytest.mark.parametrize(
    "change",
    [
        {"packages": ("python3", "libnuma1")},
        {"wish": Wish(requirements=("ray==2.52.1",))},
        {"target": Target("3.12", "2.36", "x86_64")},
    ],
)
def test_a_tag_names_everything_that_is_in_the_image(change: dict[str, object]) -> None:
    other = dataclasses.replace(PLAN, **change)  # type: ignore[arg-type]
    assert other.inputs != PLAN.inputs
    assert other.tag(PINS) != PLAN.tag(PINS)


def test_other_wheels_are_another_image_of_the_same_inputs() -> None:
    assert PLAN.tag(PINS) == PLAN.tag(PINS)
    assert PLAN.tag([*PINS, "click==8.3.0"]) != PLAN.tag(PINS)


def test_a_change_of_the_recipe_is_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = PLAN.inputs
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "Dockerfile.j2").write_text(PLAN.dockerfile() + "RUN true\n")
    monkeypatch.setattr(images, "RECIPES", tmp_path)
    assert PLAN.inputs != before


def client(folder: Path, version: str, buildx: int) -> str:
    """A docker client that answers the two questions that choose it."""
    folder.mkdir()
    path = folder / "docker"
    path.write_text(f'#!/bin/sh\ncase "$1" in version) echo {version} ;; buildx) exit {buildx} ;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_the_client_that_has_buildkit_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = client(tmp_path / "a", "28.2.2", 1)
    with_plugin = client(tmp_path / "b", "28.2.2", 0)
    builtin = client(tmp_path / "c", "20.10.24", 1)
    for order, chosen in (([without, builtin], builtin), ([without, with_plugin, builtin], with_plugin)):
        monkeypatch.setenv("PATH", ":".join(str(Path(path).parent) for path in order))
        images.builder.cache_clear()
        assert images.builder() == chosen
    images.builder.cache_clear()


def test_no_client_with_buildkit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path / "a", "28.2.2", 1)
    monkeypatch.setenv("PATH", str(tmp_path / "a"))
    monkeypatch.setattr(images, "LAST_RESORT", str(tmp_path))
    images.builder.cache_clear()
    with pytest.raises(ToolMissing) as caught:
        images.builder()
    assert "the plugin buildx is missing" in (caught.value.hint or "")
    images.builder.cache_clear()


def test_the_archives_of_a_recipe_that_were_asked_for_last_stay(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for age, (name, recipe) in enumerate([("e", "cpu"), ("d", "cpu"), ("c", "cpu"), ("x", "cuda"), ("b", "cpu")]):
        (folder / f"{name}.json").write_text(json.dumps({"recipe": recipe, "made_of": {}}))
        (folder / f"{name}.log").touch()
        (folder / f"{name}.tar").touch()
        os.utime(folder / f"{name}.tar", (1000 - age, 1000 - age))
    # Its build failed: there is a log, and no archive.
    (folder / "f.log").touch()
    gone = images.forget_archives("cpu", store=tmp_path, keep=2)
    assert [path.name for path in gone] == ["c.tar", "b.tar"]
    assert {path.stem for path in folder.iterdir()} == {"e", "d", "x", "f"}
    assert images.forget_archives("cpu", store=tmp_path, keep=2) == []


def test_an_archive_that_is_used_is_the_newest(tmp_path: Path) -> None:
    source = images.SourceImage(
        recipe="cuda",
        base=f"vendor/cuda@sha256:{'0' * 64}",
        base_recipe="",
        source="https://git.example/vllm.git",
        ref="v0.29.0",
        commit="a" * 40,
        vllm="0.29.0",
        ray=("ray[llm]==2.60.0",),
        archs=("9.0",),
    )
    path = images.archive_of(source.tag, store=tmp_path)
    path.parent.mkdir()
    path.touch()
    os.utime(path, (1000, 1000))
    assert images.archive(source, store=tmp_path) == images.Built(source.tag, path, built=False)
    assert path.stat().st_mtime > 1000
