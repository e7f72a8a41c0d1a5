"""An app's engine, started for the first time and again: what the compile caches on its host save.

python -m bench.engine_start     deploys inventory/local in a throw-away home, and takes it away

On a CPU the template compiles nothing by default; here it is told to, so a C++ compiler is needed. The same app is
taken away and put back: with empty caches, with those of the time before, with empty ones again. A run that finds
nothing to do stands beside it. The model is a tiny one, so nearly all of an engine's start is compiling; weights of a
real one take their own time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.common import ENVIRONMENT, clusterkit, run, seconds, table
from clusterkit import workspace

INVENTORY = "inventory/local"
# vLLM 0.32.0 cannot read back what its default way of compiling writes on a CPU.
PARAMETERS = {
    "model_id": "tiny-llama",
    "model_source": {"make": "tiny-llama"},
    "engine_kwargs": {"max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": False},
    "environment": {"VLLM_USE_AOT_COMPILE": "0"},
}
ONE = [{"name": "tiny", "template": "llm", "parameters": PARAMETERS}]
ENGINE = re.compile(r"init engine .* took ([\d.]+) s")


def main() -> None:
    if shutil.which("g++") is None:
        raise SystemExit("compiling for a CPU needs g++: install it")
    ENVIRONMENT["XDG_CACHE_HOME"] = str(workspace.cache_home().parent)
    with tempfile.TemporaryDirectory() as home:
        ENVIRONMENT["HOME"] = home
        try:
            clusterkit("deploy", "-i", INVENTORY, "-e", apps([]))
            measure(Path(home))
        finally:
            run(sys.executable, "-m", "clusterkit", "remove", "-i", INVENTORY, "--yes", check=False)


def apps(declared: list[dict[str, Any]]) -> str:
    return json.dumps({"clusterkit_apps": declared})


def measure(home: Path) -> None:
    caches = home / ".local/state/clusterkit/local/node/cache/engine"
    rows: list[list[object]] = []
    first = 0.0
    for what, empty in (("empty caches", True), ("caches of the time before", False), ("empty caches again", True)):
        if empty:
            for folder in caches.glob("*"):
                shutil.rmtree(folder)
        took = seconds(lambda: apply(ONE))
        first = first or took
        again = seconds(lambda: apply(ONE))
        size = subprocess.run(["du", "-sk", str(caches)], capture_output=True, text=True, check=False).stdout
        rows.append(
            [what, f"{took:.1f}", f"{took / first:.2f}", engine_seconds(), f"{int(size.split()[0]) / 1024:.1f}"]
        )
        apply([])
    rows.append(["nothing to do", f"{again:.1f}", f"{again / first:.2f}", "", ""])
    table(
        "`deploy --tags model_store,serve_apps` of one app, until it is RUNNING",
        ["with", "seconds", "ratio", "of them vLLM's own init", "caches MiB"],
        rows,
    )


def apply(declared: list[dict[str, Any]]) -> None:
    clusterkit("deploy", "-i", INVENTORY, "--tags", "model_store,serve_apps", "-e", apps(declared))


def engine_seconds() -> str:
    """As the newest engine said it; its log lies among Ray's."""
    logs = Path(f"/tmp/clusterkit-{os.getuid()}").glob("**/session_latest/logs/**/*")
    said = [
        (path.stat().st_mtime, found[-1])
        for path in logs
        if path.is_file() and (found := ENGINE.findall(path.read_text(errors="replace")))
    ]
    return max(said)[1] if said else "not said"


if __name__ == "__main__":
    main()
