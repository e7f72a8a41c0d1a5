"""What is missing on the machine is named, with the line that installs it, before anything is made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(checkout: Path, python: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "venv", f"PYTHON={python}"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_python_without_ensurepip_is_told_which_package_brings_it(checkout: Path) -> None:
    (checkout / "ensurepip.py").write_text("raise ImportError('as Debian ships it')\n", encoding="utf-8")
    done = make(checkout, "python3", PYTHONPATH=str(checkout))
    assert done.returncode == 2
    assert "apt-get install -y python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_a_python_that_is_too_old_is_told_which_would_do(checkout: Path) -> None:
    old = checkout / "python-old"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && { echo "Python 3.9.2"; exit 0; }\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = make(checkout, str(old))
    assert done.returncode == 2
    assert "needs Python 3.11 to 3.13" in done.stderr
    assert "Python 3.9.2" in done.stderr
    assert not (checkout / ".venv").exists()
