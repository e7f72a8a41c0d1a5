"""The builder host: how Ansible reaches it, the tunnel to its Docker through a real sshd, and what fails."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from typing import Any

import pytest
import yaml

from clusterkit import images, tunnel
from clusterkit.errors import ClusterkitError, ToolMissing
from clusterkit.spec.load import load
from clusterkit.spec.raw import RawInventory, RawValue
from clusterkit.tunnel import Way
from tests.support import ansible_playbook, wait_for_port
from tests.unit.test_images import PLAN, client
from tests.unit.test_spec import inventory

ROOT = Path(__file__).resolve().parents[2]
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")

needs_sshd = pytest.mark.skipif(SSHD is None, reason="there is no sshd here")


def key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().strip()


@dataclass
class Sshd:
    """A daemon on this machine that lets one key in."""

    folder: Path
    port: int

    def variables(self) -> dict[str, Any]:
        """What an inventory says of it."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": str(self.folder / "key"),
            "ansible_ssh_common_args": f"-F none -o UserKnownHostsFile={self.folder}/known_hosts",
        }

    def way(self, there: str, *more: str) -> Way:
        words = self.variables()
        ssh = [*more, "-p", str(self.port), "-i", words["ansible_ssh_private_key_file"], "-o", "IdentitiesOnly=yes"]
        return Way("b1", "127.0.0.1", ("ssh", *ssh, *words["ansible_ssh_common_args"].split()), there)


def running(folder: Path, *lines: str) -> Iterator[Sshd]:
    assert SSHD is not None
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host_key = key(folder / "host")
    (folder / "authorized_keys").write_text(key(folder / "key") + "\n")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nStrictModes no\nUsePAM no\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\nPermitRootLogin yes\n"
        + "".join(f"{line}\n" for line in lines)
    )
    process = subprocess.Popen([SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "log")])
    try:
        wait_for_port(port, process, folder / "log")
        yield Sshd(folder, port)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    yield from running(tmp_path)


class Ping(BaseHTTPRequestHandler):
    """As much of Docker's API as says that it is there."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/_ping" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "a socket"

    def log_message(self, format: str, *args: Any) -> None:
        return None


@pytest.fixture
def docker_socket() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="ck-")
    server = ThreadingUnixStreamServer(f"{folder}/docker.sock", Ping)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"{folder}/docker.sock"
    server.shutdown()
    server.server_close()
    shutil.rmtree(folder)


def failure(action: Callable[[], object]) -> str:
    with pytest.raises(ClusterkitError) as caught:
        action()
    return f"{caught.value.message} | {caught.value.hint}"


def through(way: Way) -> str:
    with tunnel.opened(way) as local:
        return str(local)


def children() -> list[str]:
    """Tunnels of this process."""
    words = ["pgrep", "-P", str(os.getpid()), "-f", tunnel.MARK]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.split()


# --------------------------------------------------------------------------- the tunnel


@needs_sshd
def test_a_tunnel_is_there_as_long_as_it_is_needed_and_for_nobody_else(sshd: Sshd, docker_socket: str) -> None:
    with tunnel.opened(sshd.way(docker_socket)) as local:
        assert local is not None
        assert stat.S_IMODE(os.stat(os.path.dirname(local)).st_mode) == 0o700
        assert len(children()) == 1
        tunnel._answers(Way("b1"), local)
    assert not os.path.exists(os.path.dirname(local))
    assert children() == []


@needs_sshd
def test_it_ends_with_an_error_too(sshd: Sshd, docker_socket: str) -> None:
    seen = []

    def work() -> None:
        with tunnel.opened(sshd.way(docker_socket)) as local:
            seen.append(str(local))
            raise ClusterkitError("the build failed", hint="mend it")

    assert failure(work) == "the build failed | mend it"
    assert not os.path.exists(os.path.dirname(seen[0]))
    assert children() == []


@needs_sshd
def test_it_ends_when_the_kit_is_killed(sshd: Sshd, docker_socket: str) -> None:
    way = sshd.way(docker_socket)
    script = f"from clusterkit.tunnel import *\nwith opened({way!r}):\n    print('open', flush=True)\n    input()"
    kit = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        # Its folder is all that is left.
        env={**os.environ, "TMPDIR": os.path.dirname(docker_socket)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert kit.stdout is not None
    assert kit.stdout.readline() == "open\n"
    (ssh,) = subprocess.run(["pgrep", "-P", str(kit.pid)], capture_output=True, text=True, check=True).stdout.split()
    kit.send_signal(signal.SIGKILL)
    kit.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{ssh}/cmdline").exists() and Path(f"/proc/{ssh}/cmdline").read_bytes():
        assert time.monotonic() < end, "ssh was left behind"
    for pipe in (kit.stdin, kit.stdout):
        assert pipe is not None
        pipe.close()


@needs_sshd
def test_a_tunnel_that_breaks_is_told_with_the_way_on(sshd: Sshd, docker_socket: str) -> None:
    def work() -> None:
        with tunnel.opened(sshd.way(docker_socket)):
            (ssh,) = children()
            os.kill(int(ssh), signal.SIGKILL)
            os.waitid(os.P_PID, int(ssh), os.WEXITED | os.WNOWAIT)
            raise ClusterkitError("the image was not built", hint="the whole log: x")

    said = failure(work)
    assert said.startswith("the connection to b1 broke")
    assert "the image was not built" in said
    assert "finished layers are kept there" in said


@needs_sshd
def test_the_sites_own_ssh_options_hold_and_ours_win(sshd: Sshd, docker_socket: str) -> None:
    """Ansible's usual ones would share, and leave behind, a connection of their own."""
    shared = sshd.folder / "control"
    more = ("-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", f"ControlPath={shared}")
    through(sshd.way(docker_socket, *more))
    assert not shared.exists()
    more = ("-o", "BatchMode=no", "-o", "ExitOnForwardFailure=no")
    command = sshd.way(docker_socket, *more).command("/tmp/x")
    asked = subprocess.run([command[0], "-G", *command[1:]], capture_output=True, text=True, check=True).stdout
    assert {"batchmode yes", "exitonforwardfailure yes", f"port {sshd.port}"} <= set(asked.splitlines())


