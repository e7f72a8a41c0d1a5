"""container_engine for real: Debian's dockerd in system containers, reached by SSH.

The tests go through one host's life in their order, from bare Debian to removal.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterkit import lab
from tests.support import Run, ansible_playbook, docker_client

pytestmark = [pytest.mark.docker, pytest.mark.slow]

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
NAME = "enginetest"
CONFIG = "/etc/docker/daemon.json"
DROP_IN = "/etc/systemd/system/docker.service.d/clusterkit.conf"
RECORD = "/var/lib/clusterkit/container-engine.json"
# No newline at the end, and nobody's usual indentation: it must come back like this.
SITE = '{\n    "labels": ["rack=7"],\n  "log-opts": {"tag": "{{.Name}}", "max-size": "7m"}\n}'
# A lab host lacks the capability that Docker needs to give a container more locked memory than it has itself.
DAEMON: Json = {"default-ulimits": None}
VARIABLES: Json = {
    "container_engine_log_rotation": {"max_mib": 100, "keep": 5},
    "container_engine_registry": {},
    "container_engine_proxy": {"http": None, "https": None, "no_proxy": []},
    "container_engine_allow_disruption": False,
    "container_engine_bin": "/opt/clusterkit/bin",
    "container_engine_config_path": "/etc/clusterkit",
    "container_engine_state_path": "/var/lib/clusterkit",
    "container_engine_daemon": DAEMON,
}
# Stands for the host agent: writes down what it is asked for, and stops the node as the launcher does.
AGENT = """
import subprocess, sys
word = " ".join(sys.argv[3:])
with open("/root/asked", "a") as log:
    log.write(word + "\\n")
if word == "stop":
    subprocess.run(["docker", "rm", "-f", "clusterkit-ray"], check=True, stdout=subprocess.DEVNULL)
print('{"changed": true}')
"""


# A repository laid out and signed like Docker's, with its packages' names and nothing in them.
REPOSITORY = """
set -e
apt-get update -q
apt-get install -y -q --no-install-recommends gpg gpg-agent apt-utils
cd /root && mkdir -p r/linux/debian/pool r/linux/debian/dists/bookworm/stable/binary-$(dpkg --print-architecture)
cd r/linux/debian
for name in docker-ce docker-ce-cli containerd.io docker-buildx-plugin; do
    mkdir -p /root/$name/DEBIAN
    printf 'Package: %s\\nVersion: 1\\nArchitecture: all\\nMaintainer: nobody\\nDescription: empty\\n' $name \\
        >/root/$name/DEBIAN/control
    dpkg-deb -b /root/$name pool
done
apt-ftparchive packages pool >dists/bookworm/stable/binary-$(dpkg --print-architecture)/Packages
apt-ftparchive -o APT::FTPArchive::Release::Suite=bookworm -o APT::FTPArchive::Release::Components=stable \\
    -o APT::FTPArchive::Release::Architectures=$(dpkg --print-architecture) release dists/bookworm >Release
