"""Connections by the real OpenSSH: pinned keys, a forced command, one connection that is kept, and deadlines."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from clusterkit.fleet.config import HostConfig, Ssh
from clusterkit.fleet.connection import Connection, Refused, Unreachable

ROOT = Path(__file__).resolve().parents[2]
PYTHON = getattr(sys, "_base_executable", sys.executable)
AGENT = ROOT / "roles/host_agent/files/host-agent"
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
PRIVSEP = Path("/run/sshd")

T = TypeVar("T")

needs_sshd = pytest.mark.skipif(SSHD is None, reason="there is no sshd here")


@dataclass
class Sshd:
    """A daemon on this machine whose only key runs the host agent's `remote`."""

    folder: Path
    port: int
    known_hosts: Path
    process: subprocess.Popen[bytes] | None = None

    def connection(self, name: str = "w1", **changes: Any) -> Connection:
        given = {"user": getpass.getuser(), "identity": str(self.folder / "key"), "control_dir": str(self.control)}
        ssh = Ssh(**{**given, "known_hosts": str(self.known_hosts), "connect_timeout_s": 5, "persist_s": 60, **changes})
        return Connection(name, HostConfig(address="127.0.0.1", node_ip="127.0.0.1", pool="p", port=self.port), ssh)

    @property
    def control(self) -> Path:
        # pytest's own folders are too long for a socket.
        path = Path("/tmp") / f"ck-{self.port}"
        path.mkdir(mode=0o700, exist_ok=True)
        return path

    @property
    def connects(self) -> int:
        return (self.folder / "log").read_text().count("Accepted publickey")


def key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().strip()


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[Sshd]:
    assert SSHD is not None
    if os.geteuid() == 0:
        PRIVSEP.mkdir(mode=0o755, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    host_key, user_key = key(tmp_path / "host"), key(tmp_path / "key")
    (tmp_path / "launcher").write_text(
        "import json, sys\n"
        'print(json.dumps({"state": "stopped", "reason": " ".join(sys.argv[3:]), "changed": False, "drained": True}))\n'
    )
    config = {name: str(tmp_path / name) for name in ("launcher", "launcher_config", "record", "instance_env")}
    config.update(python=PYTHON, generation_file=str(tmp_path / "generation"))
    (tmp_path / "host-agent.json").write_text(json.dumps(config))
    agent = f"{PYTHON} {AGENT} --config {tmp_path}/host-agent.json remote"
    # As a program: a test may put another in its place.
    (tmp_path / "command").write_text(f"#!/bin/sh\nexec {agent}\n")
    (tmp_path / "command").chmod(0o755)
    (tmp_path / "authorized_keys").write_text(f'restrict,command="{tmp_path}/command" {user_key}\n')
    (tmp_path / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nStrictModes no\nUsePAM no\nLogLevel INFO\n"
        f"AuthorizedKeysFile {tmp_path}/authorized_keys\nPasswordAuthentication no\nPidFile none\n"
        "PermitRootLogin yes\n"
    )
    known = tmp_path / "known_hosts"
    known.write_text(f"w1 {host_key}\n")
    found = Sshd(tmp_path, port, known)
    words = [SSHD, "-D", "-f", str(tmp_path / "sshd_config"), "-E", str(tmp_path / "log")]
    found.process = subprocess.Popen(words)
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert found.process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
    yield found
    for path in found.control.iterdir():
        subprocess.run(["ssh", "-o", f"ControlPath={path}", "-O", "exit", "x"], capture_output=True, check=False)
    found.process.terminate()
    found.process.wait()
    shutil.rmtree(found.control)


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def inner() -> T:
        return await work()

    return asyncio.run(inner())


@needs_sshd
def test_words_go_through_one_connection_that_is_kept(sshd: Sshd) -> None:
    async def work() -> None:
        connection, line = sshd.connection(), asyncio.Semaphore(4)
        assert (await connection.status(line))["state"] == "stopped"
        assert (await connection.call(("drain", "--timeout", "5"), 30))["reason"] == "drain --timeout 5"
        for _ in range(3):
            await connection.status(line)
        assert sshd.connects == 1
        # The next daemon finds it open.
        assert (await sshd.connection().status(line))["state"] == "stopped"
        assert sshd.connects == 1

    run(work)


@needs_sshd
def test_the_first_call_does_not_wait_for_the_connection_that_stays_open(sshd: Sshd) -> None:
    async def work() -> float:
        began = time.monotonic()
        await sshd.connection(persist_s=600).status(asyncio.Semaphore(1))
        return time.monotonic() - began

    assert run(work) < 20


@needs_sshd
def test_what_the_agent_refuses_is_told_with_its_reason(sshd: Sshd) -> None:
    async def work() -> None:
        connection = sshd.connection()
        with pytest.raises(Refused, match="never converged") as refused:
            await connection.call(("start", "w1-1"), 30)
        assert (refused.value.by_policy, refused.value.code) == ("generation", 3)
        with pytest.raises(Refused, match="not ours to switch off"):
            await connection.call(("poweroff",), 30)
        with pytest.raises(Refused, match="the fleet's key may say") as refused:
            await connection.call(("release",), 30)
        assert refused.value.by_policy is None

    run(work)
    assert sshd.connects == 1


@needs_sshd
@pytest.mark.parametrize("words", ["id", "", "sftp", "status; id", "hold --owner me --reason x"])
def test_the_key_runs_nothing_else(sshd: Sshd, words: str) -> None:
    argv = ["ssh", "-F", "none", "-i", str(sshd.folder / "key"), "-p", str(sshd.port), "-o", "HostKeyAlias=w1"]
    argv += [
        "-o",
        f"UserKnownHostsFile={sshd.known_hosts}",
        "-o",
        "BatchMode=yes",
        "127.0.0.1",
        *([words] if words else []),
    ]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the fleet's key may say" in done.stdout or "takes no such arguments" in done.stdout
    assert "uid=" not in done.stdout


@needs_sshd
def test_another_host_under_that_address_is_not_spoken_to(sshd: Sshd) -> None:
    sshd.known_hosts.write_text(f"w1 {key(sshd.folder / 'other')}\n")

    async def work() -> None:
        with pytest.raises(Unreachable, match="Host key verification failed"):
            await sshd.connection().status(asyncio.Semaphore(1))
        with pytest.raises(Unreachable, match="Host key verification failed"):
            await sshd.connection("w2").status(asyncio.Semaphore(1))

    run(work)
    assert sshd.connects == 0


@needs_sshd
def test_a_call_that_hangs_ends_at_its_deadline_and_the_next_connects_anew(sshd: Sshd) -> None:
    command = sshd.folder / "command"
    good = command.read_text()
    assert sshd.process is not None

    async def work() -> None:
        connection, line = sshd.connection(status_timeout_s=3), asyncio.Semaphore(1)
        command.write_text("#!/bin/sh\nexec sleep 30\n")
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer to status in 3 s"):
            await connection.status(line)
        assert time.monotonic() - began < 15
        command.write_text(good)
        assert (await sshd.connection(status_timeout_s=20).status(line))["state"] == "stopped"
        assert sshd.connects == 2

    run(work)


@needs_sshd
def test_a_host_that_is_gone_says_why(sshd: Sshd) -> None:
    assert sshd.process is not None
    sshd.process.terminate()
    sshd.process.wait()

    async def work() -> None:
        with pytest.raises(Unreachable, match="Connection refused"):
            await sshd.connection().status(asyncio.Semaphore(1))

    run(work)


# --------------------------------------------------------------------------- with a program in ssh's place


def stand_in(folder: Path, text: str) -> Connection:
    program = folder / "ssh"
    program.write_text("#!/bin/sh\n" + text.replace("FOLDER", str(folder)))
    program.chmod(0o755)
    ssh = Ssh(command=(str(program),), identity="/x", known_hosts="/x", control_dir="/tmp", status_timeout_s=2)
    return Connection("w1", HostConfig(address="w1", node_ip="192.0.2.1", pool="p"), ssh)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("echo nonsense", "ended with 0 and no answer"),
        ("exit 7", "ended with 7 and no answer"),
        ("echo '[1]'", "ended with 0 and no answer"),
        ("echo 'no route' >&2; exit 255", "no route"),
        ("echo '{}'; echo broken >&2; exit 255", "broken"),
        ("kill -9 $$", "no answer"),
        ("sleep 60", "no answer to status in 2 s"),
        ("echo '{}'; sleep 60", "no answer to status in 2 s"),
    ],
)
def test_whatever_is_no_answer_is_none(tmp_path: Path, text: str, words: str) -> None:
    async def work() -> None:
        with pytest.raises(Unreachable, match=words):
            await stand_in(tmp_path, text).status(asyncio.Semaphore(1))

    run(work)


