"""Runs that are killed, cut or starved: the same command again converges, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import run
from tests.lab.conftest import ENVIRONMENT, Cluster, Maker, clusterkit

pytestmark = [pytest.mark.docker, pytest.mark.engine, pytest.mark.slow]

# 1: at each task, as `make test-slow` does; 10 shows the same in a fifth of the time.
STEP = int(os.environ.get("CLUSTERKIT_TEST_KILL_STEP", "1"))
ROLES = {"preflight", "baseline", "container_engine", "vllm_image", "model_store", "ray_node", "serve_apps"}
KILL_AT = [sys.executable, "-m", "tests.lab.kill_at"]


@pytest.fixture(scope="module")
def bare(lab_of: Maker) -> Cluster:
    """A head and a worker, bare."""
    return lab_of("killtest", "--workers", "1")


def started(cluster: Cluster, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "clusterkit", "deploy", "-i", str(cluster.inventory), *words]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@contextmanager
def when(condition: Callable[[], bool], action: Callable[[], object], seconds: float = 300) -> Iterator[list[bool]]:
    """Do something to a host as soon as the run has come to a certain point on it."""
    done: list[bool] = []
    over = threading.Event()

    def watch() -> None:
        deadline = time.monotonic() + seconds
        while not over.is_set() and time.monotonic() < deadline:
            if condition():
                action()
                done.append(True)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def runs(cluster: Cluster, host: str, pattern: str) -> bool:
    """Does the host have a process like this? The bracket keeps the question itself out of the answer."""
    return cluster.on(host, f"pgrep -f '[{pattern[0]}]{pattern[1:]}' >/dev/null && echo yes", check=False) == "yes"


def test_a_deploy_killed_at_each_task_ends_where_an_undisturbed_one_does(bare: Cluster) -> None:
    """From bare Debian on. Each run is killed one task further than the last; so every task is once the last one
    that a killed run began, on hosts that killed runs have left behind."""
    killed = []
    for number in range(1, 500, STEP):
        done = run([*KILL_AT, str(bare.inventory), str(number)], env=ENVIRONMENT)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, f"after {killed[-1:]}: {done.stdout[-600:]}{done.stderr[-2000:]}"
        killed.append(done.stdout.splitlines()[-1])
    else:
        raise AssertionError("the run never came to its end")
    assert len(killed) >= 10
    roles = {line.partition(":")[0] for line in killed}
    assert STEP > 1 or roles >= ROLES
    assert bare.deploy() == {}, "the run that was not killed left nothing to do"
    verified = clusterkit("verify", "-i", str(bare.inventory))
    assert verified.returncode == 0, verified.stdout


def test_apts_lock_is_waited_for(bare: Cluster) -> None:
    bare.on("worker1", "dpkg --remove --force-depends libnuma1")
    # dpkg's lock is fcntl's: flock(1) would hold another one.
    hold = "import fcntl, signal; f = open('/var/lib/dpkg/lock-frontend', 'w'); fcntl.lockf(f, 2); signal.pause()"
    bare.on("worker1", f'systemd-run --unit=holdlock /usr/bin/python3 -c "{hold}"')
    with when(lambda: runs(bare, "worker1", "apt-get"), lambda: bare.on("worker1", "systemctl stop holdlock")) as freed:
        changed = bare.deploy("--tags", "baseline")
    assert freed, "the lock was held until apt asked for it"
    assert changed == {"worker1": 1}
    assert "ok installed" in bare.on("worker1", "dpkg-query -W -f '${Status}' libnuma1")


def test_a_full_disk_is_named_and_nothing_is_half_done(bare: Cluster) -> None:
    bare.on("worker1", "mount -t tmpfs -o size=64k tmpfs /opt/clusterkit/bin")
    bare.on("worker1", "dd if=/dev/zero of=/opt/clusterkit/bin/full bs=1k count=64", check=False)
    try:
        failed = clusterkit("deploy", "-i", str(bare.inventory), "--limit", "worker1", "--tags", "host_agent")
        assert failed.returncode == 1
        assert "No space left on device" in failed.stderr
    finally:
        bare.on("worker1", "umount /opt/clusterkit/bin")
    assert bare.deploy() == {}


def test_ssh_that_is_cut_in_a_task_stops_that_host_alone(bare: Cluster) -> None:
    """The link goes down while the image is on its way to the worker. It comes back; so does the run."""
    bare.on("worker1", "/opt/clusterkit/bin/host-agent stop; docker image rm -f $(docker images -q clusterkit/vllm*)")

    gateway = bare.on("worker1", "ip route show default").split()[2]

    def cut() -> None:
        # From beside, not through the link that goes down.
        bare.on("worker1", "ip link set eth0 down")

    loading = "ls /home/ops/.clusterkit-incoming/*.tar >/dev/null 2>&1 && echo yes"
    with when(lambda: bare.on("worker1", loading, check=False) == "yes", cut) as was_cut:
        done = clusterkit("deploy", "-i", str(bare.inventory))
    assert was_cut
    assert done.returncode == 1
    table = {line.split()[0]: line for line in done.stderr.splitlines() if line.startswith(("head ", "worker1 "))}
    assert "unreachable" in table["worker1"]
    bare.on("worker1", f"ip link set eth0 up && ip route replace default via {gateway}")
    restored = clusterkit("lab", "up", "--workers", "1", "--name", bare.name, "--inventory", str(bare.inventory))
    assert restored.returncode == 0, restored.stderr
    assert bare.deploy(), "the worker is brought back"
    assert bare.deploy() == {}
    assert bare.on("worker1", "ls -d /home/ops/.clusterkit-incoming 2>/dev/null || echo none") == "none", (
        "what the cut run had brought is gone"
    )


def test_a_host_that_reboots_under_the_run_is_finished_by_the_next(bare: Cluster) -> None:
    bare.on("worker1", "/opt/clusterkit/bin/host-agent stop")
    begun = started(bare)
    # `docker run` on the worker: Ray is being started there.
    with when(lambda: runs(bare, "worker1", "ray-node --config"), lambda: bare.container("worker1").kill()) as killed:
        output, _ = begun.communicate(timeout=600)
    assert killed
    assert begun.returncode == 1, output
    up = clusterkit("lab", "up", "--workers", "1", "--name", bare.name, "--inventory", str(bare.inventory))
    assert up.returncode == 0, up.stderr
    assert bare.deploy(), "the worker is started"
    assert bare.deploy() == {}


def test_one_unreachable_host_does_not_stop_the_others(cluster: Cluster) -> None:
    cluster.container("worker2").stop(timeout=5)
    cluster.on("worker1", "rm /opt/clusterkit/bin/ray-python")
    try:
        done = clusterkit("deploy", "-i", str(cluster.inventory))
        assert done.returncode == 1
        table = {line.split()[0]: line.split() for line in done.stderr.splitlines() if line[:6] in ("head  ", "worker")}
        assert table["worker2"][1] == "unreachable"
        assert table["worker1"][1:3] == ["done", "1"]
        assert cluster.on("worker1", "test -x /opt/clusterkit/bin/ray-python && echo there") == "there"
        as_json = clusterkit("deploy", "-i", str(cluster.inventory), "--json")
        said = json.loads(as_json.stdout)
        assert (as_json.returncode, said["failures"][0]["host"], said["failures"][0]["kind"]) == (
            1,
            "worker2",
            "unreachable",
        )
    finally:
        up = clusterkit("lab", "up", "--workers", "2", "--name", cluster.name, "--inventory", str(cluster.inventory))
        assert up.returncode == 0, up.stderr
    assert "worker2" in cluster.deploy()
    assert cluster.deploy() == {}
