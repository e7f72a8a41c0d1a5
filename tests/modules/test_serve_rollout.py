"""module_utils/serve_rollout.py: whether nodes have room for more replicas, and what Serve is told then."""

from __future__ import annotations

from typing import Any

import pytest
from ansible.module_utils import serve_rollout as rollout

Json = dict[str, Any]


def node(name: str, labels: Json | None = None, state: str = "ALIVE", **resources: float) -> Json:
    return {"node_id": name, "state": state, "labels": labels or {}, "resources_total": resources}


def actor(name: str, on: str, group: str | None = None, **resources: float) -> Json:
    return {
        "name": name,
        "state": "ALIVE",
        "node_id": on,
        "placement_group_id": group,
        "required_resources": resources,
    }


def group(name: str, *bundles: tuple[str, Json], selector: Json | None = None) -> Json:
    held = [{"node_id": on, "unit_resources": res, "label_selector": selector or {}} for on, res in bundles]
    return {"placement_group_id": name, "state": "CREATED", "bundles": held}


def deployment(*names: str) -> Json:
    return {"replicas": [{"actor_name": name, "state": "RUNNING"} for name in names]}


def test_free_is_what_no_actor_and_no_group_holds() -> None:
    nodes = [node("a", CPU=8.0, GPU=8.0), node("b", CPU=4.0), node("c", state="DEAD", CPU=4.0)]
    inside = actor("r1", "a", "g1", CPU_group_g1=1.0)
    gone = {**actor("r3", "b", CPU=4.0), "state": "DEAD"}
    found = rollout.free(
        nodes, [group("g1", ("a", {"GPU": 2.0, "CPU": 1.0}))], [inside, actor("r2", "a", CPU=0.5), gone]
    )
    assert [(item["id"], item["free"]) for item in found] == [("a", {"CPU": 6.5, "GPU": 6.0}), ("b", {"CPU": 4.0})]


def rooms(nodes: list[Json], groups: list[Json], actors: list[Json], limit: int, *deployments: Json) -> int:
    free = rollout.free(nodes, groups, actors)
    found: int = rollout.rooms(free, [rollout.demand(item, groups, actors) for item in deployments], limit)
    return found


def test_all_deployments_of_an_app_need_room_at_once() -> None:
    nodes = [node("a", CPU=4.0, GPU=8.0)]
    groups = [group("g1", ("a", {"GPU": 4.0}))]
    actors = [actor("engine", "a", "g1"), actor("ingress", "a", CPU=2.0)]
    engine, ingress = deployment("engine"), deployment("ingress")
    assert rooms(nodes, groups, actors, 9, engine) == 1
    assert rooms(nodes, groups, actors, 9, ingress) == 1
    assert rooms(nodes, groups, [*actors, actor("other", "a", CPU=1.0)], 9, engine, ingress) == 0


def test_a_replica_of_one_host_is_not_spread_over_two() -> None:
    nodes = [node("a", GPU=8.0), node("b", GPU=2.0), node("c", GPU=2.0)]
    packed = [group("g1", *[("a", {"GPU": 1.0})] * 4), group("g2", *[("a", {"GPU": 1.0})] * 4)]
    assert rooms(nodes, packed, [actor("engine", "a", "g1")], 9, deployment("engine")) == 0
    # One that spans hosts today may do so again.
    across = [group("g1", ("a", {"GPU": 2.0}), ("b", {"GPU": 2.0})), group("g2", ("a", {"GPU": 4.0}))]
    assert rooms(nodes, across, [actor("engine", "a", "g1")], 9, deployment("engine")) == 1


def test_labels_count() -> None:
    nodes = [node("a", {"pool": "fast"}, GPU=1.0), node("b", {"pool": "slow"}, GPU=1.0)]
    taken = [group("g1", ("a", {"GPU": 1.0}), selector={"pool": "fast"})]
    assert rooms(nodes, taken, [actor("engine", "a", "g1")], 9, deployment("engine")) == 0


@pytest.mark.parametrize(
    ("pools", "grows"),
    [
        ({}, False),
        ({"a": 1, "b": 4}, False),
        ({"a": 2}, True),
        ({"a": 2, "b": 2}, True),
    ],
)
def test_a_pool_grows_for_the_replicas_that_lie_in_it(pools: dict[str, int], grows: bool) -> None:
    nodes = [node("n1", {"ray.io/node-group": "a"}, GPU=1.0), node("n2", {"ray.io/node-group": "b"}, GPU=1.0, CPU=1.0)]
    actors = [actor("one", "n1", GPU=1.0), actor("two", "n2", GPU=1.0), actor("light", "n2", CPU=0.5)]
    demands = [rollout.demand(deployment(name), [], actors) for name in ("one", "light")]
    assert rollout.can_grow(rollout.free(nodes, [], actors), demands, pools) is grows


def test_every_deployment_and_every_host_of_a_replica_needs_its_own_new_node() -> None:
    nodes = [node(name, {"ray.io/node-group": "a"}, GPU=1.0) for name in ("n1", "n2")]
    across = [group("g1", ("n1", {"GPU": 1.0}), ("n2", {"GPU": 1.0}))]
    actors = [actor("engine", "n1", "g1")]
    free, demand = rollout.free(nodes, across, actors), rollout.demand(deployment("engine"), across, actors)
    grown = [rollout.can_grow(free, [demand] * count, {"a": most}) for count, most in [(1, 3), (1, 4), (2, 5), (2, 6)]]
    assert grown == [False, True, False, True]


def test_what_cannot_be_looked_at_is_not_guessed() -> None:
    assert rollout.demand(deployment("new"), [], []) is None


@pytest.mark.parametrize(
    ("wish", "room", "alive", "how"),
    [
        ("auto", 2, True, "surge"),
        ("auto", 0, True, "in_place"),
        ("auto", None, True, "in_place"),
        ("surge", 0, True, "surge"),
        ("one_at_a_time", 5, True, "one_at_a_time"),
        ("surge", 2, False, "in_place"),
    ],
)
def test_how_replicas_are_replaced(wish: str, room: int | None, alive: bool, how: str) -> None:
    assert rollout.choose(wish, room, alive) == how


@pytest.mark.parametrize("target", [1, 2, 3, 7, 10, 40, 99])
@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_surge_fits_the_room(target: int, room: int) -> None:
    percent = rollout.knobs("surge", room, target)["max_surge_percent"]
    # As Serve 2.60 counts, in _surge_replicas_to_start.
    more = (percent * target + 99) // 100
    assert 1 <= more <= room
    assert more <= max(1, -(-target // 4))


@pytest.mark.parametrize(
    ("how", "targets", "missing"),
    [
        ("surge", {"a": 1}, ""),
        ("in_place", {"a": 1}, "a has none, its only replica"),
        ("in_place", {"a": 10, "b": 0}, "a has 8 of 10 replicas"),
        ("one_at_a_time", {"a": 10}, "a has 9 of 10 replicas"),
    ],
)
def test_what_is_missing_meanwhile(how: str, targets: dict[str, int], missing: str) -> None:
    assert rollout.missing(how, targets) == missing