def test_a_program_that_leaves_its_pipes_open_is_not_waited_for(tmp_path: Path) -> None:
    """As the master of a kept connection may."""

    async def work() -> float:
        began = time.monotonic()
        answer = await stand_in(tmp_path, 'setsid sleep 20 &\necho \'{"state": "x"}\'').status(asyncio.Semaphore(1))
        assert answer == {"state": "x"}
        return time.monotonic() - began

    assert run(work) < 10


def test_what_a_call_started_goes_with_it(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(Unreachable):
            await stand_in(tmp_path, "sleep 60 & echo $! > FOLDER/child; wait").status(asyncio.Semaphore(1))

    run(work)
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    end = time.monotonic() + 30
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < end


@pytest.mark.parametrize("word", ["a b", "a;b", "$(id)", "", "a\nb", "x" * 64, "-oProxyCommand=x"])
def test_words_that_a_shell_could_read_do_not_leave(tmp_path: Path, word: str) -> None:
    async def work() -> None:
        with pytest.raises(Refused, match="no word for an agent"):
            await stand_in(tmp_path, "touch FOLDER/ran; echo '{}'").call(("start", word), 5)

    run(work)
    assert not (tmp_path / "ran").exists()


def test_an_answer_without_end_is_cut(tmp_path: Path) -> None:
    async def work() -> None:
        with pytest.raises(Unreachable):
            await stand_in(tmp_path, "exec yes").status(asyncio.Semaphore(1))

    run(work)


def test_without_ssh(tmp_path: Path) -> None:
    async def work() -> None:
        ssh = Ssh(command=("/no/such/ssh",), identity="/x", known_hosts="/x", control_dir="/tmp")
        connection = Connection("w1", HostConfig(address="w1", node_ip="192.0.2.1", pool="p"), ssh)
        with pytest.raises(Unreachable, match="cannot run"):
            await connection.status(asyncio.Semaphore(1))

    run(work)
