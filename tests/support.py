"""What tests of several packages need: scripts as modules, and runs of Ansible."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import docker
import docker.errors
import pytest

ROOT = Path(__file__).resolve().parents[1]


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


def docker_client() -> Any:
    """Skips, with the reason, where no Docker Engine answers."""
    try:
        client = docker.from_env()
        client.ping()
    except docker.errors.DockerException as error:
        pytest.skip(f"needs a running Docker Engine: {error}")
    return client
