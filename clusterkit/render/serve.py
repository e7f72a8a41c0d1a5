"""The Serve config of a cluster: pure spec in, plain data out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from clusterkit.render.scaling import scaled
from clusterkit.spec.cluster import App, ClusterSpec
from clusterkit.spec.ingress import GRACE
from serve_apps.template import model_arguments


def serve_config(spec: ClusterSpec) -> dict[str, Any]:
    """The whole config for `PUT /api/serve/applications/`: what it does not list is deleted."""
    serve = spec.facts.serve
    http_options: dict[str, Any] = {
        "host": serve.http_host,
        "port": spec.facts.ports.serve,
        "keep_alive_timeout_s": serve.keep_alive_timeout_s,
    }
    if serve.request_timeout_s is not None:
        http_options["request_timeout_s"] = serve.request_timeout_s
    if serve.root_path:
        http_options["root_path"] = serve.root_path
    config: dict[str, Any] = {"proxy_location": serve.proxy_location, "http_options": http_options}
    if serve.grpc_options.grpc_servicer_functions:
        config["grpc_options"] = {"port": spec.facts.ports.grpc, **serve.grpc_options.model_dump(exclude_none=True)}
    if serve.logging_config is not None:
        config["logging_config"] = serve.logging_config.model_dump(mode="json")
    # Serve does not say what its own logs are set to. In the apps, where they belong as well, a change is seen.
    logs = {"logging_config": config["logging_config"]} if "logging_config" in config else {}
    return {**config, "applications": [{**logs, **_application(spec, app)} for app in spec.apps]}


def _application(spec: ClusterSpec, app: App) -> dict[str, Any]:
    cache = spec.engine_cache(app)
    pool = spec.pools[app.pool].facts
    paths = {role: model.path for role, model in app.models.items()}
    code = {"code_uri": spec.code_uri(app.code)} if app.template.code(app.parameters) else {}
    entry = app.template.render(
        name=app.name,
        route_prefix=app.facts.route_prefix,
        parameters=_parameters(spec, app),
        accelerator=pool.accelerator,
        cache_path=f"{spec.engine_caches}/{cache}" if cache else None,
        **model_arguments(paths),
        **({"gpu_memory_gib": pool.gpu_memory_gib} if app.template.gpu_memory else {}),
        **code,
        **({"direct_streaming": True} if spec.facts.serve.direct_streaming and app.template.direct_streaming else {}),
    )
    return scaled(entry, app.facts, spec.code_uri(app.policies))


def _parameters(spec: ClusterSpec, app: App) -> BaseModel:
    """A replica that is replaced has as long as a request may take, where the inventory says no other time."""
    longest = spec.facts.serve.request_timeout_s
    return app.parameters if longest is None else _patient(app.parameters, longest)


def _patient(given: BaseModel, longest: float) -> BaseModel:
    changed: dict[str, Any] = {}
    for name in type(given).model_fields:
        value = getattr(given, name)
        if isinstance(value, BaseModel) and (inner := _patient(value, longest)) is not value:
            changed[name] = inner
    grace = getattr(given, GRACE, None)
    # What the site's own code says of its deployments stays, where the inventory is silent.
    ours = getattr(given, "DEFAULTS_ARE_RENDERED", True)
    if ours and grace is not None and grace < longest and GRACE not in given.model_fields_set:
        changed[GRACE] = longest
    return given.model_copy(update=changed) if changed else given