@needs_sshd
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda way: replace(way, socket="/nonexistent/docker.sock"), "there is no Docker on b1"),
        (lambda way: replace(way, ssh=(*way.ssh, "-o", "HostKeyAlias=other")), "its host key is not known here"),
        (lambda way: replace(way, ssh=(*way.ssh[:1], "-p", "1", *way.ssh[3:])), "ssh does not get to the builder b1: "),
        (lambda way: replace(way, ssh=("ssh-of-nobody",)), "ssh-of-nobody is missing"),
    ],
    ids=["no docker", "host key", "port", "no ssh"],
)
def test_what_goes_wrong_on_the_way_is_told(
    sshd: Sshd, docker_socket: str, change: Callable[[Way], Way], words: str
) -> None:
    assert words in failure(lambda: through(change(sshd.way(docker_socket))))
    assert children() == []


@needs_sshd
def test_a_key_that_is_not_let_in(sshd: Sshd, docker_socket: str) -> None:
    (sshd.folder / "authorized_keys").write_text(key(sshd.folder / "other") + "\n")
    said = failure(lambda: through(sshd.way(docker_socket)))
    assert "it needs a login by key" in said
    assert "ansible_ssh_private_key_file" in said


@needs_sshd
def test_an_sshd_that_forwards_nothing(tmp_path: Path, docker_socket: str) -> None:
    for sshd in running(tmp_path, "AllowStreamLocalForwarding no"):
        said = failure(lambda sshd=sshd: through(sshd.way(docker_socket)))  # type: ignore[misc]
        assert "Docker on b1 does not answer" in said
        assert "AllowStreamLocalForwarding" in said


@needs_sshd
def test_a_daemon_that_is_down_and_a_socket_of_something_else(sshd: Sshd, docker_socket: str) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        path = f"{os.path.dirname(docker_socket)}/left.sock"
        left.bind(path)
    assert "is dockerd up there" in failure(lambda: through(sshd.way(path)))


def test_a_user_who_may_not_open_the_socket_is_told_how() -> None:
    """Root may open every socket, so that there is none for this test to be shut out of."""
    error = tunnel.state_problem(Way("b1", "192.0.2.9", ("ssh",)), "denied")
    assert "may not open Docker's socket /var/run/docker.sock" in error.message
    assert "usermod --append --groups docker" in (error.hint or "")
    assert "ansible_become" in (error.hint or "")


def test_this_machine_needs_no_tunnel() -> None:
    for here in (None, Way.of({}), Way.of({"host": "b1"})):
        with tunnel.opened(here) as local:
            assert local is None
    assert Way.of({"host": "b1", "address": "192.0.2.9", "ssh": ["ssh", "-v"]}) == Way("b1", "192.0.2.9", ("ssh", "-v"))


