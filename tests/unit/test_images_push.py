"""`clusterkit image push` with a real image: the command as an operator gives it, into Debian's docker-registry.

The registry is the package's program, run from PATH as this user; on a host it is tests/roles/test_registry_role.py.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import images
from clusterkit.errors import ToolMissing
from tests.support import wait_for_port
from tests.unit.test_images_builder import Sshd, needs_sshd, sshd

__all__ = ["sshd"]

pytestmark = pytest.mark.docker

ROOT = Path(__file__).resolve().parents[2]
NOBODY = "127.0.0.1:1"
PROGRAM = shutil.which("docker-registry")
BASE = f"clusterkit_image_base=rocm/dev-ubuntu-22.04:7.2.3-complete@sha256:{'5' * 64}"


@dataclass
class Site:
    """An inventory whose registry is a process of this machine, and an image that was built for it."""

    folder: Path
    docker: str
    address: str
    tag: str = ""
    groups: dict[str, Any] = field(default_factory=dict)

    def image(self, verb: str, *words: str, ok: bool = True) -> Any:
        """What the command prints as JSON, or on stderr where it has to fail."""
        made = {"all": {"children": self.groups}}
        (self.folder / "site" / "more.yml").write_text(yaml.safe_dump(made))
        command = [sys.executable, "-m", "clusterkit", "image", verb, "-i", str(self.folder / "site"), "--json"]
        command += ["-e", BASE, "-e", "clusterkit_image_ref=" + "a" * 40, *words]
        homes = {"XDG_CACHE_HOME": str(self.folder / "cache"), "XDG_STATE_HOME": str(self.folder / "state")}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **homes}, check=False
        )
        assert (done.returncode == 0) is ok, done.stderr
        return json.loads(done.stdout) if ok else done.stderr

    def ask(self, *words: str) -> str:
        done = subprocess.run([self.docker, *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    @property
    def identity(self) -> str:
        return self.ask("image", "inspect", "--format", "{{.Id}}", self.tag)

    def forget(self, *names: str) -> None:
        self.ask("image", "rm", "--force", self.tag, *names)
        assert self.identity == ""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    if PROGRAM is None:
        pytest.skip("there is no docker-registry on PATH: apt install docker-registry")
    images.builder.cache_clear()
    try:
        docker = images.builder()
    except ToolMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "storage")}},
        "http": {"addr": f"127.0.0.1:{port}", "relativeurls": True},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    with (tmp_path / "registry.log").open("w") as log:
        process = subprocess.Popen([PROGRAM, "serve", str(tmp_path / "config.yml")], stdout=log, stderr=log)
    made = Site(tmp_path, docker, f"127.0.0.1:{port}")
    shutil.copytree(ROOT / "inventory" / "mi300x", tmp_path / "site")
    try:
        wait_for_port(port, process, tmp_path / "registry.log")
        made.tag = made.image("plan")["image"]
        built(made)
        yield made
        made.ask("image", "rm", "--force", *(f"{to}{made.tag}" for to in ("", f"{made.address}/", f"{NOBODY}/")))
    finally:
        process.terminate()
        process.wait()


def built(site: Site) -> None:
    """As `image build` leaves it: in Docker under its tag, and as an archive of `docker save`, with two layers."""
    name = f"clusterkit-test/push-{uuid.uuid4().hex[:8]}"
    (site.folder / "file").write_text(name)
    with tarfile.open(site.folder / "root.tar", "w") as tar:
        tar.add(site.folder / "file", "file")
    site.ask("import", str(site.folder / "root.tar"), f"{name}:base")
    context = site.folder / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(f"FROM {name}:base\nCOPY Dockerfile /said\nLABEL clusterkit.image=vllm\n")
    images.build(site.docker, site.tag, context, log=site.folder / "log", plain=True)
    site.ask("image", "rm", f"{name}:base")
    archive = images.archive_of(site.tag, store=site.folder / "cache" / "clusterkit")
    archive.parent.mkdir(parents=True, exist_ok=True)
    assert site.ask("save", "--output", str(archive), site.tag) == ""
    assert archive.stat().st_size > 1000


def test_to_the_clusters_own_registry_and_back(site: Site) -> None:
    port = int(site.address.rpartition(":")[2])
    about = {"ansible_host": "127.0.0.1", "registry_port": port, "registry_tls": False}
    site.groups = {name: {"hosts": {"reg": about}} for name in ("registry", "managed_hosts")}
    identity = site.identity
    done = site.image("push")
    assert (done["layers"], done["sent_layers"]) == (2, 2)
    assert done["image"].startswith(f"{site.address}/{site.tag.rpartition(':')[0]}@sha256:")
    # What a host pulls is what was built: the image's id is a digest of all that is in it.
    site.forget()
    site.ask("pull", "--quiet", done["image"])
    assert site.ask("image", "inspect", "--format", "{{.Id}}", done["image"]) == identity
    assert site.image("push") == {**done, "sent_layers": 0}
    site.ask("image", "rm", done["image"])


def test_to_a_registry_of_the_sites_own(site: Site) -> None:
    """By `docker push`: dockerd takes one on a loopback address without TLS. From the archive where Docker lost it."""
    identity = site.identity
    site.forget()
    done = site.image("push", "--registry", site.address)
    assert done["image"] == f"{site.address}/{site.tag}"
    assert site.identity == identity
    site.forget(done["image"])
    site.ask("pull", "--quiet", done["image"])
    assert site.ask("image", "inspect", "--format", "{{.Id}}", done["image"]) == identity
    said = site.image("push", "--registry", NOBODY, ok=False)
    assert f"the registry {NOBODY} did not take {site.tag}" in " ".join(said.split())


@needs_sshd
def test_by_way_of_the_builder_host(site: Site, sshd: Sshd) -> None:
    """Its Docker has to reach the registry; this machine's part is the archive and the login."""
    site.groups = {"image_builder": {"hosts": {"b1": sshd.variables()}}}
    site.forget()
    logins = (sshd.folder / "log").read_text().count("Accepted publickey")
    done = site.image("push", "--registry", site.address)
    assert (sshd.folder / "log").read_text().count("Accepted publickey") == logins + 1
    site.forget(done["image"])
    site.ask("pull", "--quiet", done["image"])
    assert (
        site.ask("image", "inspect", "--format", '{{index .Config.Labels "clusterkit.image"}}', done["image"]) == "vllm"
    )
    site.ask("image", "rm", done["image"])
