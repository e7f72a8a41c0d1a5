"""The role registry in one system container: Debian's docker-registry, and Debian's dockerd that pulls from it.

The tests go through one host's life in their order, from bare Debian to removal. The engine's role gives dockerd the
certificate, the controller's code pushes, and the module pulls.
"""

from __future__ import annotations

import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from clusterkit import registry
from tests.roles.lonely_host import Box, running_box
from tests.support import Run, ansible_playbook, certificate
from tests.unit.registry_server import digest
from tests.unit.test_registry_push import config_of, layer, saved

pytestmark = [pytest.mark.docker, pytest.mark.slow]

Json = dict[str, Any]

NAME = "clusterkit-registrytest"
FOLDER = "/etc/clusterkit-registry"
STORAGE = "/var/lib/clusterkit-registry"
NO_PROXY: Json = {"http": None, "https": None, "no_proxy": []}
TAG = "clusterkit/vllm-cpu:one"
LAYERS = [layer(seed, 2_000_000) for seed in (1, 2, 3)]


class Host(Box):
    """The container: plays against it."""

    def __init__(self, container: Any, folder: Path) -> None:
        super().__init__(container, folder)
        container.reload()
        self.ip = container.attrs["NetworkSettings"]["Networks"]["bridge"]["IPAddress"]
        self.address = f"{self.ip}:5000"
        self.known = folder / "known.crt"

    def tasks(self, tasks: list[Json], variables: Json, *options: str, ok: bool = True) -> Run:
        play = {"name": "It", "hosts": "box", "gather_facts": False, "tasks": tasks}
        (self.folder / "play.yml").write_text(yaml.safe_dump([play]))
        (self.folder / "variables.json").write_text(json.dumps(variables))
        words = ["-i", str(self.folder / "hosts"), "-e", f"@{self.folder}/variables.json"]
        run = ansible_playbook(self.folder, *words, str(self.folder / "play.yml"), *options)
        assert (run.code == 0) is ok, run.text
        return run

    def play(self, *options: str, ok: bool = True, tasks: str = "main", **variables: Any) -> Run:
        task = {"name": "Role", "ansible.builtin.import_role": {"name": "registry", "tasks_from": tasks}}
        given: Json = {
            "registry_address": self.ip,
            "registry_port": 5000,
            "registry_tls": True,
            "registry_outgoing_proxy": NO_PROXY,
            "registry_known_certificate": str(self.known),
            **{f"registry_{name}": value for name, value in variables.items()},
        }
        return self.tasks([task], given, *options, ok=ok)

    def engine(self) -> Run:
        """Docker on the host, with the registry's certificate."""
        given: Json = {
            "container_engine_log_rotation": {"max_mib": 100, "keep": 5},
            "container_engine_registry": {**self.own(), "certificate": self.known.read_text()},
            "container_engine_proxy": NO_PROXY,
            "container_engine_allow_disruption": False,
            "container_engine_bin": "/opt/clusterkit/bin",
            "container_engine_config_path": "/etc/clusterkit",
            "container_engine_state_path": "/var/lib/clusterkit",
            # A lab host lacks the capability that this needs.
            "container_engine_daemon": {"default-ulimits": None},
        }
        role = {"name": "container_engine", "tasks_from": "main"}
        return self.tasks([{"name": "Role", "ansible.builtin.import_role": role}], given)

    def own(self) -> Json:
        return {"address": self.address, "tls": True, "certificate": self.known.read_text()}

    def pull(self, pushed: registry.Pushed, *, parts: bool = True, ok: bool = True) -> Run:
        """The module as the action plugin calls it."""
        options = {"name": "clusterkit/vllm:current", "tag": TAG, "pull": pushed.reference, "keep": 1}
        task = {"name": "Pull", "container_image": {**options, "parts": list(pushed.parts) if parts else []}}
        with pytest.MonkeyPatch.context() as patch:
            # Without the plugin of the same name.
            patch.setenv("ANSIBLE_ACTION_PLUGINS", str(self.folder))
            return self.tasks([task], {}, ok=ok)

    def fetched(self) -> set[str]:
        """Digests that were asked for since the last question."""
        self.sh("journalctl --sync")
        log = self.sh("journalctl -q --no-pager -o cat -u docker-registry")
        seen, self.seen = getattr(self, "seen", 0), len(log)
        return set(re.findall(r'"GET /v2/\S+/blobs/(sha256:\w+) HTTP/1.1" 200', log[seen:]))

    def blob(self, content: bytes) -> str:
        name = digest(content).partition(":")[2]
        return f"{STORAGE}/docker/registry/v2/blobs/sha256/{name[:2]}/{name}"

    def images(self) -> set[str]:
        return set(self.sh("docker image ls --all --no-trunc --quiet").split())

    def named(self) -> bool:
        """Whether anything has the name of an engine."""
        said = self.sh(f"docker image inspect clusterkit/vllm:current {TAG} 2>&1", check=False)
        return said.count("No such image") < 2