@needs_sshd
def test_whatever_asks_docker_inside_is_asked_there_and_not_after(
    sshd: Sshd, docker_socket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{Path(client(tmp_path / 'bin', '20.10.24 1.41', 1)).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    images.builder.cache_clear()
    with images.docker_at(sshd.way(docker_socket)):
        assert re.fullmatch(r"unix://.+/docker\.sock", os.environ["DOCKER_HOST"])
        assert "DOCKER_CONTEXT" not in os.environ
    assert "DOCKER_HOST" not in os.environ
    assert os.environ["DOCKER_CONTEXT"] == "elsewhere"
    images.builder.cache_clear()


# --------------------------------------------------------------------------- how Ansible reaches it

HOSTS: dict[str, dict[str, Any]] = {
    "keyed": {
        "ansible_host": "192.0.2.9",
        "ansible_port": 2222,
        "ansible_user": "ops",
        "ansible_ssh_private_key_file": "~/keys/one two",
        "ansible_ssh_common_args": "-o ProxyJump='gate one'",
        "ansible_ssh_extra_args": "-4",
        "ansible_become": True,
    },
    "here": {"ansible_connection": "local"},
    "secret": {"ansible_host": "192.0.2.9", "ansible_password": "hush-hush"},
    "odd": {"ansible_connection": "ansible.builtin.paramiko_ssh"},
}


@pytest.fixture(scope="module")
def reached(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """(what each host's task returned, all that was said)"""
    folder = tmp_path_factory.mktemp("reached")
    (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {**HOSTS, "worker": {}}}}))
    read = {"container_image": {"state": "reached"}, "register": "said", "ignore_errors": True}
    # The role's own words.
    task, use, *_ = yaml.safe_load((ROOT / "roles/vllm_image/tasks/main.yml").read_text())
    passed = use["container_image"]["builder"]
    copied = {"content": "{{ said | to_json }}", "dest": f"{folder}/{{{{ inventory_hostname }}}}.json"}
    write = {"ansible.builtin.copy": copied, "delegate_to": "localhost"}
    plays = [
        {"name": "A", "hosts": "all:!worker", "gather_facts": False, "tasks": [read, write]},
        *(
            {
                "name": builder or "none",
                "hosts": "worker",
                "gather_facts": False,
                "vars": {"vllm_image_builder": builder, "vllm_image_reference": ""},
                "tasks": [
                    task,
                    {**write, "ansible.builtin.copy": {**copied, "content": passed, "dest": str(folder / name)}},
                ],
            }
            for builder, name in (("keyed", "worker.json"), ("", "none.json"))
        ),
    ]
    (folder / "play.yml").write_text(yaml.safe_dump(plays))
    run = ansible_playbook(folder, "-i", "hosts.yml", "play.yml", "-e", "ansible_python_interpreter=/usr/bin/python3")
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in (*HOSTS, "worker", "none")}
    return found, run.text


def test_the_words_are_those_that_ansible_resolved(reached: tuple[dict[str, Any], str]) -> None:
    said = reached[0]["keyed"]["reached"]
    assert (said["host"], said["address"]) == ("keyed", "192.0.2.9")
    words = said["ssh"]
    assert words[0] == "ssh"
    for word in ("Port=2222", f'IdentityFile="{Path.home()}/keys/one two"', 'User="ops"', "ProxyJump=gate one", "-4"):
        assert word in words
    # ansible.cfg's, which a tunnel of its own overrides.
    command = Way.of(said).command("/tmp/x")  # type: ignore[union-attr]
    assert command.index("ControlMaster=no") < command.index("ControlMaster=auto")
    assert command[-2] == "192.0.2.9"


def test_a_task_of_another_host_gets_the_builders_words(reached: tuple[dict[str, Any], str]) -> None:
    assert reached[0]["worker"] == reached[0]["keyed"]["reached"]
    assert Way.of(reached[0]["none"]) is None


def test_a_builder_that_is_this_machine_needs_no_ssh(reached: tuple[dict[str, Any], str]) -> None:
    assert Way.of(reached[0]["here"]["reached"]) == Way("here")


@pytest.mark.parametrize(("host", "words"), [("secret", "logs in by key and takes no password"), ("odd", "needs ssh")])
def test_a_builder_that_no_tunnel_leads_to_is_refused(
    host: str, words: str, reached: tuple[dict[str, Any], str]
) -> None:
    answer, text = reached
    assert answer[host]["failed"]
    assert words in answer[host]["msg"]
    assert "Fix: " in answer[host]["msg"]
    assert "hush-hush" not in json.dumps(answer) + text


# --------------------------------------------------------------------------- what the inventory says