gpg -q --batch --passphrase '' --quick-gen-key nobody@example.com
gpg -q --clearsign -o dists/bookworm/InRelease Release
gpg --armor --export >gpg
systemd-run -q --unit repository --working-directory /root/r /usr/bin/python3 -m http.server 8099
until python3 -c 'import socket; socket.create_connection(("127.0.0.1", 8099))'; do sleep 0.1; done
"""


class Host:
    """One lab host: plays against it, and a shell on it."""

    def __init__(self, container: Any, name: str, inventory: Path, folder: Path) -> None:
        self.container, self.name, self.inventory, self.folder = container, name, inventory, folder

    def sh(self, script: str, *, check: bool = True) -> str:
        code, output = self.container.exec_run(["/bin/sh", "-c", script])
        text = output.decode(errors="replace")
        assert code == 0 or not check, f"{script}: {text}"
        return str(text)

    def read(self, path: str) -> str:
        return self.sh(f"cat {path}")

    def write(self, path: str, text: str) -> None:
        self.sh(f"mkdir -p {os.path.dirname(path)}; cat >{path} <<'END'\n{text}\nEND\ntruncate -s -1 {path}")

    def config(self) -> Json:
        found: Json = json.loads(self.read(CONFIG))
        return found

    def info(self) -> Json:
        found: Json = json.loads(self.sh("docker info --format '{{json .}}'"))
        return found

    def dockerd(self) -> str:
        """Which dockerd runs: another one after a restart."""
        return self.sh("systemctl show docker -p MainPID -p ExecMainStartTimestampMonotonic")

    def container_started(self, name: str) -> str:
        return self.sh(f"docker inspect -f '{{{{.State.Running}}}} {{{{.State.StartedAt}}}}' {name}")

    def play(self, *options: str, ok: bool = True, tasks: str = "main", **variables: Any) -> Run:
        (self.folder / "play.yml").write_text(
            yaml.safe_dump(
                [
                    {
                        "name": "The engine",
                        "hosts": self.name,
                        "gather_facts": False,
                        "become": True,
                        "tasks": [
                            {
                                "name": "Role",
                                "ansible.builtin.import_role": {"name": "container_engine", "tasks_from": tasks},
                            }
                        ],
                    }
                ]
            )
        )
        given = {f"container_engine_{name}": value for name, value in variables.items()}
        (self.folder / "variables.json").write_text(json.dumps({**VARIABLES, **given}))
        words = ["-i", str(self.inventory), "-e", f"@{self.folder}/variables.json", str(self.folder / "play.yml")]
        run = ansible_playbook(self.folder, *words, *options)
        assert (run.code == 0) is ok, run.text
        return run

    def make_image(self) -> None:
        """The smallest image in which something can run."""
        self.sh("apt-get install -y -q busybox-static")
        self.sh(
            "mkdir -p /root/image/bin && cp /bin/busybox /root/image/bin/ && ln -sf busybox /root/image/bin/sleep"
            " && tar -C /root/image -c . | docker import - tiny"
        )

    def start(self, name: str) -> None:
        self.sh(f"docker run -d --network host --name {name} tiny /bin/sleep 1d")


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, Host]]:
    client = docker_client()
    # Short, for ssh's control sockets.
    folder = Path(tempfile.mkdtemp(prefix="ck-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(folder))
        inventory = folder / "inventory"
        try:
            made = lab.up(1, name=NAME, inventory_dir=inventory)
            yield {
                host.name: Host(client.containers.get(host.container_id), host.name, inventory, folder)
                for host in made.hosts
            }
        finally:
            lab.down(NAME, inventory)
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def host(hosts: dict[str, Host]) -> Host:
    return hosts["worker1"]


def test_check_mode_on_a_bare_host(host: Host) -> None:
    host.write(CONFIG, SITE)
    shown = host.play("--check", "--diff")
    assert shown.changed > 0
    assert "-docker.io is not installed" in shown.text
    assert '+  "live-restore": true' in shown.text
    assert host.read(CONFIG) == SITE
    assert host.sh("command -v dockerd; ls -d /var/lib/clusterkit", check=False).startswith("ls:")


def test_from_bare_debian_to_a_merged_engine_and_again(host: Host) -> None:
    assert host.play().changed > 0
    info = host.info()
    assert info["LiveRestoreEnabled"] is True
    assert info["Labels"] == ["rack=7"]
    config = host.config()
    assert config["log-opts"] == {"tag": "{{.Name}}", "max-size": "100m", "max-file": "5"}
    assert config["features"] == {"buildkit": True}
    assert host.sh("systemctl is-enabled docker").strip() == "enabled"
    assert host.sh(f"stat -c %a {RECORD}").strip() == "600"
    running = host.dockerd()
    again = host.play()
    assert again.changed == 0, again.text
    assert host.dockerd() == running
    assert host.play("--check").changed == 0
    host.make_image()


def test_a_dropped_key_waits_for_consent_while_rays_container_runs(host: Host) -> None:
    host.play(daemon={**DAEMON, "max-concurrent-downloads": 2})
    assert host.config()["max-concurrent-downloads"] == 2
    host.start("clusterkit-ray")
    running = host.dockerd()
    for changed in (1, 0):
        left = host.play()
        assert left.changed == changed, left.text
        assert "dockerd has not been restarted for /etc/docker/daemon.json" in left.text
        assert "clusterkit_allow_disruption=true" in left.text
    assert "max-concurrent-downloads" not in host.config()
    assert host.config()["labels"] == ["rack=7"]
    assert host.dockerd() == running

    # Nothing but that container has held it back.
    host.sh("docker rm -f clusterkit-ray")
    assert host.play().changed == 1
    assert host.dockerd() != running
    assert host.play().changed == 0


def test_with_consent_the_node_is_stopped_first_and_other_containers_live_on(host: Host) -> None:
    host.write("/opt/clusterkit/bin/host-agent", AGENT)
    host.start("clusterkit-ray")
    host.start("site")
    running, site = host.dockerd(), host.container_started("site")
    wanted = {**DAEMON, "shutdown-timeout": 20}

    # What the running dockerd refuses to read costs no replica.
    before = host.read(CONFIG)
    refused = host.play(ok=False, daemon={**wanted, "no-such-key": 1}, allow_disruption=True)
    assert "following directives don't match any configuration option: no-such-key" in refused.text
    assert host.read(CONFIG) == before
    assert host.dockerd() == running
    assert host.sh("ls /root/asked", check=False).startswith("ls:")
    assert host.container_started("clusterkit-ray").startswith("true")

    assert host.play(daemon=wanted, allow_disruption=True).changed > 0
    assert host.read("/root/asked").splitlines() == ["drain --deadline", "stop"]
    assert host.config()["shutdown-timeout"] == 20
    assert host.dockerd() != running
    assert host.container_started("site") == site
    assert host.play(daemon=wanted, allow_disruption=True).changed == 0
    host.sh("rm /opt/clusterkit/bin/host-agent")


def test_a_file_that_dockerd_does_not_start_with_is_taken_back(host: Host) -> None:
    host.play()
    before = host.read(CONFIG)
    # dockerd finds this one only when it starts.
    bad = {**DAEMON, "log-opts": {"no-such-option": "1"}}
    refused = host.play(ok=False, daemon=bad)
    assert "unknown log opt 'no-such-option' for json-file log driver" in refused.text
    assert "The old one is back, and dockerd runs again" in refused.text
    assert host.read(CONFIG) == before
    assert host.info()["LiveRestoreEnabled"] is True
    assert host.play().changed == 0, "nothing is left of it"

    # Without the kit, that file is the end of dockerd.
    host.write(CONFIG, before.replace('"max-file"', '"no-such-option": "1",\n    "max-file"'))
    assert "failed" in host.sh("systemctl restart docker", check=False)
    host.write(CONFIG, before)
    host.sh("systemctl reset-failed docker docker.socket; systemctl start docker")


def test_a_key_that_is_also_a_flag_is_found_before_anything_is_touched(host: Host) -> None:
    before, running = host.read(CONFIG), host.dockerd()
    refused = host.play(ok=False, daemon={**DAEMON, "hosts": ["unix:///run/other.sock"]})
    assert "also given on its command line: hosts (-H)" in refused.text
    assert (host.read(CONFIG), host.dockerd()) == (before, running)


def test_a_broken_file_of_the_sites_is_named(host: Host) -> None:
    before, running = host.read(CONFIG), host.dockerd()
    host.write(CONFIG, before.replace('"live-restore"', '"live-restore'))
    broken = host.read(CONFIG)
    refused = host.play(ok=False)
    line = broken[: broken.index("live-restore")].count("\n") + 1
    assert f"{CONFIG}, line {line}: no valid JSON" in refused.text
    assert (host.read(CONFIG), host.dockerd()) == (broken, running)
    host.write(CONFIG, before)
    host.play()


def test_proxies_and_authorities_are_in_force(host: Host, tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("-----BEGIN CERTIFICATE-----\nnot read by this test\n-----END CERTIFICATE-----\n")
    proxy = {"http": "http://me:hunter%40two@198.18.0.1:3128", "https": None, "no_proxy": ["10.0.0.0/8"]}
    given: Json = {"proxy": proxy, "registry_ca": {"registry.site:5000": str(pem)}}
    done = host.play("-vvv", "--diff", **given)
    pid = host.sh("systemctl show docker -p MainPID --value").strip()
    environment = host.sh(f"tr '\\0' '\\n' </proc/{pid}/environ")
    assert "HTTP_PROXY=http://me:hunter%40two@198.18.0.1:3128\n" in environment
    assert "NO_PROXY=10.0.0.0/8\n" in environment
    assert host.read("/etc/docker/certs.d/registry.site:5000/ca.crt") == pem.read_text()
    assert host.play(**given).changed == 0
    # The password: not on the screen, not in the journal, not for other users.
    assert "hunter" not in done.text
    assert "hunter" not in host.sh("journalctl --no-pager")
    assert host.sh(f"stat -c %a {DROP_IN}").strip() == "600"

    gone = host.play("--diff")
    assert "hunter" not in gone.text
    assert host.sh(f"ls {DROP_IN} /etc/docker/certs.d", check=False).count("No such file") == 2
    pid = host.sh("systemctl show docker -p MainPID --value").strip()
    assert "PROXY" not in host.sh(f"tr '\\0' '\\n' </proc/{pid}/environ")
    assert host.play().changed == 0


def test_a_dockerd_older_than_the_authorities_is_restarted(host: Host) -> None:
    running = host.dockerd()
    host.sh("update-ca-certificates --fresh && touch /etc/ssl/certs/ca-certificates.crt")
    assert host.play().changed == 1
    assert host.dockerd() != running
    assert host.play().changed == 0


def test_a_stopped_dockerd_runs_again(host: Host) -> None:
    host.sh("systemctl disable --now docker.service docker.socket")
    assert host.play().changed == 1
    assert host.info()["ServerVersion"]
    assert host.sh("systemctl is-enabled docker").strip() == "enabled"
    assert host.play().changed == 0


def test_a_dockerd_that_does_not_answer_is_a_failure(host: Host) -> None:
    running = host.dockerd()
    host.sh("kill -STOP $(systemctl show docker -p MainPID --value)")
    mute = host.play(ok=False)
    assert "dockerd runs and does not answer" in mute.text
    assert host.dockerd() == running
    host.sh("kill -CONT $(systemctl show docker -p MainPID --value)")
    assert host.play().changed == 0


def test_the_other_sources_packages_are_a_finding(host: Host) -> None:
    before, running = host.read(CONFIG), host.dockerd()
    refused = host.play(ok=False, source="docker")
    assert "container_engine_source: distribution" in refused.text
    assert "apt-get remove containerd docker.io runc" in refused.text
    assert (host.read(CONFIG), host.dockerd()) == (before, running)


def test_a_version_that_the_repository_does_not_have_is_refused(host: Host) -> None:
    running = host.dockerd()
    assert "docker.io=0.1" in host.play(ok=False, version="0.1").text
    assert host.dockerd() == running


def test_removal_gives_back_the_sites_file_to_the_letter(host: Host) -> None:
    site = host.container_started("site")
    running = host.dockerd()
    left = host.play(tasks="remove")
    assert "containers run (site)" in left.text
    assert host.dockerd() == running
    assert host.container_started("site") == site
    assert host.read(CONFIG) == SITE
    assert host.sh(f"ls {RECORD} {os.path.dirname(DROP_IN)}", check=False).count("No such file") == 2
    assert host.sh("command -v dockerd"), "packages stay"
    assert host.play(tasks="remove").changed == 0

    # Nothing but a running container has held the restart back.
    host.play()
    host.sh("docker rm -f site")
    running = host.dockerd()
    host.play(tasks="remove")
    assert host.dockerd() != running
    assert host.info()["LiveRestoreEnabled"] is False
    assert host.info()["Labels"] == ["rack=7"]


def test_containers_of_a_host_without_live_restore_outlive_the_first_run(host: Host) -> None:
    host.start("site")
    site, running = host.container_started("site"), host.dockerd()
    assert host.play().changed > 0
    assert host.dockerd() != running
    assert host.container_started("site") == site

    # A plain restart ends them.
    host.sh("docker rm -f site")
    host.play(tasks="remove")
    host.start("site")
    host.sh("systemctl restart docker")
    assert host.container_started("site").startswith("false")


def test_removal_with_packages_leaves_no_engine_and_no_data(hosts: dict[str, Host]) -> None:
    host = hosts["head"]
    listed = "dpkg-query -W -f '${Package} ${db:Status-Status}\\n' | sort"
    before = set(host.sh(listed).splitlines())
    host.play()
    host.make_image()
    host.start("site")
    refused = host.play(ok=False, tasks="remove", remove_packages=True)
    assert "containers still run on this host: site" in refused.text
    assert host.config()["live-restore"] is True

    host.sh("docker rm -f site; apt-get purge -y -q busybox-static")
    host.play(tasks="remove", remove_packages=True)
    added = {line.split()[0] for line in set(host.sh(listed).splitlines()) - before}
    # Others may have come to need these.
    assert added <= {"apparmor", "iptables"} | {name for name in added if name.startswith("lib")}
    assert host.sh("ls -A /var/lib/docker").strip() == "", "a mounted folder stays, empty"
    assert host.sh("ls -d /etc/docker /var/lib/containerd", check=False).count("No such file") == 2
    assert host.play(tasks="remove", remove_packages=True).changed == 0


def test_dockers_packages_come_from_the_named_repository_by_its_key(hosts: dict[str, Host]) -> None:
    """The real repository is not at hand: this one's packages are empty, so the run ends where dockerd is needed."""
    host = hosts["head"]
    host.sh(REPOSITORY)
    given: Json = {"source": "docker", "repository_url": "http://127.0.0.1:8099/linux"}
    ended = host.play(ok=False, **given)
    assert "there is no docker.service on this host" in ended.text
    versions = host.sh("dpkg-query -W -f '${Package}=${Version}\\n' docker-ce docker-ce-cli containerd.io")
    assert versions.split() == ["containerd.io=1", "docker-ce=1", "docker-ce-cli=1"]
    source = host.read("/etc/apt/sources.list.d/clusterkit-docker.sources")
    assert "URIs: http://127.0.0.1:8099/linux/debian\nSuites: bookworm\nComponents: stable\n" in source
    host.play(tasks="remove", remove_packages=True)
    assert "clusterkit" not in host.sh("ls /etc/apt/sources.list.d /etc/apt/keyrings")
    assert host.sh("dpkg-query -W docker-ce", check=False).startswith("dpkg-query: no packages found")

    # The same repository, and another key: nothing comes from there.
    host.sh("gpg -q --batch --passphrase '' --quick-gen-key other@example.com")
    host.sh("gpg --armor --export other@example.com >/root/r/linux/debian/gpg")
    refused = host.play(ok=False, **given)
    assert "update apt cache" in refused.text
    assert host.sh("dpkg-query -W docker-ce", check=False).startswith("dpkg-query: no packages found")
