"""`clusterkit image`: what it prints, and with which code it ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.registry_server import Registry, digest
from tests.unit.test_registry_push import layer, saved

ROOT = Path(__file__).resolve().parents[2]
DIGEST = f"sha256:{'5' * 64}"
BASE = f"clusterkit_image_base=rocm/dev-ubuntu-22.04:7.2.3-complete@{DIGEST}"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with the tag that the row rocm72 asks for."""
    folder = tmp_path / "vllm"
    who = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    for words in (("init", "--quiet"), ("commit", "--quiet", "--allow-empty", "--message", "x"), ("tag", "v0.29.0")):
        folder.mkdir(exist_ok=True)
        subprocess.run(["git", "-C", str(folder), *who, *words], check=True)
    return folder


def image(tmp_path: Path, verb: str, *words: str, inventory: str = "mi300x") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clusterkit", "image", verb, "-i", f"inventory/{inventory}", *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_a_plan_says_what_would_be_built_and_what_is_missing(repository: Path, tmp_path: Path) -> None:
    source = f"clusterkit_image_source={repository}"
    done = image(tmp_path, "plan", "-e", source)
    assert done.returncode == 0, done.stderr
    assert 'ENV PYTORCH_ROCM_ARCH="gfx942"' in done.stdout
    assert "why: no image of this recipe was built here before" in done.stdout
    assert "missing: clusterkit_image_base: rocm/dev-ubuntu-22.04:7.2.3-complete has no digest" in done.stderr
    done = image(tmp_path, "plan", "-e", source, "-e", BASE, "--json")
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["missing"], told["built"], told["prebuilt"]) == ([], False, False)
    assert told["image"].startswith("clusterkit/vllm-rocm:")
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert told["made_of"]["commit"] == head.stdout.strip()
    assert told["expected"] == {"ray": "2.60.0", "vllm": "0.29.0", "device": "rocm", "archs": ["gfx942"]}


def test_a_build_without_a_pinned_base_is_refused(repository: Path, tmp_path: Path) -> None:
    done = image(tmp_path, "build", "-e", f"clusterkit_image_source={repository}")
    assert done.returncode == 2
    assert "docker image inspect --format '{{index .RepoDigests 0}}'" in done.stderr


def test_a_repository_that_does_not_answer(tmp_path: Path) -> None:
    words = ("-e", f"clusterkit_image_source={tmp_path}/none", "-e", BASE)
    planned = image(tmp_path, "plan", *words)
    assert planned.returncode == 0
    assert "does not answer" in planned.stderr
    assert image(tmp_path, "build", *words).returncode == 1
    assert image(tmp_path, "plan", *words, "-e", "clusterkit_image_ref=" + "a" * 40).stderr == ""


def test_a_given_image_is_planned_without_a_source(tmp_path: Path) -> None:
    words = ("-e", "clusterkit_image=registry.example/vllm:1", "-e", f"clusterkit_image_source={tmp_path}/none")
    done = image(tmp_path, "plan", *words, "--json")
    told = json.loads(done.stdout)
    assert (told["image"], told["prebuilt"]) == ("registry.example/vllm:1", True)
    assert told["expected"]["vllm"] == "0.29.0"
    assert told["missing"] == []


def test_nothing_is_pushed_without_a_registry_or_before_it_is_built(repository: Path, tmp_path: Path) -> None:
    source = f"clusterkit_image_source={repository}"
    done = image(tmp_path, "push", "-e", source)
    assert (done.returncode, "which registry?" in done.stderr) == (2, True)
    done = image(tmp_path, "push", "-e", source, "-e", BASE, "-e", "clusterkit_image_registry=registry.example:5000")
    assert (done.returncode, "is not built" in done.stderr) == (2, True)


def test_a_pull_through_cache_is_not_pushed_to(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inventory"
    shutil.copytree(ROOT / "inventory" / "mi300x", folder)
    hosts = {"head1": {"registry_proxy_remote_url": "https://registry.example"}}
    (folder / "registry.yml").write_text(json.dumps({"all": {"children": {"registry": {"hosts": hosts}}}}))
    words = ("-i", str(folder), "-e", f"clusterkit_image_source={repository}", "-e", BASE)
    refused = image(tmp_path, "push", *words, "--registry", "192.0.2.10:5000")
    assert (refused.returncode, "192.0.2.10:5000 is a pull-through cache" in refused.stderr) == (2, True)
    # The one behind it may well be pushed to.
    allowed = image(tmp_path, "push", *words, "-e", "clusterkit_image_registry=registry.example")
    assert (allowed.returncode, "is not built" in allowed.stderr) == (2, True)


def test_what_is_built_is_pushed_to_the_clusters_registry_and_again_nothing(repository: Path, tmp_path: Path) -> None:
    """The registry is the constructed one; Debian's is asked in test_images_push.py."""
    server = Registry()
    try:
        folder = tmp_path / "inventory"
        shutil.copytree(ROOT / "inventory" / "mi300x", folder)
        reg = {
            "ansible_host": "127.0.0.1",
            "registry_port": int(server.address.rpartition(":")[2]),
            "registry_tls": False,
        }
        groups = {name: {"hosts": {"reg": reg}} for name in ("registry", "managed_hosts")}
        (folder / "registry.yml").write_text(json.dumps({"all": {"children": groups}}))
        words = ("-i", str(folder), "-e", f"clusterkit_image_source={repository}", "-e", BASE, "--json")
        tag = json.loads(image(tmp_path, "plan", *words).stdout)["image"]
        archive = tmp_path / "cache" / "clusterkit" / "images" / f"{tag.rpartition(':')[2]}.tar"
        archive.parent.mkdir(parents=True, exist_ok=True)
        saved(archive, [layer(1), layer(2)])
        for sent in (2, 0):
            done = image(tmp_path, "push", *words)
            assert done.returncode == 0, done.stderr
            told = json.loads(done.stdout)
            assert (told["layers"], told["sent_layers"]) == (2, sent)
            assert told["image"].rpartition("@")[2] == digest(server.manifests[tag.rpartition(":")[2]])
    finally:
        server.close()


def test_a_builder_with_a_password_is_refused_and_the_password_not_shown(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "inventory"
    shutil.copytree(ROOT / "inventory" / "mi300x", folder)
    builder = {"ansible_host": "192.0.2.9", "ansible_password": "hush-hush"}
    (folder / "builder.yml").write_text(
        json.dumps({"all": {"children": {"image_builder": {"hosts": {"b1": builder}}}}})
    )
    done = image(tmp_path, "plan", "-i", str(folder), "-e", f"clusterkit_image_source={repository}", "-e", BASE)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode != 0
    assert "logs in by key and takes no password" in said
    assert "ansible_ssh_private_key_file" in said
    logs = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert logs
    assert not [path for path in logs if "hush-hush" in path.read_text(errors="replace")]


def test_a_plain_plan_asks_for_no_buildkit(repository: Path, tmp_path: Path) -> None:
    words = ("-e", f"clusterkit_image_source={repository}", "-e", BASE, "--json")
    plain = json.loads(image(tmp_path, "plan", *words, "--plain").stdout)
    assert "--mount" not in plain["dockerfile"]
    assert (plain["buildkit"], plain["builder"]) == (False, None)
    assert plain["image"] == json.loads(image(tmp_path, "plan", *words).stdout)["image"]


def test_an_inventory_that_does_not_validate_is_told_first(tmp_path: Path) -> None:
    done = image(tmp_path, "plan", "-e", "clusterkit_image_base=rocm/vllm:latest")
    assert done.returncode == 2
    assert "clusterkit_image_base" in done.stderr
