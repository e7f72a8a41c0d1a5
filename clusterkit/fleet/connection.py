"""One host's agent, over SSH: a word goes out, one JSON object comes back, and every call has a deadline.

Each call is an `ssh` process of its own; OpenSSH keeps one connection per host open below them (ControlMaster,
ControlPersist), so a call costs no handshake. Under systemd they end with the daemon; one that was left is used again.
A call that missed its deadline, or found the connection broken, takes the control socket away: the next one connects
anew, whatever the old master is stuck in. On the host, the key may only run the agent's words.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clusterkit.errors import ClusterkitError
from clusterkit.fleet.config import HostConfig, Ssh

# The agent's own pattern: nothing else goes out, and what does needs no quoting.
WORD = re.compile(r"[A-Za-z0-9-][A-Za-z0-9._-]{0,62}")
ANSWER_LIMIT = 1024 * 1024
SSH_FAILED = 255  # ssh's own exit code, when it is not the remote command's
EOF_PATIENCE_S = 1.0
# Of OpenSSH's client: a host that says so is on, and its power is not what is wrong.
SSHD_ANSWERED = ("Permission denied", "Host key verification failed", "Connection refused")


class Unreachable(ClusterkitError):
    """The host gave no answer: nobody knows whether it did what it was asked. `alive`: its sshd gave one."""

    def __init__(self, message: str, *, alive: bool = False) -> None:
        super().__init__(message)
        self.alive = alive


class Refused(ClusterkitError):
    """The agent answered that it did not, or could not. `code` is its exit code: 3 is by policy."""

    def __init__(self, message: str, code: int, answer: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.code = code
        self.answer = answer

    @property
    def by_policy(self) -> str | None:
        """quarantine, maintenance, generation, instance or running; None where it tried and failed."""
        found = self.answer.get("refused")
        return str(found) if self.code == 3 and found else None


@dataclass(frozen=True)
class Ran:
    """How one process ended. `code` is None where it missed its deadline and was killed."""

    code: int | None
    out: str
    err: str


class Connection:
    """Calls to one host."""

    def __init__(self, name: str, host: HostConfig, ssh: Ssh) -> None:
        self.name = name
        self._ssh = ssh
        self._socket = f"{ssh.control_dir}/{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": ssh.known_hosts,
            "GlobalKnownHostsFile": "/dev/null",
            # Keys are pinned by the host's name: an address may be another host's tomorrow.
            "HostKeyAlias": name,
            "IdentitiesOnly": "yes",
            "IdentityFile": ssh.identity,
            "ConnectTimeout": str(ssh.connect_timeout_s),
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "3",
            "ControlMaster": "auto",
            "ControlPath": self._socket,
            "ControlPersist": str(ssh.persist_s),
            "ForwardAgent": "no",
            "LogLevel": "ERROR",
        }
        self._argv = [
            *ssh.command,
            *("-F", "none", "-T"),
            *(part for key, value in options.items() for part in ("-o", f"{key}={value}")),
            *("-p", str(host.port), "-l", ssh.user, "--", host.address),
        ]

    async def status(self, line: asyncio.Semaphore) -> dict[str, Any]:
        """The agent's picture of the host. Waits in line; the deadline counts from when its turn has come."""
        async with line:
            return await self.call(("status",), self._ssh.status_timeout_s)

    async def call(
        self, words: Sequence[str], timeout_s: float, given: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The agent's answer. Unreachable: there was none. Refused: it says no."""
        if not all(WORD.fullmatch(word) for word in words):
            raise Refused(f"no word for an agent: {' '.join(words)!r}", 2, {})
        ran = await self._run([*self._argv, *words], timeout_s, json.dumps(given).encode() if given else None)
        answer = _answer(ran.out)
        if ran.code == 0 and answer is not None:
            return answer
        if ran.code is not None and answer is not None and ran.code != SSH_FAILED:
            raise Refused(str(answer.get("reason") or f"{words[0]} failed"), ran.code, answer)
        self._forget()
        if ran.code is None:
            raise Unreachable(f"no answer to {words[0]} in {timeout_s:g} s")
        said = ran.err.strip().splitlines()
        message = said[-1][:300] if said else f"{words[0]} ended with {ran.code} and no answer"
        raise Unreachable(message, alive=any(words in ran.err for words in SSHD_ANSWERED))

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._socket)

    async def _run(self, argv: list[str], timeout_s: float, given: bytes | None) -> Ran:
        loop = asyncio.get_running_loop()
        try:
            transport, call = await loop.subprocess_exec(
                _Call,
                *argv,
                stdin=asyncio.subprocess.PIPE if given else asyncio.subprocess.DEVNULL,
                # A group of its own: what the program started goes with it.
                start_new_session=True,
            )
        except OSError as error:
            raise Unreachable(f"cannot run {argv[0]}: {error}") from error
        try:
            stdin = transport.get_pipe_transport(0)
            if given and isinstance(stdin, asyncio.WriteTransport):
                stdin.write(given)
                stdin.close()
            async with asyncio.timeout(timeout_s):
                await call.exited.wait()
            # The connection that stays open below may hold the pipes: their end is not waited for.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EOF_PATIENCE_S):
                    await call.ended.wait()
            return Ran(transport.get_returncode(), call.text(1), call.text(2))
        except TimeoutError:
            return Ran(None, call.text(1), call.text(2))
        finally:
            if transport.get_returncode() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(transport.get_pid(), signal.SIGKILL)
            transport.close()


class _Call(asyncio.SubprocessProtocol):
    """What came through the pipes so far, up to a limit; more is thrown away."""

    def __init__(self) -> None:
        self.exited = asyncio.Event()
        self.ended = asyncio.Event()
        self._data = {1: b"", 2: b""}
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if len(self._data[fd]) < ANSWER_LIMIT:
            self._data[fd] += data

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open:
            self.ended.set()

    def process_exited(self) -> None:
        self.exited.set()

    def text(self, fd: int) -> str:
        return self._data[fd].decode("utf-8", "replace")


def _answer(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text.strip().splitlines()[-1])
    except (ValueError, IndexError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