def answer(address: str, certificate: Path | None) -> str:
    """What /v2/ says to somebody who trusts this certificate."""
    context = ssl.create_default_context(cafile=str(certificate) if certificate else None)
    try:
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(f"https://{address}/v2/", timeout=10) as said:
            return str(said.status)
    except urllib.error.URLError as error:
        return str(error.reason)


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    mount = docker.types.Mount("/var/lib/docker", None, type="volume")
    with running_box(Host, NAME, {"mounts": [mount]}) as made:
        yield made


@pytest.fixture(scope="module")
def archive(host: Host) -> Path:
    return saved(host.folder / "image.tar", LAYERS)


def test_where_there_is_no_such_package_the_way_out_is_named(host: Host) -> None:
    host.sh("echo 'Rocky Linux release 9.6 (Blue Onyx)' >/etc/redhat-release")
    try:
        said = " ".join(host.play(ok=False).text.split())
    finally:
        host.sh("rm /etc/redhat-release")
    assert "has no package of docker-registry" in said
    assert "clusterkit_image_registry" in said


def test_check_mode_on_a_bare_host(host: Host) -> None:
    assert host.play("--check", "--diff").changed > 0
    assert host.sh(f"command -v docker-registry; ls -d {FOLDER}", check=False).startswith("ls:")
    assert not host.known.exists()


def test_from_bare_debian_to_a_registry_behind_tls_and_again(host: Host) -> None:
    assert "PRIVATE KEY" not in host.play("-vvv", "--diff").text
    assert answer(host.address, host.known) == "200"
    assert "CERTIFICATE_VERIFY_FAILED" in answer(host.address, None)
    assert host.sh(f"stat -c '%a %U:%G' {FOLDER}/tls.key").strip() == "640 root:docker-registry"
    assert host.sh("systemctl is-enabled docker-registry").strip() == "enabled"
    running = host.sh("systemctl show docker-registry -p MainPID")
    assert host.play().changed == 0
    assert host.play("--check").changed == 0
    assert host.sh("systemctl show docker-registry -p MainPID") == running


def test_a_run_that_was_cut_before_the_restart_converges(host: Host) -> None:
    running = host.sh("systemctl show docker-registry -p MainPID")
    host.sh(f"touch {FOLDER}/config.yml")
    assert host.play().changed == 1
    assert host.sh("systemctl show docker-registry -p MainPID") != running
    assert host.play().changed == 0


def test_a_certificate_of_the_sites_own(host: Host) -> None:
    files = certificate(host.folder / "site", "site", host.ip)
    given = {"certificate": str(files[0]), "key": str(files[1])}
    run = host.play("-vvv", "--diff", **given)
    assert "PRIVATE KEY" not in run.text
    assert files[1].read_text().splitlines()[1] not in run.text
    assert host.known.read_text() == files[0].read_text()
    assert answer(host.address, files[0]) == "200"
    assert host.play(**given).changed == 0
    assert "one of them is missing" in host.play(certificate=str(files[0]), ok=False).text
    host.sh(f"rm {FOLDER}/tls.*")
    host.play()
    assert answer(host.address, files[0]) != "200"
    assert answer(host.address, host.known) == "200"


