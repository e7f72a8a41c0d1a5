"""The kit itself on every Python that it promises: installed, and an inventory checked."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, run

pytestmark = pytest.mark.slow

PROMISED = ("3.11", "3.12", "3.13")


def interpreter(version: str) -> str | None:
    """A real interpreter of that version; a version manager's shim may be on PATH without one behind it."""
    candidates = [
        shutil.which(f"python{version}"),
        *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python")),
    ]
    for candidate in filter(None, candidates):
        done = run([candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"])
        if done.stdout.strip() == version:
            return candidate
    return None


@pytest.mark.parametrize(
    "version", [item for item in PROMISED if item != f"{sys.version_info.major}.{sys.version_info.minor}"]
)
def test_the_kit_runs_on(version: str, tmp_path: Path) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True)
    mine = str(tmp_path / "venv/bin/python")
    subprocess.run([mine, "-m", "pip", "install", "--quiet", "--editable", f"{ROOT}", "pytest"], check=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYENV_VERSION"}
    good = run([mine, "-m", "clusterkit", "validate", "-i", "inventory/mi300x"], env=environment)
    assert good.returncode == 0, good.stderr
    bad = run([mine, "-m", "clusterkit", "validate", "-i", "tests/inventories/broken/many"], env=environment)
    assert bad.returncode == 2
    assert "hosts.yml:12" in bad.stderr, "places come from inside Ansible, and each version of it must give them"
    assert "Traceback" not in bad.stderr
    unit = run([mine, "-m", "pytest", "-q", "tests/unit/test_spec.py", "tests/unit/test_imports.py"], env=environment)
    assert unit.returncode == 0, unit.stdout[-3000:]
