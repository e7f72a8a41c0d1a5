"""The assembled cluster: what every renderer and role reads. Frozen, without secrets, without I/O."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

from clusterkit.spec import ingress, scaling
from clusterkit.spec.facts import Accelerator, AppFacts, ClusterFacts, HostFacts, PoolFacts
from clusterkit.spec.stacks import Engine, Stack, table
from serve_apps.template import ONLY_MODEL, Template

HEAD_NODE_TYPE = "head"
# Of the host agent: from `start` until Ray answers, with what its lock and its systemd may add.
START_TIMEOUT_S = 360
# Between a node that is up and Ray that has seen it; polls of the daemon and rounds of the autoscaler lie in it.
SEEN_MARGIN_S = 120


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


class Registry(_Frozen):
    """The host of the group `registry`, as its role is told to run it. `proxy`: a pull-through cache of another."""

    host: str
    node_ip: str
    port: int = 5000
    tls: bool = True
    proxy: bool = False

    @property
    def address(self) -> str:
        return f"[{self.node_ip}]:{self.port}" if ":" in self.node_ip else f"{self.node_ip}:{self.port}"


class Model(_Frozen):
    """Weights that an app needs, and where they lie on a host; of an adapter with the largest rank that may be."""

    id: str
    make: str | None = None
    folder: str | None = None
    hub: str | None = None
    revision: str | None = None
    allow_patterns: tuple[str, ...] = ()
    ignore_patterns: tuple[str, ...] = ()
    max_rank: int | None = None
    path: str


class Code(_Frozen):
    """What an app imports, as it was read on the controller: `digest` is the SHA-256 of one zip with all of it.

    `template` (the kit's own), `folder` (an absolute path on the controller) or both say where it came from.
    """

    digest: str
    template: str = ""
    folder: str = ""


class App(_Frozen):
    """One Serve application with its typed parameters; `models` by what they are for, what clients ask for first."""

    facts: AppFacts
    pool: str
    parameters: BaseModel
    template: Template
    models: dict[str, Model]
    code: Code | None = None
    policies: Code | None = None

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def model(self) -> Model | None:
        """The only one; None of an app that has none or several."""
        return self.models.get(ONLY_MODEL)


class ClusterSpec(_Frozen):
    """The whole cluster, as validated."""

    facts: ClusterFacts
    stack: Stack
    head: str
    hosts: dict[str, Host]
    pools: dict[str, Pool]
    apps: tuple[App, ...]
    registry: Registry | None = None
    image_builder: str | None = None

    @property
    def one_box(self) -> bool:
        """The head is a worker too: its death costs the replicas on it as well."""
        return self.hosts[self.head].worker

    @property
    def autoscaled(self) -> bool:
        """Hosts come and go as demand asks: all pools do, or none."""
        return any(pool.facts.pool.mode == "autoscaled" for pool in self.pools.values())

    @property
    def node_timeout_s(self) -> int:
        """From Ray's wish for a node until it has one, on a host that is off: at most so long. 0: it has them all."""
        if not self.autoscaled:
            return 0
        slowest = max(pool.facts.pool.boot_budget_s for pool in self.pools.values())
        return slowest + START_TIMEOUT_S + SEEN_MARGIN_S

    @property
    def image_registry(self) -> str | None:
        """Where images are pushed to."""
        if self.facts.image_registry or self.registry is None or self.registry.proxy:
            return self.facts.image_registry
        return self.registry.address

    def accelerator(self, host: Host) -> Accelerator | None:
        return self.pools[host.pool].facts.accelerator if host.pool else None

    def models(self, pool: str | None = None) -> list[Model]:
        """Each model once; of one pool where one is named."""
        found = {
            model.path: model for app in self.apps if pool is None or app.pool == pool for model in app.models.values()
        }
        return [found[path] for path in sorted(found)]

    @property
    def _kept(self) -> str:
        """The folder that ray_node gives to Ray's user to keep: in a container under the same path."""
        paths = self.facts.paths
        return f"{paths.ray_temp}/cache" if self.facts.runtime == "container" else f"{paths.state}/node/cache"

    @property
    def engine_caches(self) -> str:
        """Folder on each host for what engines compile."""
        return f"{self._kept}/engine"

    @property
    def code_path(self) -> str:
        """Folder on each host for the code of apps."""
        return f"{self._kept}/apps"

    def codes(self) -> list[Code]:
        """Each code once, whichever apps import it. All hosts have all: Ray may build an app on any of them."""
        every = [code for app in self.apps for code in (app.code, app.policies)]
        found = {code.digest: code for code in every if code is not None}
        return [found[digest] for digest in sorted(found)]

    def code_uri(self, code: Code | None) -> str | None:
        """What Serve calls a code: a file on the host that Ray unpacks for each replica there."""
        return None if code is None else f"file://{self.code_path}/{code.digest}.zip"

    def engine_cache(self, app: App) -> str | None:
        """The folder's name for one app: a digest of image, architecture, model and parallelism."""
        if app.model is None:
            return None
        pool = self.pools[app.pool].facts
        demands = app.template.demands(app.parameters)
        # Nothing that a release may word anew: another name restarts the replicas.
        facts = self.facts.model_dump(mode="json", exclude={"image_registry"})
        image = {name: value for name, value in facts.items() if name.startswith("image")}
        versions = [self.stack.ray, self.stack.vllm, self.stack.base_image, self.stack.base_image_digest]
        key: list[Any] = [image, versions, pool.accelerator, pool.gpu_model, app.model.path]
        key += [number for demand in demands for number in (demand.gpus, demand.gpus_per_host)]
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]

    def published(self) -> dict[str, Any]:
        """The fact `clusterkit` that roles read: plain data, no secret in it."""
        facts = self.facts
        return {
            "name": facts.name,
            "runtime": facts.runtime,
            "image": facts.image,
            "image_registry": self.image_registry,
            # The cluster's own, where it has one.
            "registry": {**self.registry.model_dump(), "address": self.registry.address} if self.registry else None,
            # The host whose Docker builds the image; None: this machine's.
            "image_builder": self.image_builder,
            # What runs Python with Ray in it, in either runtime; made by ray_env or vllm_image.
            "ray_python": facts.paths.root + ("/ray-env/bin/python" if facts.runtime == "venv" else "/bin/ray-python"),
            # A row that brings no engine of its own has an empty one: roles need not ask.
            "stack": {
                **self.stack.model_dump(mode="json"),
                "engine": (self.stack.engine or Engine(requirements=(), python=())).model_dump(mode="json"),
                "image": self._image_recipe(),
            },
            "service_user": facts.service_user,
            "ports": ingress.ray_ports(facts),
            "ingress_ports": ingress.ports(facts),
            "ingress_environment": ingress.environment(facts),
            "paths": facts.paths.model_dump(),
            "engine_caches": self.engine_caches,
            "code": {"path": self.code_path, "apps": [code.model_dump() for code in self.codes()]},
            "proxy": facts.proxy.model_dump(),
            "mirrors": facts.mirrors.model_dump(),
            "ca_bundle": facts.ca_bundle,
            "environment": facts.environment,
            "object_store_gib": facts.object_store_gib,
            "serve": {
                **facts.serve.model_dump(),
                # A replica may have to wait for its host, which is no fault of the app's.
                "ready_timeout_s": facts.serve.ready_timeout_s + self.node_timeout_s,
            },
            "node_timeout_s": self.node_timeout_s,
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
                    "model_id": next((model.id for model in app.models.values()), ""),
                    **self._external(app),
                }
                for app in self.apps
            ],
            "pools": {name: self._published_pool(pool) for name, pool in self.pools.items()},
            "hosts": {name: self._published_host(host) for name, host in self.hosts.items()},
        }

    def _image_recipe(self) -> dict[str, Any] | None:
        """What the engine's image is built from: the row's recipe with the site's choices in it."""
        recipe, facts = self.stack.image, self.facts
        if recipe is None:
            return None
        if not recipe.from_source:
            return recipe.model_dump(mode="json", exclude={"requirements", "base_recipe"})
        own = f"{self.stack.base_image}@{self.stack.base_image_digest}".rstrip("@")
        base = facts.image_base or own
        models = {pool.facts.gpu_model for pool in self.pools.values() if pool.facts.gpu_model}
        archs = table().gpu_archs
        # An image of the site's own, instead of the row's, holds torch itself.
        same = base.partition("@")[0] == self.stack.base_image
        return {
            "recipe": recipe.recipe,
            "base": base,
            "base_recipe": recipe.base_recipe if same else "",
            "source": facts.image_source,
            "ref": facts.image_ref or f"v{self.stack.vllm}",
            "vllm": self.stack.vllm,
            "ray": [f"ray[{self.stack.ray_extra}]=={self.stack.ray}", *recipe.requirements],
            "archs": facts.image_archs or sorted({archs[model] for model in models if model in archs}, key=_by_number),
            "unknown_models": [] if facts.image_archs else sorted(models - archs.keys()),
            "arguments": facts.image_arguments,
            "patches": facts.image_patches or "",
            "index_url": facts.mirrors.pypi or "",
            "ca_bundle": facts.ca_bundle or "",
            "proxy": facts.proxy.model_dump(),
        }

    def _external(self, app: App) -> dict[str, Any]:
        """Between which numbers each deployment is scaled from outside."""
        if not app.facts.external_scaler:
            return {}
        known = scaling.bounds(app.template, app.parameters, self.pools[app.pool].facts)
        return {"external": {name: list(pair) if pair else None for name, pair in known.items()}}

    def _published_pool(self, pool: Pool) -> dict[str, Any]:
        return {**pool.facts.model_dump(), "hosts": list(pool.hosts), "max": pool.max}

    def _published_host(self, host: Host) -> dict[str, Any]:
        pool = self.pools[host.pool].facts if host.pool else None
        return {
            "node_ip": host.node_ip,
            "head": host.head,
            "worker": host.worker,
            "managed": host.managed,
            # Its node comes and goes as the autoscaler asks; nobody else starts it.
            "autoscaled": pool is not None and pool.pool.mode == "autoscaled",
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
            # A head that runs no replica needs no weights for that.
            "models": [
                {**model.model_dump(mode="json"), "weights": host.worker}
                for model in (self.models() if host.head else self.models(host.pool))
            ],
            "caches": sorted(
                {self.engine_cache(app) for app in self.apps if app.model and app.pool == host.pool} - {None}
            ),
        }


def _by_number(arch: str) -> tuple[int, str]:
    """9.0 before 10.0, gfx942 before gfx950."""
    return int(arch.partition(".")[0]) if arch[0].isdigit() else 0, arch
