"""A way to another host's Docker: ssh forwards a socket of this machine to that host's, for as long as it is needed.

The connection's own user has to be allowed to open Docker's socket there: nothing becomes root through a tunnel. The
socket lies in a folder that only this user may enter, since whoever opens it is root on that host.
"""

from __future__ import annotations

import http.client
import os
import select
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clusterkit.errors import ClusterkitError, ToolMissing

# Where dockerd listens on every distribution.
DOCKER_SOCKET = "/var/run/docker.sock"
LOGIN_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 30
CLOSE_TIMEOUT_S = 5
MARK = "clusterkit-tunnel"
# What wins against the site's own words: ssh takes the first value that it is given of each option.
OPTIONS = {
    "BatchMode": "yes",
    "ExitOnForwardFailure": "yes",
    "ControlMaster": "no",
    "ControlPath": "none",
    "RequestTTY": "no",
    "StreamLocalBindMask": "0177",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
}


@dataclass(frozen=True)
class Way:
    """How Ansible reaches a host. `ssh`: the program and its options; empty: it is this machine."""

    host: str
    address: str = ""
    ssh: tuple[str, ...] = ()
    socket: str = DOCKER_SOCKET

    @classmethod
    def of(cls, data: Mapping[str, Any] | None) -> Way | None:
        """From plain data; nothing is None."""
        return cls(**{**data, "ssh": tuple(data.get("ssh") or ())}) if data else None

    def command(self, local: str) -> list[str]:
        """The whole ssh command: it logs in, says what Docker's socket is there, and stays until its input ends."""
        program, *site = self.ssh
        ours = [word for key, value in OPTIONS.items() for word in ("-o", f"{key}={value}")]
        there = shlex.quote(self.socket)
        # Tied to our end of the pipe: it ends with this process, however that ends.
        script = (
            f"if [ ! -S {there} ]; then echo {MARK} absent; elif [ ! -w {there} ]; then echo {MARK} denied; "
            f"else echo {MARK} there; fi; exec cat >/dev/null"
        )
        words = ["-L", f"{local}:{self.socket}", "--", self.address, f"sh -c {shlex.quote(script)}"]
        return [program, *ours, *site, *words]


@contextmanager
def opened(way: Way | None) -> Iterator[str | None]:
    """A socket of this machine behind which that host's Docker answers; None where it is this machine's anyway.

    Raises ClusterkitError where ssh does not get there, or Docker does not answer there; ToolMissing without ssh.
    An error inside while the tunnel is broken says so.
    """
    if way is None or not way.ssh:
        yield None
        return
    # A socket's path may have 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="clusterkit-", dir=None if len(tempfile.gettempdir()) < 60 else "/tmp"))
    local = str(folder / "docker.sock")
    try:
        with (folder / "said").open("w+b") as said:
            process = _started(way, local, said.fileno())
            try:
                _ready(way, process, folder / "said")
                _answers(way, local)
                yield local
            except ClusterkitError as error:
                if process.poll() is None or isinstance(error, _NotThere):
                    raise
                raise ClusterkitError(
                    f"the connection to {way.host} broke: {_last(folder / 'said')}\n{error.message}",
                    hint="run again: finished layers are kept there, and hosts keep the image that they have",
                ) from error
            finally:
                _closed(process)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _NotThere(ClusterkitError):
    """The tunnel did not come to be."""


def _started(way: Way, local: str, said: int) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            way.command(local),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            # Ctrl-C is for us: what is under way ends first, then the tunnel.
            start_new_session=True,
        )
    except OSError as error:
        raise ToolMissing(
            way.ssh[0], hint=f"{error.strerror}. On Debian or Ubuntu: sudo apt install openssh-client"
        ) from None


def _ready(way: Way, process: subprocess.Popen[bytes], said: Path) -> None:
    """Wait until ssh is logged in; what it then says of the socket."""
    assert process.stdout is not None
    end, text = time.monotonic() + LOGIN_TIMEOUT_S, ""
    while f"\n{MARK} " not in f"\n{text}" or not text.endswith("\n"):
        left = end - time.monotonic()
        if left <= 0:
            raise _NotThere(f"{way.host} did not let ssh in within {LOGIN_TIMEOUT_S} s", hint=_try(way))
        if not select.select([process.stdout], [], [], left)[0]:
            continue
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            process.wait()
            raise _refused(way, said)
        text += more.decode("utf-8", "replace")
    # A shell may greet before.
    state = next(line for line in text.splitlines() if line.startswith(MARK)).split()[1]
    if state != "there":
        raise state_problem(way, state)


def state_problem(way: Way, state: str) -> ClusterkitError:
    """Why Docker's socket on the host is of no use: `absent`, or `denied` to the user."""
    if state == "absent":
        return _NotThere(
            f"there is no Docker on {way.host}: {way.socket} is missing",
            hint="install and start it there (a managed worker of clusterkit_runtime: container has it), or name "
            "another host in the group image_builder",
        )
    return _NotThere(
        f"the user that logs in to {way.host} may not open Docker's socket {way.socket}",
        hint="as root there: usermod --append --groups docker USER. Nothing becomes root through the tunnel, whatever "
        "ansible_become says; a member of that group is as good as root",
    )


def _refused(way: Way, said: Path) -> ClusterkitError:
    words = _last(said)
    hint = _try(way)
    if "Permission denied" in words:
        hint = f"it needs a login by key, without a question: ansible_ssh_private_key_file, or ssh-agent; {hint}"
    elif "Host key verification failed" in words:
        hint = f"its host key is not known here, or is another one: ssh {way.address}, once, by hand"
    elif "forward" in words.lower():
        hint = "ssh could not open a socket on this machine: is its folder for temporary files writable and not full?"
    return _NotThere(f"ssh does not get to the builder {way.host}: {words}", hint=hint)


def _answers(way: Way, local: str) -> None:
    """Ask Docker itself: sshd says nothing of a socket that it could not, or would not, open."""
    client = http.client.HTTPConnection("docker")
    client.sock = socket.socket(socket.AF_UNIX)
    client.sock.settimeout(ANSWER_TIMEOUT_S)
    try:
        client.sock.connect(local)
        client.request("GET", "/_ping")
        status = client.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise _NotThere(
            f"Docker on {way.host} does not answer: {str(error) or type(error).__name__}",
            hint="is dockerd up there (systemctl status docker)? Does its sshd forward sockets "
            "(AllowStreamLocalForwarding, DisableForwarding), and the key too (no `restrict` in authorized_keys)?",
        ) from None
    finally:
        client.close()
    if status != 200:
        raise _NotThere(f"what answers behind {way.socket} on {way.host} is no Docker: status {status}")


def _closed(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with suppress(OSError):
            pipe.close()
    try:
        process.wait(CLOSE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # Nothing of what it would still carry is wanted.
        process.kill()
        process.wait()


def _try(way: Way) -> str:
    # The options may hold what nobody should read.
    return f"try: ansible {way.host} -i INVENTORY -m ansible.builtin.ping"


def _last(said: Path) -> str:
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "ssh said nothing"
