"""The engine's image in a real Docker: which one is taken, loaded, named, and taken away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import docker.errors
import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.docker


def call(code: int = 0, **arguments: Any) -> dict[str, Any]:
    """The module as Ansible starts it."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "plugins/modules/container_image.py")],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": arguments}),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    """Docker, and a name of our own in it; a label of our own too, so that no real image is taken for ours."""
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"there is no Docker Engine: {error}")
    name = f"clusterkit-test-{uuid.uuid4().hex[:8]}"
    (tmp_path / "content").write_text(name)
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        tar.add(tmp_path / "content", "content")
    yield client, name, tmp_path
    for image in client.images.list():
        for tag in image.tags:
            if tag.startswith(name):
                client.images.remove(tag, force=True)


def image(client: Any, tmp_path: Path, tag: str, inputs: str) -> str:
    repository, _, version = tag.partition(":")
    changes = [f"LABEL clusterkit.image=vllm clusterkit.inputs={inputs}"]
    client.api.import_image_from_file(
        str(tmp_path / "root.tar"), repository=repository, tag=version, changes=[*changes, f"ENV WHICH={inputs}"]
    )
    found: str = client.images.get(tag).id
    return found


def test_an_archive_is_loaded_and_named_once(engine: Any) -> None:
    client, name, tmp_path = engine
    made = image(client, tmp_path, f"{name}:one", f"{name}-1")
    with (tmp_path / "image.tar").open("wb") as out:
        out.writelines(client.images.get(f"{name}:one").save(named=True))
    client.images.remove(f"{name}:one")
    assert call(state="info", name=f"{name}:current", inputs=f"{name}-1")["tag"] == ""
    options = {"name": f"{name}:current", "tag": f"{name}:one", "archive": str(tmp_path / "image.tar")}
    planned = call(**options, _ansible_check_mode=True)
    assert planned["changed"]
    assert client.images.list(name=name) == [], "a plan changes nothing"
    first = call(**options)
    assert (first["changed"], first["image"]) == (True, made)
    assert call(**options)["changed"] is False
    info = call(state="info", name=f"{name}:current", inputs=f"{name}-1")
    assert (info["current"], info["tag"]) == (True, f"{name}:one")


def test_the_name_follows_the_wanted_inputs(engine: Any) -> None:
    client, name, tmp_path = engine
    old, new = (image(client, tmp_path, f"{name}:{tag}", f"{name}-{tag}") for tag in ("old", "new"))
    client.images.get(f"{name}:old").tag(name, "current")
    info = call(state="info", name=f"{name}:current", inputs=f"{name}-new")
    assert (info["current"], info["image"], info["tag"]) == (False, old, f"{name}:new")
    assert call(name=f"{name}:current", tag=f"{name}:new")["image"] == new
    assert client.images.get(f"{name}:current").id == new


def test_what_is_not_there_is_told(engine: Any) -> None:
    _, name, tmp_path = engine
    failed = call(1, name=f"{name}:current", tag=f"{name}:missing")
    assert f"{name}:missing is not on this host" in failed["msg"]
    (tmp_path / "broken.tar").write_text("no archive")
    failed = call(1, name=f"{name}:current", tag=f"{name}:missing", archive=str(tmp_path / "broken.tar"))
    assert "could not be loaded" in failed["msg"]


def test_without_docker_a_host_has_no_image(tmp_path: Path) -> None:
    info = call(state="info", name="x:current", inputs="1", docker=str(tmp_path / "docker"))
    assert (info["image"], info["tag"]) == ("", "")
