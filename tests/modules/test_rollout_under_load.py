"""Changes of a running app under a constant load, with a real Ray: what is lost, what is kept, what comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.modules.serve_cluster import Cluster, Told

pytestmark = pytest.mark.slow
RATE = 40.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(tmp_path_factory.mktemp("serve"))
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def report(capsys: pytest.CaptureFixture[str], name: str, told: Told) -> None:
    with capsys.disabled():
        print(f"\n{name}: {told}")


def test_no_request_is_lost_while_an_app_changes(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    first = cluster.apply(cluster.config())
    assert not first.get("failed"), first["msg"]
    began = time.monotonic()
    with cluster.load(RATE) as seen:
        time.sleep(2)
        before = cluster.pids()
        scaled = cluster.apply(cluster.config(num_replicas=3))
        assert not scaled.get("failed"), scaled["msg"]
        assert scaled["rollouts"] == []
        assert before < cluster.pids()

        kept = cluster.pids()
        settings = cluster.apply(cluster.config(num_replicas=3, more="y"))
        assert not settings.get("failed"), settings["msg"]
        assert cluster.pids() == kept

        arguments = cluster.apply(cluster.config(num_replicas=3, more="y", word="b"))
        assert not arguments.get("failed"), arguments["msg"]
        (rollout,) = arguments["rollouts"]
        assert (rollout["how"], rollout["missing"], rollout["deployments"]) == ("surge", "", {"Answer": 3})
        assert not cluster.pids() & kept

        code = cluster.apply(cluster.config("v2", num_replicas=3, more="y", word="b"))
        assert not code.get("failed"), code["msg"]

        good = cluster.pids()
        broken = cluster.apply(cluster.config("v2", num_replicas=3, more="y", word="b", fail=True))
        assert broken["failed"]
        assert "RuntimeError: no weights in /nowhere" in broken["msg"]
        assert "The config that ran before (number 5 of" in broken["msg"]
        assert broken["applications"]["answer"]["status"] == "RUNNING"
        # The old replicas were never stopped.
        assert cluster.pids() == good
        time.sleep(max(0.0, 5200 / RATE - (time.monotonic() - began)))
    (told,) = seen
    report(capsys, "rollouts with room", told)
    assert told.sent + told.streams >= 5000
    assert {"v1 a x", "v1 a y", "v1 b y", "v2 b y"} <= set(told.words)
    assert (told.failed, told.cut) == (0, 0), told
    again = cluster.apply(cluster.config("v2", num_replicas=3, more="y", word="b"))
    assert again["changed"] is False
    outcomes = [(entry["outcome"], entry["restored"]) for entry in again["history"]]
    assert outcomes == [("good", None)] * 5 + [("failed", 5)]
    assert again["runs"] == 5


def test_without_the_graceful_settings_streams_are_cut(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """What the first test would have seen without them."""
    rough: dict[str, Any] = {"graceful_shutdown_timeout_s": 0, "graceful_shutdown_wait_loop_s": 0.01}
    started = cluster.apply(cluster.config("v2", word="c", **rough))
    assert not started.get("failed"), started["msg"]
    with cluster.load(RATE) as seen:
        time.sleep(5)
        changed = cluster.apply(cluster.config("v2", word="d", **rough), rollout="in_place")
        assert not changed.get("failed"), changed["msg"]
        time.sleep(2)
    (told,) = seen
    report(capsys, "rollout without them", told)
    assert told.cut > 0


def test_the_only_replica_without_room_is_told_and_waited_for(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    big: dict[str, Any] = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 3}}
    started = cluster.apply(cluster.config("v2", word="e", **big), rollout="in_place")
    assert not started.get("failed"), started["msg"]
    wanted = cluster.config("v2", word="f", **big)
    planned = cluster.apply(wanted, check=True)
    (rollout,) = planned["rollouts"]
    assert (rollout["how"], rollout["room"]) == ("in_place", 0)
    assert "there is no room for new ones beside them" in planned["changes"][0]["note"]
    assert "Answer has none, its only replica" in planned["changes"][0]["note"]
    with cluster.load(5) as seen:
        time.sleep(2)
        done = cluster.apply(wanted)
        assert not done.get("failed"), done["msg"]
        time.sleep(2)
    (told,) = seen
    report(capsys, "no room", told)
    # Serve lets requests wait for the new replica.
    assert told.failed == 0, told
    assert told.slowest_s > 2

    # A surge waits for room that does not come: after the time it is taken back, and nothing was lost.
    old = cluster.pids()
    stuck = cluster.apply(cluster.config("v2", word="g", **big), rollout="surge", wait_timeout_s=25)
    assert stuck["failed"]
    assert "not ready after 25 s" in stuck["msg"]
    assert "was put back, and runs" in stuck["msg"]
    assert cluster.pids() == old


def test_one_replica_at_a_time(cluster: Cluster) -> None:
    started = cluster.apply(cluster.config("v2", word="k", num_replicas=3))
    assert not started.get("failed"), started["msg"]
    seen: list[int] = []
    over = threading.Event()

    def count() -> None:
        while not over.wait(0.2):
            if there := len(cluster.pids()):
                seen.append(there)

    watcher = threading.Thread(target=count)
    watcher.start()
    try:
        changed = cluster.apply(cluster.config("v2", word="l", num_replicas=3), rollout="one_at_a_time")
    finally:
        over.set()
        watcher.join()
    assert not changed.get("failed"), changed["msg"]
    assert changed["rollouts"][0]["missing"] == "Answer has 2 of 3 replicas"
    assert min(seen) == 2


def test_going_back_to_an_earlier_config(cluster: Cluster) -> None:
    cluster.apply(cluster.config("v2", word="h"))
    latest = cluster.apply(cluster.config("v2", word="i"))
    number = latest["runs"]
    back = cluster.apply(state="restored")
    assert not back.get("failed"), back["msg"]
    assert (back["changed"], back["number"]) == (True, number - 1)
    # The next one is the other again: the newest that ran and is not what runs.
    assert cluster.apply(state="restored", check=True)["number"] == number
    missing = cluster.apply(state="restored", number=9999)
    assert missing["failed"]
    assert "the history has no config 9999: those that ran are" in missing["msg"]


def test_options_that_are_fixed_restart_serve_by_consent(cluster: Cluster) -> None:
    wanted = cluster.config("v2", word="m")
    assert not cluster.apply(wanted).get("failed")
    kept = cluster.pids()
    wanted["http_options"]["keep_alive_timeout_s"] = 7
    refused = cluster.apply(wanted)
    assert refused["failed"]
    assert "http_options.keep_alive_timeout_s is 90, declared is 7" in refused["msg"]
    assert cluster.pids() == kept
    done = cluster.apply(wanted, restart_serve=True)
    assert not done.get("failed"), done["msg"]
    assert done["changed"] is True
    assert not cluster.pids() & kept
    assert cluster.apply(wanted)["changed"] is False
