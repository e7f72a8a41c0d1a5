"""How the replicas of apps are replaced: new ones first where the nodes have room for them, else old ones first.

Ray 2.60 stops old replicas before it starts new ones, unless `max_surge_percent` says how many more there may be
(serve/_private/deployment_state.py, _surge_replicas_to_start). A surge without room waits, and the old ones serve on.
"""

from __future__ import annotations

import re

AUTO, SURGE, IN_PLACE, ONE = "auto", "surge", "in_place", "one_at_a_time"
CHOICES = (AUTO, SURGE, IN_PLACE, ONE)
# Serve's own share of replicas that it replaces at a time.
BATCH = 0.2
# Below one replica of any deployment: Serve takes at least one.
SMALLEST = 0.001
# Actors and placement groups that hold nothing.
GONE = ("DEAD", "REMOVED")
ALMOST = 1e-6
# Ray puts the pool of a node that its autoscaler asked for there: ray/_private/node.py.
POOL = "ray.io/node-group"


def free(nodes, groups, actors):
    """[{id, labels, free: {resource: amount}}] of the nodes that are alive: what no actor and no group has.

    All three as Ray's state API lists them with `detail`: resources_total, bundles, required_resources.
    """
    found = {}
    for node in nodes:
        if node.get("state") == "ALIVE":
            found[node["node_id"]] = dict(node.get("resources_total") or {})
    held = [
        (bundle.get("node_id"), bundle.get("unit_resources") or {})
        for group in groups
        if group.get("state") not in GONE
        for bundle in group.get("bundles") or []
    ]
    # What runs inside a group holds what the group holds.
    held += [
        (actor.get("node_id"), actor.get("required_resources") or {})
        for actor in actors
        if actor.get("state") not in GONE and not actor.get("placement_group_id")
    ]
    for node_id, resources in held:
        for name, amount in resources.items():
            if name in found.get(node_id, {}):
                found[node_id][name] -= float(amount)
    labels = {node["node_id"]: node.get("labels") or {} for node in nodes}
    return [{"id": node_id, "labels": labels[node_id], "free": left} for node_id, left in sorted(found.items())]


def demand(deployment, groups, actors):
    """What one replica of it holds: {bundles: [({resource: amount}, label_selector)], hosts, node}; None where there
    is no replica to look at. hosts: on how many it lies; node: the id of the first.

    deployment: as in the answer of GET.
    """
    by_name = {actor.get("name"): actor for actor in actors}
    by_id = {group.get("placement_group_id"): group for group in groups}
    for replica in deployment.get("replicas", []):
        actor = by_name.get(replica.get("actor_name"))
        if actor is None:
            continue
        group = by_id.get(actor.get("placement_group_id"))
        if group is not None:
            bundles = group.get("bundles") or []
            held = [(bundle.get("unit_resources") or {}, bundle.get("label_selector") or {}) for bundle in bundles]
            on = [bundle.get("node_id") for bundle in bundles]
            return {"bundles": held, "hosts": len(set(on)), "node": on[0] if on else actor.get("node_id")}
        held = [(actor.get("required_resources") or {}, actor.get("label_selector") or {})]
        return {"bundles": held, "hosts": 1, "node": actor.get("node_id")}
    return None


def suits(node, selector):
    """Has the node these labels? A selector that is no plain value counts as suited."""
    plain = {key: value for key, value in selector.items() if re.fullmatch(r"[\w./-]+", str(value))}
    return all(node["labels"].get(key) == value for key, value in plain.items())


def holds(node, resources):
    return all(node["free"].get(name, 0) + ALMOST >= float(amount) for name, amount in resources.items())


def take(node, resources):
    for name, amount in resources.items():
        node["free"][name] = node["free"].get(name, 0) - float(amount)


def place(nodes, replica):
    """The nodes with one more such replica on them, or None where it has no place."""
    trial = [dict(node, free=dict(node["free"])) for node in nodes]
    parts = replica["bundles"]
    if replica["hosts"] < 2:
        total, selector = {}, {}
        for resources, wanted in parts:
            selector.update(wanted)
            for name, amount in resources.items():
                total[name] = total.get(name, 0) + float(amount)
        parts = [(total, selector)]
    for resources, selector in parts:
        node = next((node for node in trial if holds(node, resources) and suits(node, selector)), None)
        if node is None:
            return None
        take(node, resources)
    return trial


def rooms(nodes, demands, limit):
    """How many more replicas of every deployment the nodes hold at once, at most `limit`.

    demands: as `demand` gives them, one for each deployment.
    """
    found = 0
    while found < limit:
        for replica in demands:
            nodes = place(nodes, replica)
            if nodes is None:
                return found
        found += 1
    return found


def can_grow(nodes, demands, pools):
    """Have all deployments a place for one more replica, where pools may still get nodes?

    pools: {pool: how many nodes it may have}. A new node counts where it comes to the pool in which the deployment's
    replica lies today, one for each host of the replica.
    """
    groups = [node["labels"].get(POOL) for node in nodes]
    left = {pool: number - groups.count(pool) for pool, number in pools.items()}
    pool_of = {node["id"]: node["labels"].get(POOL) for node in nodes}
    for replica in demands:
        placed = place(nodes, replica)
        if placed is not None:
            nodes = placed
            continue
        pool = pool_of.get(replica["node"])
        if left.get(pool, 0) < replica["hosts"]:
            return False
        left[pool] -= replica["hosts"]
    return True


def most(targets):
    """Replicas of a deployment that are to be replaced at a time: a quarter, at least one."""
    return max([1] + [-(-target // 4) for target in targets])


def knobs(how, room, target):
    """What a deployment of `target` replicas is to be told, for Serve to replace them so."""
    if how == SURGE:
        more = min(max(room or 1, 1), most([target]))
        return {"max_surge_percent": max(1, 100 * more // max(target, 1))}
    if how == ONE:
        return {"max_surge_percent": 0, "rolling_update_percentage": SMALLEST}
    return {}


def choose(wish, room, alive):
    """How it is done: room is how many more replicas have a place (None: nobody could say), alive whether any
    replica runs that could be missed."""
    if not alive:
        return IN_PLACE
    if wish == AUTO:
        return SURGE if room else IN_PLACE
    return wish


def missing(how, targets):
    """In words, what is not there meanwhile. targets: {deployment: replicas}, of those that are replaced."""
    if how == SURGE:
        return ""
    words = []
    for name, target in sorted(targets.items()):
        batch = 1 if how == ONE else max(int(BATCH * target), 1)
        if target == 1:
            words.append("%s has none, its only replica" % name)
        elif target > 1:
            words.append("%s has %d of %d replicas" % (name, target - batch, target))
    return ", ".join(words)
