"""What names an image from wheels, and which docker client builds it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from clusterkit import image_plan, images
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
    monkeypatch.setattr(image_plan, "RECIPES", tmp_path)
    assert PLAN.inputs != before


def test_how_it_is_built_names_no_other_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(image_plan.RECIPES, tmp_path / "vllm")
    before, recipe = PLAN.inputs, tmp_path / "vllm" / "cpu" / "Dockerfile.j2"
    recipe.write_text(recipe.read_text().replace("COPY wheels /wheels", "COPY wheels /wheels\n# without BuildKit"))
    monkeypatch.setattr(image_plan, "RECIPES", tmp_path / "vllm")
    assert "# without BuildKit" in PLAN.dockerfile(plain=True)
    assert PLAN.inputs == before


def client(folder: Path, version: str, buildx: int) -> str:
    """A docker client that answers the two questions that choose it."""
    folder.mkdir()
    path = folder / "docker"
    path.write_text(f'#!/bin/sh\ncase "$1" in version) echo {version} ;; buildx) exit {buildx} ;; esac\n')
    path.chmod(0o755)
    return str(path)


def test_the_client_that_has_buildkit_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = client(tmp_path / "a", "28.2.2 1.41", 1)
    with_plugin = client(tmp_path / "b", "28.2.2 1.41", 0)
    builtin = client(tmp_path / "c", "20.10.24 1.41", 1)
    monkeypatch.setattr(images, "LAST_RESORT", str(tmp_path))
    for order, chosen in (
        ([without, builtin], builtin),
        ([without, with_plugin, builtin], with_plugin),
        # Without it, there is still Docker's own builder.
        ([without], without),
    ):
        monkeypatch.setenv("PATH", ":".join(str(Path(path).parent) for path in order))
        images.builder.cache_clear()
        assert images.builder() == chosen
    images.builder.cache_clear()


@pytest.mark.parametrize(
    ("answer", "buildx", "known"),
    [("28.2.2 1.50", 0, True), ("28.2.2 1.50", 1, False), ("20.10.24 1.41", 1, True), ("20.10.24 1.38", 1, False)],
)
def test_client_and_daemon_both_have_to_know_buildkit(answer: str, buildx: int, known: bool, tmp_path: Path) -> None:
    assert images.knows_buildkit(client(tmp_path / "a", answer, buildx)) is known


def test_no_daemon_behind_any_client_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "LAST_RESORT", str(tmp_path))
    for folder, words in (("a", "Cannot connect"), ("none", "there is no docker client on this machine")):
        if folder == "a":
            Path(client(tmp_path / "a", "", 1)).write_text(
                "#!/bin/sh\necho Cannot connect to the Docker daemon >&2\nexit 1\n"
            )
        monkeypatch.setenv("PATH", str(tmp_path / folder))
        images.builder.cache_clear()
        with pytest.raises(ToolMissing) as caught:
            images.builder()
        assert words in (caught.value.hint or "")
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