def test_what_was_pushed_is_what_is_pulled(host: Host, archive: Path) -> None:
    host.engine()
    pushed = registry.push(archive, TAG, host.own(), part=2_000_000)
    assert (pushed.sent_layers, len(pushed.parts)) == (3, 2)
    assert host.pull(pushed).changed == 1
    (image,) = json.loads(host.sh("docker image inspect clusterkit/vllm:current"))
    assert image["Id"] == digest(config_of(LAYERS))
    assert image["RepoDigests"] == [pushed.reference]
    assert image["RepoTags"] == ["clusterkit/vllm-cpu:one", "clusterkit/vllm:current"]
    assert host.images() == {image["Id"]}, "the parts are gone"
    host.fetched()
    assert host.pull(pushed).changed == 0
    assert registry.push(archive, TAG, host.own(), part=2_000_000).sent == 0
    assert host.fetched() == set()


@pytest.mark.parametrize("parts", [True, False], ids=["in parts", "as a whole"])
def test_a_damaged_layer_is_refused_and_only_it_moves_again(host: Host, archive: Path, parts: bool) -> None:
    """As a whole, which is how Docker does it by itself, all layers move again."""
    pushed = registry.push(archive, TAG, host.own(), part=2_000_000)
    host.sh(f"docker image rm {TAG} clusterkit/vllm:current {pushed.reference} 2>/dev/null", check=False)
    host.sh(f"printf X | dd of={host.blob(LAYERS[2])}/data bs=1 seek=5000 conv=notrunc 2>/dev/null")
    refused = host.pull(pushed, parts=parts, ok=False)
    assert f"a layer is damaged in the registry {host.address}" in refused.text
    assert not host.named()
    assert len(host.images()) == (2 if parts else 0)
    # As it says.
    path = re.search(r"rm -r (docker/registry/v2/blobs/\S+?),", refused.text)
    assert path, refused.text
    host.sh(f"cd {STORAGE} && rm -r {path[1]}")
    assert registry.push(archive, TAG, host.own(), part=2_000_000).sent_layers == 1
    host.fetched()
    assert host.pull(pushed, parts=parts).changed == 1
    moved = host.fetched() & {digest(one) for one in LAYERS}
    assert moved == {digest(one) for one in (LAYERS[2:] if parts else LAYERS)}
    assert len(host.images()) == 1


def test_a_registry_that_is_away_is_named_and_brought_back(host: Host, archive: Path) -> None:
    pushed = registry.push(archive, TAG, host.own())
    host.sh(f"docker image rm {TAG} clusterkit/vllm:current {pushed.reference} 2>/dev/null", check=False)
    host.sh("systemctl stop docker-registry")
    said = host.pull(pushed, ok=False).text
    assert f"the registry {host.address} does not answer this host" in said
    assert host.play().changed == 1
    assert host.pull(pushed).changed == 1


def test_an_exception_without_tls(host: Host) -> None:
    assert host.play(tls=False).changed > 0
    url = f"http://{host.address}/v2/"
    assert urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10).status == 200
    assert host.play(tls=False).changed == 0
    host.play()


def test_removal_leaves_the_images_unless_asked(host: Host) -> None:
    removed = host.play(tasks="remove")
    assert f"These stay: {STORAGE}" in removed.text
    assert "refused" in answer(host.address, host.known)
    assert host.sh(f"command -v docker-registry; ls -d {FOLDER}", check=False).startswith("ls:")
    assert host.sh("systemctl show docker-registry -p LoadState --value").strip() == "not-found"
    assert host.play(tasks="remove").changed == 0
    host.play()
    assert host.sh(f"ls {STORAGE}").strip() == "docker"
    host.play(tasks="remove", remove_data=True)
    assert host.sh(f"ls -d {STORAGE}", check=False).startswith("ls:")


def test_a_registry_of_the_sites_own_is_left_alone(host: Host) -> None:
    host.sh("DEBIAN_FRONTEND=noninteractive apt-get install -y -q docker-registry")
    before = host.sh("systemctl show docker-registry -p MainPID; cat /etc/docker/registry/config.yml")
    said = " ".join(host.play(ok=False).text.split())
    assert "this host had a docker-registry before the kit came" in said
    assert "clusterkit_image_registry" in said
    assert host.sh("systemctl show docker-registry -p MainPID; cat /etc/docker/registry/config.yml") == before
    host.play(tasks="remove")
    assert host.sh("systemctl show docker-registry -p MainPID; cat /etc/docker/registry/config.yml") == before
