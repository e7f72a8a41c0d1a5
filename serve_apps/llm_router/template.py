"""Turns the parameters of an `llm_router` app into one entry of Serve's `applications`."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from serve_apps.llm import template as llm
from serve_apps.llm_router.parameters import HEADER, Custom, LlmRouterParameters, Prefix, Session, Statistics
from serve_apps.template import AppCode, RayNeed, ReplicaDemand

PARAMETERS = LlmRouterParameters
OPENAI_API = True
DIRECT_STREAMING = True

INGRESS = "serve_apps.llm_router.app:OpenAiIngress"
MEASURED_SERVER = "serve_apps.llm_router.app:MeasuredServer"
# What an app without an ingress has instead of the kit's.
SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
# Where Ray's ingress reads which header names a session.
HEADER_VARIABLE = "RAY_SERVE_SESSION_ID_HEADER_KEY"
# Nobody reads it: another value replaces the replicas that have it.
EDITION_VARIABLE = "CLUSTERKIT_ROUTING"


def model_source(parameters: LlmRouterParameters) -> dict[str, Any]:
    """The weights, as `llm` has them."""
    return llm.model_source(parameters)


def code(parameters: LlmRouterParameters) -> AppCode | None:
    """The kit's routers; those of others lie on every node."""
    return None if isinstance(parameters.routing, Custom) else AppCode(template="llm_router")


def ray_needs(parameters: LlmRouterParameters) -> list[RayNeed]:
    """Older Rays know no sessions, and their prefix router was not seen to work here."""
    return [RayNeed("routing", "2.60.0"), *llm.ray_needs(parameters)]


def needs_ingress(parameters: LlmRouterParameters) -> list[str]:
    """Parameters that an app without an ingress of its own (direct streaming) does not obey."""
    if isinstance(parameters.routing, Prefix | Statistics):
        return ["routing.policy"]
    own = isinstance(parameters.routing, Session) and parameters.routing.header != HEADER
    return ["routing.header"] if own else []


def demand(parameters: LlmRouterParameters) -> ReplicaDemand:
    """What the app asks of a pool, as `llm` does."""
    return llm.demand(parameters)


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: LlmRouterParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    code_uri: str | None = None,
    direct_streaming: bool = False,
) -> dict[str, Any]:
    """One entry of `applications`: that of `llm`, with a router. What the kit's routers go by is `user_config` of the
    ingress, which makes them; an app without one has Ray's."""
    routing = parameters.routing
    if isinstance(routing, Statistics):
        parameters = parameters.model_copy(update={"server_class": MEASURED_SERVER})
    app = llm.render(
        name=name,
        route_prefix=route_prefix,
        parameters=parameters,
        accelerator=accelerator,
        model_path=model_path,
        cache_path=cache_path,
        code_uri=code_uri,
        direct_streaming=direct_streaming,
    )
    server, *ingresses = app["deployments"]
    if isinstance(routing, Statistics):
        server["request_router_config"] = {
            "request_routing_stats_period_s": routing.request_routing_stats_period_s,
        }
    if isinstance(routing, Custom) or (isinstance(routing, Session) and direct_streaming):
        _serves_own_way(app, request_router(routing))
        return app
    for ingress in ingresses:
        app["args"]["ingress_cls_config"] = {"ingress_cls": INGRESS}
        ingress["user_config"] = {"policy": routing.policy, "request_router_kwargs": kwargs(routing)}
        if isinstance(routing, Session) and routing.header != HEADER:
            ingress["ray_actor_options"]["runtime_env"] = {"env_vars": {HEADER_VARIABLE: routing.header}}
    return app


def _serves_own_way(app: dict[str, Any], router: dict[str, Any]) -> None:
    """Ray imports the class when it builds the app and keeps that one until it builds again (ray 2.60.0,
    application_state.py: apply_app_config), and a process that routes keeps the router that it has made. So the class
    stands in `args`, where another one is another app, and what it is given is followed by the ingress, which another
    edition replaces, while the engines and their caches stay."""
    server, *ingresses = app["deployments"]
    server["request_router_config"] = router
    (config,) = app["args"]["llm_configs"]
    # Without an ingress all of it: nothing that an edition could replace by itself.
    built = {"request_router_class": router["request_router_class"]} if ingresses else router
    config["deployment_config"]["request_router_config"] = built
    digest = hashlib.sha256(json.dumps(router, sort_keys=True).encode()).hexdigest()
    for ingress in ingresses:
        ingress["ray_actor_options"]["runtime_env"] = {"env_vars": {EDITION_VARIABLE: digest[:12]}}


def request_router(routing: Session | Custom) -> dict[str, Any]:
    """Serve's `request_router_config`."""
    if isinstance(routing, Session):
        return {"request_router_class": SESSION_ROUTER, "request_router_kwargs": kwargs(routing)}
    return {
        "request_router_class": routing.router_class,
        "request_router_kwargs": routing.request_router_kwargs,
        "request_routing_stats_period_s": routing.request_routing_stats_period_s,
    }


def kwargs(routing: Prefix | Session | Statistics) -> dict[str, Any]:
    """What a router's `initialize_state` is given."""
    if isinstance(routing, Prefix):
        return {
            "imbalanced_threshold": routing.imbalanced_threshold,
            "match_rate_threshold": routing.match_rate_threshold,
            # Ray's own default never forgets.
            "do_eviction": True,
            "eviction_threshold_chars": routing.eviction_threshold_chars,
            "eviction_target_chars": routing.eviction_threshold_chars * 9 // 10,
        }
    if isinstance(routing, Session):
        return {name: getattr(routing, name) for name in ("num_virtual_nodes", "num_fallback_replicas")}
    return {name: getattr(routing, name) for name in ("max_kv_cache_usage", "max_waiting")}
