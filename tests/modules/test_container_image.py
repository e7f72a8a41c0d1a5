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

from tests.modules.conftest import load_module

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


# ------------------------------------------------------------------ older images


def test_older_images_go_but_none_that_is_needed(engine: Any) -> None:
    client, name, tmp_path = engine
    made = {tag: image(client, tmp_path, f"{name}:{tag}", f"{name}-{tag}") for tag in ("a", "b", "c", "d", "e", "f")}
    client.images.get(f"{name}:f").tag(name, "current")
    # One that a container has, though it never ran; one with a name of the site's own as well.
    client.api.create_container(f"{name}:a", command=["/content"], name=name)
    client.images.get(f"{name}:b").tag(f"{name}site", "mine")
    options = {"name": f"{name}:current", "keep": 1}
    try:
        info = call(state="info", inputs=f"{name}-f", **options)
        assert (info["current"], info["prunable"]) == (True, [f"{name}:d", f"{name}:c"])
        planned = call(tag=f"{name}:f", **options, _ansible_check_mode=True)
        assert [change["name"] for change in planned["changes"]] == [f"{name}:d", f"{name}:c"]
        assert client.images.get(f"{name}:c").id == made["c"], "a plan changes nothing"
        done = call(tag=f"{name}:f", **options)
        assert (done["changed"], done["removed"]) == (True, [f"{name}:d", f"{name}:c"])
        left = {tag for tag, identity in made.items() if client.images.list(filters={"reference": f"{name}:{tag}"})}
        assert left == {"a", "b", "e", "f"}
        assert call(tag=f"{name}:f", **options)["changed"] is False
        assert call(state="info", inputs=f"{name}-f", **options)["prunable"] == []
        # Before the wanted one is there, none is to go; nor without a number.
        assert call(state="info", inputs=f"{name}-g", name=f"{name}:current", keep=0)["prunable"] == []
        assert call(state="info", inputs=f"{name}-f", name=f"{name}:current")["prunable"] == []
    finally:
        client.api.remove_container(name)
    assert call(state="info", inputs=f"{name}-f", name=f"{name}:current", keep=0)["prunable"] == [
        f"{name}:e",
        f"{name}:a",
    ]


def test_the_one_before_stays_when_the_name_moves_on(engine: Any) -> None:
    client, name, tmp_path = engine
    for tag in ("a", "b", "c"):
        image(client, tmp_path, f"{name}:{tag}", f"{name}-{tag}")
    client.images.get(f"{name}:b").tag(name, "current")
    done = call(name=f"{name}:current", tag=f"{name}:c", keep=1)
    assert done["removed"] == [f"{name}:a"]
    assert {tag for found in client.images.list(name=name) for tag in found.tags} == {
        f"{name}:b",
        f"{name}:c",
        f"{name}:current",
    }


module = load_module("container_image")
SOURCE = "192.0.2.9:5000/clusterkit/vllm-cpu@sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("tags", "digests", "kits"),
    [
        (["clusterkit/vllm-cpu:1"], [], True),
        (["clusterkit/vllm-cpu:1", "clusterkit/vllm:current"], ["192.0.2.9:5000/clusterkit/vllm-cpu@sha256:0"], True),
        ([], ["192.0.2.9:5000/clusterkit/vllm-cpu@sha256:0"], True),
        (["registry.example/clusterkit/vllm-rocm:1"], [], True),
        (["clusterkit/vllm-cpu:1", "site/vllm:1"], [], False),
        (["registry.example/vllm:1"], [], False),
        (["clusterkit/vllmish:1"], [], False),
        ([], [], False),
    ],
)
def test_whose_image_it_is(tags: list[str], digests: list[str], kits: bool) -> None:
    assert module.ours({"RepoTags": tags, "RepoDigests": digests}, "clusterkit/vllm:current") is kits


@pytest.mark.parametrize(
    ("said", "words"),
    [
        # Recorded from dockerd 20.10.24: a layer that was changed in the registry's storage.
        (
            "filesystem layer verification failed for digest sha256:" + "ad" * 32,
            "the registry 192.0.2.9:5000, and nothing of it is used. On its host, take it away below registry_storage: "
            "rm -r docker/registry/v2/blobs/sha256/ad/" + "ad" * 32,
        ),
        # The others are constructed from the sources of dockerd and containerd.
        ("failed to register layer: write /x: no space left on device", "container_engine_data_root"),
        ('Get "https://192.0.2.9:5000/v2/": dial tcp 192.0.2.9:5000: connect: connection refused', "does not answer"),
        ('Get "https://192.0.2.9:5000/v2/": x509: certificate signed by unknown authority', "does not trust"),
        ("http: server gave HTTP response to HTTPS client", "registry_tls: false"),
        (f"manifest for {SOURCE} not found: manifest unknown", "clusterkit image push"),
        ("unexpected EOF", "Run again: what was finished does not move again"),
    ],
)
def test_what_docker_says_is_explained(said: str, words: str) -> None:
    told = module.explained(said, module.PULLING, SOURCE)
    assert told.startswith(said)
    assert words in told
    if "space" not in said:
        assert "the registry 192.0.2.9:5000" in told


def test_words_that_nobody_knows_stay_as_they_are() -> None:
    assert module.explained("something else\n", module.PULLING, SOURCE) == "something else"
