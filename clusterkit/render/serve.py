"""The Serve config of a cluster: pure spec in, plain data out."""

from __future__ import annotations

from typing import Any

from clusterkit.spec.cluster import App, ClusterSpec


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
    code = {"code_uri": spec.code_uri(app)} if app.template.code(app.parameters) else {}
    return app.template.render(
        name=app.name,
        route_prefix=app.facts.route_prefix,
        parameters=app.parameters,
        accelerator=spec.pools[app.pool].facts.accelerator,
        model_path=app.model.path if app.model else "",
        cache_path=f"{spec.engine_caches}/{cache}" if cache else None,
        **code,
        **({"direct_streaming": True} if spec.facts.serve.direct_streaming and app.template.direct_streaming else {}),
    )
