"""The assembled cluster: what every renderer and role reads. Frozen, without secrets, without I/O."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from clusterkit.spec.facts import Accelerator, AppFacts, ClusterFacts, HostFacts, PoolFacts
from clusterkit.spec.stacks import Engine, Stack
from serve_apps.template import Template

HEAD_NODE_TYPE = "head"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class Host(_Frozen):
    """One host. `managed`: root work is done there and systemd runs Ray."""

    name: str
    node_ip: str
    head: bool
    pool: str | None
    managed: bool
    facts: HostFacts

    @property
    def worker(self) -> bool:
        return self.pool is not None


class Pool(_Frozen):
    """A child group of `ray_workers`: hosts of one kind."""

    name: str
    facts: PoolFacts
    hosts: tuple[str, ...]

    @property
    def max(self) -> int:
        declared = self.facts.pool.max
        return len(self.hosts) if declared is None else min(declared, len(self.hosts))


class Model(_Frozen):
    """Weights that an app needs, and where they lie on a host."""

    id: str
    make: str | None
    folder: str | None
    path: str


class App(_Frozen):
    """One Serve application with its typed parameters."""

    facts: AppFacts
    pool: str
    parameters: BaseModel
    template: Template
    model: Model | None

    @property
    def name(self) -> str:
        return self.facts.name


class ClusterSpec(_Frozen):
    """The whole cluster, as validated."""

    facts: ClusterFacts
    stack: Stack
    head: str
    hosts: dict[str, Host]
    pools: dict[str, Pool]
    apps: tuple[App, ...]

    @property
    def one_box(self) -> bool:
        """The head is a worker too: its death costs the replicas on it as well."""
        return self.hosts[self.head].worker

    def accelerator(self, host: Host) -> Accelerator | None:
        return self.pools[host.pool].facts.accelerator if host.pool else None

    def models(self, pool: str | None = None) -> list[Model]:
        """Each model once; of one pool where one is named."""
        found = {
            app.model.path: app.model
            for app in self.apps
            if app.model is not None and (pool is None or app.pool == pool)
        }
        return [found[path] for path in sorted(found)]

    def published(self) -> dict[str, Any]:
        """The fact `clusterkit` that roles read: plain data, no secret in it."""
        facts = self.facts
        return {
            "name": facts.name,
            "runtime": facts.runtime,
            "image": facts.image,
            # What runs Python with Ray in it, in either runtime; made by ray_env or vllm_image.
            "ray_python": facts.paths.root + ("/ray-env/bin/python" if facts.runtime == "venv" else "/bin/ray-python"),
            # A row that brings no engine of its own has an empty one: roles need not ask.
            "stack": {
                **self.stack.model_dump(mode="json"),
                "engine": (self.stack.engine or Engine(requirements=(), python=())).model_dump(mode="json"),
            },
            "service_user": facts.service_user,
            "ports": facts.ports.model_dump(),
            "paths": facts.paths.model_dump(),
            "proxy": facts.proxy.model_dump(),
            "mirrors": facts.mirrors.model_dump(),
            "ca_bundle": facts.ca_bundle,
            "environment": facts.environment,
            "object_store_gib": facts.object_store_gib,
            "serve": facts.serve.model_dump(),
            "log_rotation": facts.log_rotation.model_dump(),
            "allow_disruption": facts.allow_disruption,
            "max_unavailable": facts.max_unavailable,
            "head": {
                "host": self.head,
                "node_ip": self.hosts[self.head].node_ip,
                "address": f"{self.hosts[self.head].node_ip}:{facts.ports.gcs}",
            },
            "node_addresses": {name: host.node_ip for name, host in self.hosts.items()},
            "apps": [
                {
                    "name": app.name,
                    "route_prefix": app.facts.route_prefix,
                    "llm": app.template.openai_api,
                    "model_id": app.model.id if app.model else "",
                }
                for app in self.apps
            ],
            "pools": {name: self._published_pool(pool) for name, pool in self.pools.items()},
            "hosts": {name: self._published_host(host) for name, host in self.hosts.items()},
        }

    def _published_pool(self, pool: Pool) -> dict[str, Any]:
        return {**pool.facts.model_dump(), "hosts": list(pool.hosts), "max": pool.max}

    def _published_host(self, host: Host) -> dict[str, Any]:
        pool = self.pools[host.pool].facts if host.pool else None
        return {
            "node_ip": host.node_ip,
            "head": host.head,
            "worker": host.worker,
            "managed": host.managed,
            "pool": host.pool,
            "node_type": HEAD_NODE_TYPE if host.head else host.pool,
            "accelerator": pool.accelerator if pool else None,
            "gpu_model": pool.gpu_model if pool else None,
            "num_gpus": pool.gpus if pool else 0,
            "gpu_memory_gib": pool.gpu_memory_gib if pool else None,
            # A head that is no worker offers Ray nothing, so no replica can land there.
            "num_cpus": pool.cpus if pool else 0,
            "labels": pool.labels if pool else {},
            "fabric_interface": host.facts.fabric_interface,
            # The task that builds an app runs on the head and reads the model's configuration there.
            "models": [model.model_dump() for model in (self.models() if host.head else self.models(host.pool))],
        }
