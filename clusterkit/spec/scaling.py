"""How many replicas an app gets where Serve does not decide it by requests alone: policies, and a scaler outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel

from clusterkit.spec.facts import AppFacts, PoolFacts
from clusterkit.spec.findings import Finding, did_you_mean
from clusterkit.spec.ingress import lacks, rows_since
from clusterkit.spec.raw import Path, RawValue
from clusterkit.spec.stacks import Stack
from serve_apps import template as templates
from serve_apps.template import Template, model_arguments, parts

if TYPE_CHECKING:
    from clusterkit.spec.cluster import App, Pool

# The kit's policies: one module that every app takes along that has one of them.
CODE = templates.AppCode(folder=templates.__file__.rpartition("/")[0] + "/policy/code", module="clusterkit_policies")
# Of its Serve, all that stands here was seen to run.
RAY = "2.60.0"


def policies(parameters: BaseModel) -> list[tuple[Path, BaseModel]]:
    """The blocks `scaling_policy` of an app, each with its path in the parameters."""
    found = [((*path, "scaling_policy"), getattr(part, "scaling_policy", None)) for path, part in parts(parameters)]
    return [(path, block) for path, block in found if block is not None]


def takes_policies(facts: AppFacts, parameters: BaseModel) -> bool:
    """Does the app need the kit's policies?"""
    return bool(policies(parameters)) or (facts.scaling is not None and facts.scaling.ratio is not None)


def bounds(template: Template, parameters: BaseModel, pool: PoolFacts) -> dict[str, tuple[int, int] | None]:
    """Between which numbers each deployment scales, by Serve's name for it; None where it does not, or where only the
    code says. Of deployments that the inventory does not name, nothing is known."""
    entry = template.render(
        name="",
        route_prefix="/",
        parameters=parameters,
        accelerator=pool.accelerator,
        cache_path=None,
        **model_arguments(dict.fromkeys(template.model_sources(parameters), "")),
        **({"gpu_memory_gib": pool.gpu_memory_gib} if template.gpu_memory else {}),
        **({"code_uri": ""} if template.code(parameters) else {}),
    )
    return {item["name"]: _bounds(item.get("autoscaling_config")) for item in entry["deployments"]}


def _bounds(scaling: Mapping[str, int] | None) -> tuple[int, int] | None:
    # Serve's config has no number below 1.
    return (max(1, scaling["min_replicas"]), scaling["max_replicas"]) if scaling else None


def findings(
    stack: Stack | None, apps: Sequence[tuple[int, App]], pools: Mapping[str, Pool], value: RawValue
) -> Iterator[Finding]:
    """What does not go together, and what the stack's Ray cannot do."""
    for index, app in apps:
        facts, own = app.facts, policies(app.parameters)
        asked: list[Path] = [("external_scaler",)] if facts.external_scaler else []
        asked += [("scaling",)] if facts.scaling else []
        if not asked:
            continue
        if stack is not None and lacks(stack, RAY):
            problem = f"Ray {stack.ray} of the row {stack.name!r} cannot do that; Ray {RAY} can"
            fix = f"take it out, or use {rows_since(stack, RAY)}"
            yield from (_about(index, path, problem, fix, value) for path in asked)
            continue
        if facts.external_scaler:
            yield from _external(index, app, own, value)
        elif facts.scaling is not None and facts.scaling.ratio is not None:
            known = bounds(app.template, app.parameters, pools[app.pool].facts)
            yield from _ratio(index, facts.scaling.ratio, known, value)
        else:
            yield from _own_policy(index, app, own, value)


def _external(index: int, app: App, own: Sequence[tuple[Path, BaseModel]], value: RawValue) -> Iterator[Finding]:
    outside = "the number comes from outside (external_scaler)"
    if app.facts.scaling is not None:
        yield _about(index, ("scaling",), outside, "take one of them out", value)
    for path, _ in own:
        yield _about(index, ("parameters", *path), outside, "take one of them out", value)
    for path, part in parts(app.parameters):
        if getattr(part, "num_replicas", None) is not None:
            fix = "give min_replicas and max_replicas, between which `clusterkit app scale` sets it"
            yield _about(index, ("parameters", *path, "num_replicas"), outside, fix, value)


def _ratio(
    index: int, ratio: Mapping[str, float], known: Mapping[str, tuple[int, int] | None], value: RawValue
) -> Iterator[Finding]:
    for name in ratio:
        path: Path = ("scaling", "ratio", name)
        if name not in known:
            named = ", ".join(known) or "those that parameters.deployments names"
            fix = did_you_mean(name, tuple(known)) or f"one of {named}"
            yield _about(index, path, f"the app has no deployment {name!r} that the inventory knows of", fix, value)
        elif known[name] is None:
            fix = "give it min_replicas and max_replicas"
            yield _about(index, path, f"{name} does not scale, and so keeps no ratio", fix, value)


def _own_policy(index: int, app: App, own: Sequence[tuple[Path, BaseModel]], value: RawValue) -> Iterator[Finding]:
    code = app.template.code(app.parameters)
    if code is None or not code.folder:
        problem = f"Serve would import it with the app's own code, and the template {app.template.name} has none"
        fix = "use scaling_policy in the parameters, or the template custom"
        yield _about(index, ("scaling", "policy_function"), problem, fix, value)
    for path, _ in own:
        problem = "the app's own policy_function decides for all of its deployments"
        yield _about(index, ("parameters", *path), problem, "take one of them out", value)


def _about(index: int, path: Path, problem: str, fix: str, value: RawValue) -> Finding:
    subject = f"clusterkit_apps[{index}]" + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in path
    )
    return Finding(value.place((index, *path)), subject, problem, fix)
