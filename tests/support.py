"""What tests of several packages need: scripts as modules, and runs of Ansible."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

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
