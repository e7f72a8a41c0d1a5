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
    return {
        "proxy_location": serve.proxy_location,
        "http_options": http_options,
        "applications": [_application(spec, app) for app in spec.apps],
    }


def _application(spec: ClusterSpec, app: App) -> dict[str, Any]:
    cache = spec.engine_cache(app)
    return app.template.render(
        name=app.name,
        route_prefix=app.facts.route_prefix,
        parameters=app.parameters,
        accelerator=spec.pools[app.pool].facts.accelerator,
        model_path=app.model.path if app.model else "",
        cache_path=f"{spec.engine_caches}/{cache}" if cache else None,
    )
