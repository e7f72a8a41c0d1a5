"""The engine's image, built on a host of the lab by way of SSH: the controller's own Docker has no part in it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import run
from tests.lab.conftest import BIN, ENVIRONMENT, Cluster, Maker, playbook, recap

pytestmark = [pytest.mark.docker, pytest.mark.slow]

HOSTS = ("head", "worker1")
BUILDER = """\
all:
  children:
    image_builder:
      hosts:
        worker1:
"""


@pytest.fixture(scope="module")
def lab(lab_of: Maker) -> Iterator[Cluster]:
    made = lab_of("buildertest", "--workers", "1")
    (made.inventory / "builder.yml").write_text(BUILDER)
    done = playbook("site.yml", made.inventory, "--tags", "baseline,container_engine")
    assert done.returncode == 0, done.stdout[-4000:]
    yield made
    (made.inventory / "builder.yml").unlink()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A controller without an image, and without a Docker that answers."""
    caches = str(tmp_path_factory.mktemp("caches"))
    return {**ENVIRONMENT, "DOCKER_HOST": "unix:///nowhere/docker.sock", "XDG_CACHE_HOME": caches}


def image(lab: Cluster, environment: dict[str, str], verb: str) -> subprocess.CompletedProcess[str]:
    words = ["-m", "clusterkit", "image", verb, "-i", str(lab.inventory), "--json"]
    return run([sys.executable, *words], env=environment)


def test_who_may_not_open_docker_s_socket_is_told(lab: Cluster, environment: dict[str, str]) -> None:
    refused = image(lab, environment, "build")
    assert refused.returncode != 0
    assert "the user that logs in to worker1 may not open Docker's socket" in refused.stderr
    assert "usermod --append --groups docker" in refused.stderr


def test_the_builder_builds_and_the_hosts_get_it(lab: Cluster, environment: dict[str, str]) -> None:
    lab.on("worker1", "usermod --append --groups docker ops")
    planned: dict[str, Any] = json.loads(image(lab, environment, "plan").stdout)
    assert planned["builder"] == "worker1"
    built = image(lab, environment, "build")
    assert built.returncode == 0, built.stderr[-5000:]
    name = planned["image"]
    labels = lab.on("worker1", f"docker image inspect --format '{{{{json .Config.Labels}}}}' {name}")
    assert "clusterkit.inputs" in json.loads(labels)
    assert "ssh -L" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout, "it is closed"
    again = image(lab, environment, "build")
    assert again.returncode == 0, again.stderr[-3000:]
    assert json.loads(again.stdout)["built"] is False

    site = [str(BIN / "ansible-playbook"), "site.yml", "-i", str(lab.inventory), "--tags", "vllm_image"]
    done = run(site, env=environment)
    assert done.returncode == 0, done.stdout[-4000:]
    ids = {host: lab.on(host, "docker image inspect --format '{{.Id}}' clusterkit/vllm:current") for host in HOSTS}
    assert len(set(ids.values())) == 1, ids
    second = run(site, env=environment)
    assert not any(count["changed"] for count in recap(second.stdout).values()), second.stdout[-3000:]
