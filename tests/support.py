"""What tests of several packages need: scripts as modules, runs of Ansible, patience, certificates, Docker."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 60.0


def load_script(path: Path) -> ModuleType:
    """A program of Python as a module, whatever its name ends with."""
    loader = importlib.machinery.SourceFileLoader(path.stem.replace("-", "_"), str(path))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@dataclass
class Run:
    """How a run of ansible-playbook on one host ended, and what it said."""

    code: int
    text: str

    @property
    def changed(self) -> int:
        found = re.search(r"changed=(\d+)", self.text)
        assert found, self.text
        return int(found.group(1))


def ansible_playbook(folder: Path, *words: str) -> Run:
    """A run in a folder of the test's, with the kit's configuration."""
    command = [str(Path(sys.executable).with_name("ansible-playbook")), *words]
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return Run(done.returncode, done.stdout + done.stderr)


def until(
    condition: Callable[[], Any],
    what: Callable[[], object] | str = "it never came",
    patience_s: float = PATIENCE_S,
    pause_s: float = 0.02,
) -> Any:
    """Its first true value; `what` is said where none comes."""
    end = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(pause_s)
    return found


def free_block(size: int) -> int:
    """The first of `size` ports in a row that nobody listens on, below the range of outgoing connections."""
    for base in range(20000, 30000, 100):
        try:
            for port in range(base, base + size):
                with socket.socket() as probe:
                    probe.bind(("", port))
        except OSError:
            continue
        return base
    raise AssertionError("no free ports")


def wait_for_port(port: int, process: subprocess.Popen[Any], log: Path) -> None:
    """Until a process of this machine takes connections; its log is said where it ends or does not come."""

    def takes_one() -> bool:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert process.poll() is None, log.read_text()
            return False
        return True

    until(takes_one, log.read_text, patience_s=30)


def certificate(folder: Path, name: str, address: str = "127.0.0.1") -> tuple[Path, Path]:
    """`crt` and `key` in a folder, which may be new: self-signed, for an address."""
    folder.mkdir(exist_ok=True)
    files = folder / "crt", folder / "key"
    words = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "90"]
    words += ["-subj", f"/CN={name}", "-addext", f"subjectAltName=IP:{address}"]
    subprocess.run([*words, "-keyout", str(files[1]), "-out", str(files[0])], check=True, capture_output=True)
    return files


def docker_client() -> Any:
    """Skips, with the reason, where no Docker Engine answers."""
    # Not in the environments of their own that tests of Ray are run with.
    import docker
    import docker.errors

    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"needs a running Docker Engine: {error}")
    return client
