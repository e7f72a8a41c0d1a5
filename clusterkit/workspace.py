"""Where the checkout and the run folders are."""

from __future__ import annotations

import os
import shutil
import time
from datetime import datetime
from pathlib import Path

from clusterkit.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
KEPT_RUNS = 20
ABANDONED_AFTER_S = 30 * 24 * 3600


def state_home() -> Path:
    """`$XDG_STATE_HOME/clusterkit`, by default `~/.local/state/clusterkit`."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "clusterkit"


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/clusterkit`, by default `~/.cache/clusterkit`: wheels and images that hosts are made from."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clusterkit"


def playbook(name: str) -> Path:
    """`site.yml`, or one of `playbooks/`."""
    path = ROOT / name if name == "site.yml" else ROOT / "playbooks" / name
    if not path.exists():
        raise UsageError(
            f"{path} is not there: clusterkit is used from a checkout",
            hint="pip install -e . in the checkout",
        )
    return path


def inventory(given: str | None) -> str:
    """The inventory as Ansible shall read it; default `inventory/local` of the checkout."""
    if given is None:
        return str(ROOT / "inventory" / "local")
    return given if given.endswith(",") else str(Path(given).expanduser().absolute())


def new_run() -> Path:
    """A fresh folder that only this user may read; the last 20 are kept."""
    home = state_home() / "runs"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    while True:
        # Sorts by time, also where several begin in one second.
        path = home / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        try:
            path.mkdir(mode=0o700)
            break
        except FileExistsError:
            continue
    # A run without a report may still be going on, or was killed: then its log is what one looks for.
    ended = sorted(old for old in home.iterdir() if (old / "report.json").exists())
    for old in ended[: max(0, len(ended) - KEPT_RUNS)]:
        shutil.rmtree(old, ignore_errors=True)
    for old in home.iterdir():
        if time.time() - old.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(old, ignore_errors=True)
    return path
