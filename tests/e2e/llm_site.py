"""An app with engines of random weights, for tests of templates that have replicas of a model: which of them answered
what, by their logs, and their processes."""

from __future__ import annotations

import os
import re
import subprocess
import uuid
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.app_site import Site
from tests.support import ROOT, until

MAKER = ROOT / "roles/model_store/files/make_tiny_llama.py"
WAIT_S = 180


def python(engine: Path, *arguments: str, **more: str) -> str:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **more}
    command = [str(engine / "bin/python"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class LlmApp:
    """The app of a README's example."""

    def __init__(self, site: Site, readme: Path, folder: str) -> None:
        (example,) = re.findall(r"```yaml\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
        (self.app,) = yaml.safe_load(example)["clusterkit_apps"]
        self.site, self.name = site, str(self.app["name"])
        self.parameters: dict[str, Any] = self.app["parameters"]
        self.parameters["model_source"] = {"folder": folder}
        # With the engine vLLM configures logging for the whole process, and closes what Serve has opened for its own
        # (vllm 0.32.0, logger.py: dictConfig): the replica's log ends there.
        self.parameters["environment"] = {"VLLM_CONFIGURE_LOGGING": "0"}
        site.apps[self.name] = self.app
        self.http = httpx.Client(base_url=site.url("/v1"), timeout=WAIT_S)

    def post(self, path: str, asked: dict[str, Any], **headers: str) -> httpx.Response:
        return self.http.post(path, json={"model": self.parameters["model_id"], **asked}, headers=headers)

    def ask(self, prompt: Any, headers: dict[str, str] | None = None, status: int = 200, **more: Any) -> str:
        """Which replica answered; the name that Serve gave it."""
        name = uuid.uuid4().hex
        asked = {"prompt": prompt, "max_tokens": 2, "temperature": 0, **more}
        answer = self.post("/completions", asked, **{"x-request-id": name, **(headers or {})})
        assert answer.status_code == status, answer.text
        return self.answered(name) if status == 200 else ""

    def answered(self, request: str, deployment: str = "Server_") -> str:
        """The replica whose log has the request."""
        (session,) = self.site.temp.glob("*/session_latest")

        def look() -> str:
            paths = (session / "logs/serve").glob(f"replica_{self.name}_*{deployment}*.log")
            return next((path.stem.rpartition("_")[2] for path in paths if request in path.read_text()), "")

        replica: str = until(look, f"no replica of {deployment} has the request {request} in its log", WAIT_S)
        return replica

    def processes(self, deployment: str) -> dict[str, int]:
        """Replica and process id of what runs of a deployment, by the logs that the processes write: `deployment` is
        what their names have in them."""
        found: dict[str, int] = {}
        for link in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                target = Path(os.readlink(link))
            except OSError:
                continue
            own = target.is_relative_to(self.site.temp) and target.name.startswith(f"replica_{self.name}_")
            if own and deployment in target.name:
                replica, process = target.stem.rpartition("_")[2], int(link.parts[2])
                # What it has started may have its log, too.
                found[replica] = min(process, found.get(replica, process))
        return found
