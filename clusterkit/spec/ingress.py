"""How requests reach replicas: Serve's own proxy, or HAProxy with or without direct streaming.

HAProxy is switched on by the environment of every `ray start`, and takes everything else from there too (ray 2.60.0,
serve/_private/constants.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from packaging.version import InvalidVersion, Version

from clusterkit.spec.facts import ClusterFacts
from clusterkit.spec.findings import Finding
from clusterkit.spec.raw import RawValue
from clusterkit.spec.stacks import Stack, table
from serve_apps.template import parts

if TYPE_CHECKING:
    from clusterkit.spec.cluster import App

GRACE = "graceful_shutdown_timeout_s"
# The first Ray that was seen with it.
HAPROXY_RAY = "2.60.0"
EVERYWHERE = ("0.0.0.0", "::")
PORTS = ("grpc", "haproxy_stats", "haproxy_metrics", "fallback", "fallback_grpc", "replica_min", "replica_max")
# HAProxy is loaded anew whenever a replica comes or goes, and what it was before ends after so long, streams
# included; Ray's own 120 s would cut them. As long as HAProxy lets a client be silent.
HARD_STOP_S = 3600
# Below ray_temp: the launcher's scratch folder, private and gone with the node. Ray's own is /tmp/haproxy-serve, for
# whoever comes first, with a socket that everybody may command.
SCRATCH = "t/tmp"
# HAProxy binds `<folder>/<node id>/<name>.<pid>.tmp` before it renames it; AF_UNIX takes 107 bytes.
SOCKET = "s"
RAY_TEMP_LIMIT = 107 - len(f"/{SCRATCH}/{'f' * 56}/{SOCKET}.4194304.tmp")


def ray_ports(facts: ClusterFacts) -> dict[str, int]:
    """Those of every cluster. Apart from the others: Ray starts anew where they change."""
    return {name: port for name, port in facts.ports.model_dump().items() if name not in PORTS}


def ports(facts: ClusterFacts) -> dict[str, int]:
    """What the ingress takes beside them, if anything."""
    names: list[str] = []
    haproxy, grpc = facts.serve.ingress == "haproxy", bool(facts.serve.grpc_options.grpc_servicer_functions)
    if grpc:
        names += ["grpc"]
    if haproxy:
        names += ["haproxy_stats", "haproxy_metrics", "fallback", "replica_min", "replica_max"]
    if haproxy and grpc:
        names += ["fallback_grpc"]
    return {name: getattr(facts.ports, name) for name in names}


def environment(facts: ClusterFacts) -> dict[str, str]:
    """What every `ray start` of the cluster gets; nothing with Serve's own proxy."""
    if facts.serve.ingress == "proxy":
        return {}
    low, high = facts.ports.replica_min, facts.ports.replica_max
    middle = (low + high) // 2
    scratch = f"{facts.paths.ray_temp}/{SCRATCH}"
    given: dict[str, int | str] = {
        "RAY_SERVE_ENABLE_HA_PROXY": 1,
        "RAY_SERVE_HAPROXY_STATS_PORT": facts.ports.haproxy_stats,
        "RAY_SERVE_HAPROXY_METRICS_PORT": facts.ports.haproxy_metrics,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": facts.ports.fallback,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": facts.ports.fallback_grpc,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": low,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": middle,
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": middle + 1,
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": high,
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": max(HARD_STOP_S, int(facts.serve.request_timeout_s or 0)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{scratch}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{scratch}/{SOCKET}",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": scratch,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{scratch}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{scratch}/m",
    }
    if facts.serve.direct_streaming:
        given["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] = 1
    return {name: str(value) for name, value in given.items()}


def lacks(stack: Stack, since: str) -> bool:
    """Is the stack's Ray older than that?"""
    try:
        return Version(stack.ray) < Version(since)
    except InvalidVersion:
        return False  # reported with the stack


def rows_since(stack: Stack, since: str) -> str:
    """The rows for the same kind of GPU whose Ray is new enough, for a fix."""
    rows = [row.name for row in table().rows if row.accelerator == stack.accelerator and not lacks(row, since)]
    return f"a row whose Ray can: {', '.join(rows)}" if rows else f"Ray {since} or newer (clusterkit_ray_version)"


def findings(facts: ClusterFacts, stack: Stack | None, hosts: int, values: Mapping[str, RawValue]) -> Iterator[Finding]:
    """What the cluster's options of Serve need of everything else."""
    serve, place = facts.serve, values.get("serve", RawValue()).place
    if serve.ingress == "proxy":
        return
    if stack is not None and lacks(stack, HAPROXY_RAY):
        problem = f"Ray {stack.ray} of the row {stack.name!r} has no HAProxy; Ray {HAPROXY_RAY} has"
        fix = f"set ingress: proxy, or use {rows_since(stack, HAPROXY_RAY)}"
        yield Finding(place(("ingress",)), "clusterkit_serve.ingress", problem, fix)
    if hosts > 1 and serve.http_host not in EVERYWHERE:
        problem = f"is {serve.http_host}, and HAProxy of one host has to reach the replicas of another"
        fix = "set it to 0.0.0.0, and let a firewall stand before the hosts; or set ingress: proxy"
        yield Finding(place(("http_host",)), "clusterkit_serve.http_host", problem, fix)
    if len(facts.paths.ray_temp) > RAY_TEMP_LIMIT:
        problem = f"is {len(facts.paths.ray_temp)} characters long; HAProxy's sockets leave room for {RAY_TEMP_LIMIT}"
        where = values.get("paths", RawValue()).place(("ray_temp",))
        yield Finding(where, "clusterkit_paths.ray_temp", problem, "choose a shorter path, or set ingress: proxy")


def app_findings(
    facts: ClusterFacts, stack: Stack | None, apps: Sequence[tuple[int, App]], value: RawValue
) -> Iterator[Finding]:
    """What apps ask of Serve that this Ray, or these options of the cluster, do not give."""
    serve = facts.serve
    for index, app in apps:
        asked = app.parameters
        for need in app.template.ray_needs(asked):
            if stack is not None and lacks(stack, need.ray):
                problem = f"Ray {stack.ray} of the row {stack.name!r} cannot do that; Ray {need.ray} can"
                fix = f"take it out, or use {rows_since(stack, need.ray)}"
                yield _about(index, need.parameter, problem, fix, value)
        if serve.direct_streaming and app.template.direct_streaming:
            for name in sorted(asked.model_fields_set):
                if name.startswith("ingress_"):
                    problem = "with clusterkit_serve.direct_streaming the app has no ingress of its own"
                    yield _about(index, name, problem, "take it out", value)
            for name in app.template.needs_ingress(asked):
                problem = "needs an ingress of the app's own, and clusterkit_serve.direct_streaming leaves it none"
                yield _about(index, name, problem, "choose another, or set direct_streaming: false", value)
        for path, part in parts(asked):
            grace, longest = getattr(part, GRACE, None), serve.request_timeout_s
            # Where the inventory says nothing, it is rendered as long as it has to be.
            if GRACE in part.model_fields_set and grace is not None and longest is not None and grace < longest:
                problem = f"is {grace:g}, and a request may take {longest:g} s (clusterkit_serve.request_timeout_s)"
                fix = f"raise it to {longest:g}: a replica that is replaced would cut its longest requests"
                yield _about(index, (*path, GRACE), problem, fix, value)
        start = getattr(asked, "engine_start_timeout_s", None)
        if start is not None and start > serve.ready_timeout_s:
            problem = f"is {start:g}, and a rollout is given up after {serve.ready_timeout_s} s"
            fix = f"set clusterkit_serve.ready_timeout_s to more than {start:g}"
            yield _about(index, "engine_start_timeout_s", problem, fix, value)


def _about(index: int, parameter: str | tuple[str | int, ...], problem: str, fix: str, value: RawValue) -> Finding:
    words = parameter.split(".") if isinstance(parameter, str) else parameter
    path = tuple(int(word) if str(word).isdigit() else word for word in words)
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return Finding(
        value.place((index, "parameters", *path)), f"clusterkit_apps[{index}].parameters{name}", problem, fix
    )
