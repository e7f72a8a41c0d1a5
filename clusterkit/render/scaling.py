"""An app's entry of the Serve config, with what decides on its numbers of replicas: pure data in, data out."""

from __future__ import annotations

from typing import Any

from clusterkit.spec.facts import AppFacts


def scaled(entry: dict[str, Any], facts: AppFacts, policies_uri: str | None) -> dict[str, Any]:
    """`entry` as its template gives it, where policies stand with the deployments. There Serve would import them in
    its dashboard and its controller, which have no code of apps. One of the whole app is built where the app is
    (ray 2.60.0, serve/schema.py and serve/_private/application_state.py), so all of them become that."""
    if facts.external_scaler:
        return {
            **entry,
            "deployments": [_external(item) for item in entry["deployments"]],
            "external_scaler_enabled": True,
        }
    deployments, found = [], {}
    for item in entry["deployments"]:
        scaling = item.get("autoscaling_config") or {}
        if "policy" in scaling:
            found[item["name"]] = scaling["policy"]["policy_kwargs"]
            item = {**item, "autoscaling_config": {key: scaling[key] for key in scaling if key != "policy"}}
        deployments.append(item)
    given = facts.scaling
    if given is not None and given.policy_function is not None:
        policy = {"policy_function": given.policy_function, "policy_kwargs": given.policy_kwargs}
        return {**entry, "autoscaling_policy": policy}
    ratio = given.ratio if given is not None else None
    if not found and not ratio:
        return entry
    kwargs = {name: said for name, said in (("deployments", found), ("ratio", ratio)) if said}
    # Beside the app's own code, for whoever builds the app.
    runtime_env = {**entry["runtime_env"], "py_modules": [policies_uri] if policies_uri else []}
    policy = {"policy_function": "clusterkit_policies:Policies", "policy_kwargs": kwargs}
    return {**entry, "deployments": deployments, "runtime_env": runtime_env, "autoscaling_policy": policy}


def _external(item: dict[str, Any]) -> dict[str, Any]:
    """The number is for the first start: from then on it stays as it is (ray_serve_config)."""
    scaling = item.get("autoscaling_config")
    if not scaling:
        return item
    first = scaling.get("initial_replicas", scaling["min_replicas"])
    # Null, and not left out: what the code says of scaling would stay in force.
    return {**item, "autoscaling_config": None, "num_replicas": max(1, first)}
