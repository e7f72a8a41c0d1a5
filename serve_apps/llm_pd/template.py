"""Turns the parameters of an `llm_pd` app into one entry of Serve's `applications`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from serve_apps.llm import template as llm
from serve_apps.llm_pd.parameters import DECODE, PREFILL, Files, LlmPdParameters, LmCache, Moriio, Nixl
from serve_apps.template import RayNeed, ReplicaDemand, entry

PARAMETERS = LlmPdParameters
OPENAI_API = True
DIRECT_STREAMING = True

IMPORT_PATH = "ray.serve.llm:build_pd_openai_app"
# What Ray puts before the model's name (ray 2.60.0, prefill_decode/builder.py).
NAMES = {PREFILL: "Prefill", DECODE: "Decode"}
ROLES = {PREFILL: "kv_producer", DECODE: "kv_consumer"}
BOTH = "kv_both"
# Between the ports of the two, which may lie on one host; Ray's own distances.
NIXL_DISTANCE, MORIIO_DISTANCE = 2000, 1000


def model_source(parameters: LlmPdParameters) -> dict[str, Any]:
    """The weights, which both halves have."""
    return llm.model_source(parameters.half(DECODE))


def ray_needs(parameters: LlmPdParameters) -> list[RayNeed]:
    """Older Rays have a third server between the two, which nothing here was run with."""
    needs = [RayNeed("connector", "2.60.0")]
    for name in NAMES:
        needs += [RayNeed(f"{name}.{need.parameter}", need.ray) for need in llm.ray_needs(parameters.half(name))]
    return needs


def demand(parameters: LlmPdParameters) -> tuple[ReplicaDemand, ...]:
    """What each half asks of the pool; the ingress is counted with decode."""
    found = []
    for name in NAMES:
        half = parameters.half(name)
        asked = llm.demand(half)
        without = asked.minimum_cpus - half.ingress_min * llm.INGRESS_CPUS
        cpus = asked.minimum_cpus if name == DECODE else without
        found.append(replace(asked, minimum_cpus=cpus, parameter=name))
    return tuple(found)


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: LlmPdParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    direct_streaming: bool = False,
) -> dict[str, Any]:
    """One entry of `applications`. Decode is what the ingress asks; it asks prefill first, and has the KV cache of the
    prompt from there. With `direct_streaming` there is no ingress."""
    args, deployments = {}, []
    for part, prefix in NAMES.items():
        half = parameters.half(part)
        env_vars = llm.environment(half, accelerator, cache_path)
        config = llm.llm_config(half, accelerator, model_path, env_vars)
        config["engine_kwargs"]["kv_transfer_config"] = transfer(parameters, part)
        config.setdefault("experimental_configs", {}).update(ports(parameters, part))
        args[f"{part}_config"] = config
        server = llm.server(half)
        deployments.append({**server, "name": f"{prefix}:{server['name'].partition(':')[2]}"})
    decode = parameters.half(DECODE)
    return entry(
        name=name,
        route_prefix=route_prefix,
        import_path=IMPORT_PATH,
        env_vars=llm.environment(decode, accelerator, cache_path),
        args=args,
        deployments=deployments + ([] if direct_streaming else [llm.ingress(decode)]),
        logging_config=parameters.logging_config,
    )


def transfer(parameters: LlmPdParameters, part: str) -> dict[str, Any]:
    """vLLM's `kv_transfer_config` of one half."""
    connector = parameters.connector
    config: dict[str, Any] = {"kv_role": ROLES[part], "kv_load_failure_policy": connector.kv_load_failure_policy}
    extra = dict(connector.extra_config)
    if isinstance(connector, Nixl):
        config |= {"kv_connector": "NixlConnector", "kv_role": BOTH}
    elif isinstance(connector, Moriio):
        config["kv_connector"] = "MoRIIOConnector"
    elif isinstance(connector, LmCache):
        config["kv_connector"] = "LMCacheConnectorV1"
    elif isinstance(connector, Files):
        config |= {"kv_connector": "ExampleConnector", "kv_role": BOTH}
        extra["shared_storage_path"] = connector.folder
    else:
        config["kv_connector"] = connector.kv_connector
        if connector.kv_role == "both":
            config["kv_role"] = BOTH
        if connector.kv_connector_module_path is not None:
            config["kv_connector_module_path"] = connector.kv_connector_module_path
    return {**config, "kv_connector_extra_config": extra} if extra else config


def ports(parameters: LlmPdParameters, part: str) -> dict[str, int]:
    """First ports of the replicas of one half; Ray adds each one's rank."""
    connector, later = parameters.connector, part == DECODE
    if isinstance(connector, Nixl):
        return {"NIXL_SIDE_CHANNEL_PORT_BASE": connector.side_channel_port + NIXL_DISTANCE * later}
    if isinstance(connector, Moriio):
        return {
            "MORI_HANDSHAKE_PORT_BASE": connector.handshake_port + MORIIO_DISTANCE * later,
            "MORI_NOTIFY_PORT_BASE": connector.notify_port + MORIIO_DISTANCE * later,
        }
    return {}
