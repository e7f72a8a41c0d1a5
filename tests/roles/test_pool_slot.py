"""The places of a pool's hosts that are out, in the GCS of a real Ray: one head in a container of the CPU image."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import load_script

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "roles/gpu_health/files"
IMAGE = "clusterkit/vllm-cpu"
DOCKER = shutil.which("docker") or "/usr/bin/docker"
USER = "nobody"

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]


def docker(*words: str, given: str | None = None, code: int | None = 0) -> str:
    done = subprocess.run([DOCKER, *words], input=given, capture_output=True, text=True, check=False, timeout=300)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout


class Head:
    """A head with token authentication, and what asks it from the outside."""

    def __init__(self, image: str, folder: Path) -> None:
        self.image, self.folder = image, folder
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(16))
        self.token.chmod(0o600)
        os.chown(self.token, 65534, 65534)
        self.name = f"clusterkit-poolslot-{os.getpid()}"
        start = "ray start --head --port 6379 --num-cpus 1 --object-store-memory 80000000 --include-dashboard false"
        env = ["--env", "RAY_AUTH_MODE=token", "--env", f"RAY_AUTH_TOKEN_PATH={self.token}"]
        mounts = ["--volume", f"{folder}:{folder}:ro", "--volume", f"{FILES}:{FILES}:ro"]
        words = ["--detach", "--name", self.name, "--shm-size", "256m", *env, *mounts, "--entrypoint", "sh"]
        docker("run", *words, image, "-c", f"{start} --block")
        self.ip = docker("inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", self.name).strip()

    def ask(self, host: str, *, code: int | None = 0, env: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
        """As `host`, whose node is not in Ray unless `node_ip` says so."""
        request = {"address": f"{self.ip}:6379", "pool": "gpus", "host": host, "node_ip": f"10.9.9.{len(host)}"}
        request |= {"max_out": 1, "members": ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"], **changes}
        words = ["exec", "--interactive", *env, self.name, "python3", str(FILES / "pool-slot")]
        answer = json.loads(docker(*words, given=json.dumps(request), code=code).splitlines()[-1])
        assert isinstance(answer, dict)
        return answer

    def age(self, pool: str, number: int, seconds: int) -> None:
        """Make a place's last entry older, as only time does outside of a test."""
        script = f"""
import json
from ray._raylet import GcsClient
client = GcsClient(address="{self.ip}:6379")
prefix = b"gpu-health/{pool}/{number}/"
key = max(client.internal_kv_keys(prefix, b"clusterkit", timeout=10))
entry = json.loads(client.internal_kv_get(key, b"clusterkit", timeout=10))
entry["at"] -= {seconds}
client.internal_kv_put(key, json.dumps(entry).encode(), True, b"clusterkit", timeout=10)
"""
        docker("exec", "--interactive", self.name, "python3", "-", given=script)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    images = docker("images", "--format", "{{.Repository}}:{{.Tag}}", IMAGE).split()
    if not images:
        pytest.skip(f"there is no {IMAGE}: `clusterkit deploy` on a machine with runtime container builds it")
    # Below pytest's folders another user could not reach the token.
    with tempfile.TemporaryDirectory(prefix="ckt-slot-") as folder:
        os.chmod(folder, 0o755)
        head = Head(images[0], Path(folder))
        try:
            deadline = time.monotonic() + 120
            while head.ask("a", code=None, pool="ready").get("slot") is None:
                assert time.monotonic() < deadline, docker("logs", head.name)
            yield head
        finally:
            docker("rm", "--force", head.name)


def test_one_place_is_for_one_host(head: Head) -> None:
    assert head.ask("a")["slot"] == 0
    refused = head.ask("bb")
    assert (refused["slot"], refused["holders"]) == (None, ["a"])
    assert refused["reason"] == "no place is free: 1 may be out of the pool gpus, and a is"
    assert head.ask("a")["slot"] == 0, "it keeps the place that it has"
    assert head.ask("bb", pool="others")["slot"] == 0, "another pool has places of its own"
    assert head.ask("bb", max_out=0, pool="none")["slot"] is None


def test_of_many_at_the_same_moment_two_get_two_places(head: Head) -> None:
    hosts = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(lambda host: head.ask(host, pool="many", max_out=2), hosts))
    assert sorted(answer["slot"] for answer in answers if answer["slot"] is not None) == [0, 1]


def test_a_place_is_free_again_when_its_host_is_back_in_ray(head: Head) -> None:
    back = {"pool": "back", "node_ip": head.ip}
    assert head.ask("a", **back)["slot"] == 0
    assert head.ask("bb", pool="back")["slot"] is None, "it may be on its way out: it drains, and is alive meanwhile"
    head.age("back", 0, 3600)
    assert head.ask("bb", pool="back")["slot"] == 0
    assert head.ask("a", **back)["slot"] is None
    head.age("back", 0, 3600)
    assert head.ask("a", **back)["slot"] is None, "bb is not in Ray, however long ago it left"


def test_the_place_of_a_host_that_left_the_pool_is_free(head: Head) -> None:
    assert head.ask("a", pool="left")["slot"] == 0
    assert head.ask("bb", pool="left", members=["bb"])["slot"] == 0


def test_no_gcs_and_a_wrong_token_are_said(head: Head) -> None:
    answer = head.ask("a", code=1, env=("--env", "RAY_AUTH_TOKEN_PATH=/etc/hostname"))
    assert answer["slot"] is None
    assert "InvalidAuthToken" in answer["reason"]
    answer = head.ask("a", code=1, address="127.0.0.1:1")
    assert answer["reason"].startswith("no answer from the head's GCS: ")
    assert "address is missing" in head.ask("a", code=2, address=None)["reason"]


@pytest.mark.skipif(os.geteuid() != 0, reason="asks dockerd and becomes the node's user, as the timer does")
def test_the_timer_asks_from_a_container_of_its_own(head: Head) -> None:
    tool = load_script(FILES / "gpu-health")
    slot = {
        "runtime": "container",
        "image": head.image,
        "program": str(FILES / "pool-slot"),
        "token_file": str(head.token),
        "user": USER,
    }
    config = {"head_address": f"{head.ip}:6379", "pool": "timer", "pool_hosts": ["w1", "w2"], "max_out": 1}
    first = {**config, "slot": slot, "host": "w1", "node_ip": "10.9.9.1"}
    second = {**first, "host": "w2", "node_ip": "10.9.9.2"}
    assert tool.take_slot(first, tool.run) == (True, None)
    taken, why = tool.take_slot(second, tool.run)
    assert taken is False
    assert why == "no place is free: 1 may be out of the pool timer, and w1 is"
    taken, why = tool.take_slot({**second, "slot": {**slot, "user": "no-such-user"}}, tool.run)
    assert taken is False
    assert "no-such-user" in why