def with_builders(*names: str, **own: Any) -> RawInventory:
    raw = inventory()
    hosts = {**raw.hosts, **{name: {k: RawValue(v) for k, v in own.items()} for name in names if name not in raw.hosts}}
    return replace(raw, hosts=hosts, groups={**raw.groups, "image_builder": names})


@pytest.mark.parametrize("host", ["b1", "w1"])
def test_the_builder_is_published_and_runs_no_ray(host: str) -> None:
    spec, findings = load(with_builders(host))
    assert spec is not None, findings
    fact = spec.published()
    assert fact["image_builder"] == host
    assert set(fact["hosts"]) == {"h1", "w1", "w2"}


def test_without_the_group_this_machine_builds() -> None:
    spec, _ = load(inventory())
    assert spec is not None
    assert spec.published()["image_builder"] is None


def test_several_builders_are_a_finding() -> None:
    _, (finding,) = load(with_builders("b1", "b2"))
    assert (finding.subject, finding.problem) == ("image_builder", "2 builders: b1, b2")


@pytest.mark.parametrize("name", ["ansible_password", "ansible_ssh_pass", "ansible_ssh_password"])
def test_a_password_of_the_builder_is_a_finding_that_does_not_show_it(name: str) -> None:
    _, (finding,) = load(with_builders("b1", **{name: "hush-hush"}))
    assert (finding.subject, finding.hosts) == (name, ("b1",))
    assert "ansible_ssh_private_key_file" in finding.fix
    assert "hush-hush" not in str(finding.as_dict())
    spec, findings = load(with_builders("b1", **{name: "hush-hush", "ansible_connection": "local"}))
    assert spec is not None, findings


# --------------------------------------------------------------------------- what is built there


def test_an_image_for_another_architecture_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The builder's Docker says what it is; an archive's record, what it is for."""
    other = "aarch64" if os.uname().machine == "x86_64" else "x86_64"
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "docker").write_text(
        f'#!/bin/sh\ncase "$1" in version) echo 20.10.24 1.41 ;; info) echo 8 34359738368 {other} ;; esac\n'
    )
    (folder / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    images.builder.cache_clear()
    place = images.workplace(images.builder())
    assert (place.cores, place.memory_gib, place.jobs, place.buildkit) == (8, 32.0, 8, True)
    source = images.SourceImage(
        recipe="cuda",
        base=f"vendor/cuda@sha256:{'0' * 64}",
        source="https://git.example/vllm.git",
        ref="v0.29.0",
        commit="a" * 40,
        vllm="0.29.0",
        ray=("ray[llm]==2.60.0",),
        archs=("9.0",),
    )
    machine = os.uname().machine
    said = failure(lambda: images.archive(source, store=tmp_path, machine=machine))
    assert f"is for {other}, and the image has to be for {machine}" in said
    path = images.archive_of(source.tag, store=tmp_path)
    path.parent.mkdir(exist_ok=True)
    path.touch()
    path.with_suffix(".json").write_text(json.dumps({"recipe": "cuda", "made_of": {}, "machine": other}))
    assert "delete it" in failure(lambda: images.archive(source, store=tmp_path, machine=machine))
    assert images.archive(source, store=tmp_path, machine=other).archive == path
    assert PLAN.target.machine == "x86_64"
    images.builder.cache_clear()


@needs_sshd
@pytest.mark.docker
def test_the_plan_of_a_site_with_a_builder_asks_its_docker(sshd: Sshd, tmp_path: Path) -> None:
    if not os.access(tunnel.DOCKER_SOCKET, os.W_OK):
        pytest.skip("there is no Docker on this machine")
    try:
        images.builder()
    except ToolMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")
    site = tmp_path / "site"
    shutil.copytree(ROOT / "inventory" / "mi300x", site)
    group = {"all": {"children": {"image_builder": {"hosts": {"b1": sshd.variables()}}}}}
    (site / "builder.yml").write_text(yaml.safe_dump(group))
    command = [sys.executable, "-m", "clusterkit", "image", "plan", "-i", str(site), "--json"]
    command += ["-e", "clusterkit_image_ref=" + "a" * 40]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "XDG_STATE_HOME": str(tmp_path / "state")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["builder"], told["jobs"]) == ("b1", images.workplace(images.builder()).jobs)
    assert "Accepted publickey" in (sshd.folder / "log").read_text()
    # Where nobody gets in, it says so, and builds nothing here instead.
    (sshd.folder / "authorized_keys").write_text("")
    refused = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert refused.returncode == 1
    assert "ssh does not get to the builder b1" in refused.stderr
