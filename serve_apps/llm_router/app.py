"""What runs in an `llm_router` app: an ingress that makes its routers itself, and a replica that says how full its
engine is.

Serve's own way to a router, `request_router_config`, is for classes that lie on every node: the dashboard and the
controller import them, too, and have no code of apps (ray 2.60.0, serve/schema.py and
serve/_private/application_state.py: override_deployment_info). And a process that routes keeps the router that it has
made, whatever comes later.
"""

from __future__ import annotations

import random
from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.serve.llm import ingress
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.request_router import PrefixCacheAffinityRouter
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class PrefixRouter(PrefixCacheAffinityRouter):
    """Ray's, where that leaves requests without an answer (ray 2.60.0, prefix_aware_router.py): an error while it
    chooses ends the routing, and the request waits until its client goes."""

    def _extract_text_from_request(self, pending_request: PendingRequest) -> str | None:
        """None where there is no text to go by: what is embedded or scored, prompts of token ids, images. Ray's own
        method raises then, or divides by the length of nothing."""
        try:
            return super()._extract_text_from_request(pending_request) or None
        except ValueError:
            return None

    async def _prefix_match_best_replicas(
        self, pending_request: PendingRequest | None, candidate_replicas: list[RunningReplica]
    ) -> list[list[RunningReplica]]:
        """None where the tree, which all ingress replicas share, names a replica that this one does not know yet, or
        no longer: load decides."""
        try:
            ranks: list[list[RunningReplica]] = await super()._prefix_match_best_replicas(
                pending_request, candidate_replicas
            )
        except KeyError:
            return [[]]
        return ranks


class StatisticsRouter(RequestRouter):
    """The less busy one of two replicas that have room, by what their engines said last; of those that have none,
    where all are full."""

    def initialize_state(self, max_kv_cache_usage: float, max_waiting: int) -> None:
        self._most = {"kv_cache_usage": max_kv_cache_usage, "waiting": max_waiting}

    def _has_room(self, said: dict[str, Any]) -> bool:
        """A replica that has said nothing yet has just started."""
        return all(said.get(name, 0) <= most for name, most in self._most.items())

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            # Else the next try would come without a pause.
            pending_request.routing_context.should_backoff = True
        ranks: dict[bool, list[RunningReplica]] = {True: [], False: []}
        for replica in candidate_replicas:
            ranks[self._has_room(replica.routing_stats)].append(replica)
        return [random.sample(rank, min(2, len(rank))) for rank in ranks.values() if rank]


ROUTERS = {"prefix": PrefixRouter, "session": ConsistentHashRouter, "statistics": StatisticsRouter}


class OpenAiIngress(ingress.OpenAiIngress):
    """Ray's, with a router by `user_config`: {"policy": name, "request_router_kwargs": {…}}."""

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        router, kwargs = ROUTERS[user_config["policy"]], user_config["request_router_kwargs"]

        def initialize_state(made: Any, **_: Any) -> None:
            router.initialize_state(made, **kwargs)

        chosen = type(router.__name__, (router,), {"initialize_state": initialize_state})
        # Of this process, which routes to nothing but the model's replicas.
        RequestRouterConfig.get_request_router_class = lambda _: chosen
        # Requests that have one of the old handles end with that.
        handles: dict[str, DeploymentHandle] = self._default_serve_handles
        for name, handle in list(handles.items()):
            handles[name] = DeploymentHandle(handle.deployment_name, handle.app_name)
        self._configured_serve_handles.clear()


class Load:
    """What the engine's scheduler said of its last step, as one of vLLM's stat loggers (0.32.0, v1/metrics)."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
        if scheduler_stats is not None:
            self.last = {
                "kv_cache_usage": scheduler_stats.kv_cache_usage,
                "waiting": scheduler_stats.num_waiting_reqs,
                "running": scheduler_stats.num_running_reqs,
            }

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    log = log_engine_initialized = record_sleep_state = record_admission_rejection = _nothing


class MeasuredServer(LLMServer):
    """Ray's, with its engine's load in what routers are told of the replica."""

    _load: Load | None = None

    async def record_routing_stats(self) -> dict[str, Any]:
        said: dict[str, Any] = dict(await super().record_routing_stats())
        # Of Ray LLM and vLLM; neither has another way to these numbers.
        client = getattr(self.engine, "_engine_client", None)
        if client is None:
            return said
        if self._load is None:
            self._load = Load()
            client.logger_manager.stat_loggers.append(self._load)
        # An idle engine takes no steps: what it said last may be of requests that have gone since.
        busy = client.output_processor.has_unfinished_requests()
        return {**said, **(self._load.last if busy else {"kv_cache_usage": 0, "waiting": 0, "running": 0})}
