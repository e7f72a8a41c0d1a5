"""Parameters of an `llm_router` app: those of `llm`, and by what a request finds its replica."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictInt, Tag, model_validator

from serve_apps.llm.parameters import LlmParameters
from serve_apps.replicas import Number, Positive, Strict

HEADER = "x-session-id"


class Prefix(Strict):
    """To the replica that has seen the longest beginning of the prompt."""

    policy: Literal["prefix"]
    imbalanced_threshold: StrictInt = Field(
        16, ge=0, description="requests that the busiest replica may have more than the idlest; above it, load decides"
    )
    match_rate_threshold: Number = Field(
        0.1, ge=0, le=1, description="share of the prompt that has to be known; else the replica that knows least"
    )
    eviction_threshold_chars: StrictInt = Field(
        400_000,
        ge=1000,
        description="characters of prompts remembered of each replica; above it the oldest tenth goes",
    )


class Session(Strict):
    """All requests of a session to one replica."""

    policy: Literal["session"]
    header: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9-]{0,63}$")] = Field(
        HEADER, description="the header in which a client names its session"
    )
    num_fallback_replicas: StrictInt = Field(
        2, ge=0, description="other replicas that are asked, always the same ones, where the session's own is full"
    )
    num_virtual_nodes: StrictInt = Field(
        100, ge=1, description="points of each replica on the ring; more spread the sessions more evenly"
    )


class Statistics(Strict):
    """To a replica whose engine says that it has room."""

    policy: Literal["statistics"]
    max_kv_cache_usage: Number = Field(
        0.9, gt=0, le=1, description="share of its KV cache in use above which a replica is passed over"
    )
    max_waiting: StrictInt = Field(
        0, ge=0, description="requests that wait in its engine above which a replica is passed over"
    )
    request_routing_stats_period_s: Positive = Field(1, description="how often replicas are asked")


class Custom(Strict):
    """By a class that lies on every node: of the site's image, or another of Ray's."""

    policy: Literal["custom"]
    router_class: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")] = Field(
        description="subclass of `ray.serve.request_router.RequestRouter` that every node can import, `module:Class`"
    )
    request_router_kwargs: dict[str, Any] = Field({}, description="for its `initialize_state`")
    request_routing_stats_period_s: Positive = Field(
        10, description="how often replicas are asked for what `record_routing_stats` of `server_class` returns"
    )


def _policy(value: Any) -> Any:
    return value.get("policy") if isinstance(value, dict) else getattr(value, "policy", None)


Routing = Annotated[
    Annotated[Prefix, Tag("prefix")]
    | Annotated[Session, Tag("session")]
    | Annotated[Statistics, Tag("statistics")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(
        _policy,
        custom_error_type="policy",
        custom_error_message="must have a policy: prefix, session, statistics or custom",
    ),
]


class LlmRouterParameters(LlmParameters):
    """One model, served with the OpenAI API by replicas that are not all the same to a request."""

    routing: Routing = Field(description="by what a request finds its replica: see below")

    @model_validator(mode="after")
    def _check_statistics(self) -> LlmRouterParameters:
        if not isinstance(self.routing, Statistics):
            return self
        if self.server_class is not None:
            raise ValueError(
                "routing.policy statistics needs the kit's own server_class: take it out, or use the policy custom"
            )
        if self.engine_kwargs.get("disable_log_stats"):
            raise ValueError("routing.policy statistics needs the engine's numbers: take disable_log_stats out")
        return self
