"""Turns the parameters of an `llm_lora` app into one entry of Serve's `applications`: that of `llm`, with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from serve_apps.llm import template as llm
from serve_apps.llm_lora.parameters import LlmLoraParameters
from serve_apps.template import ONLY_MODEL, AppCode, RayNeed, ReplicaDemand

PARAMETERS = LlmLoraParameters
OPENAI_API = True

SERVER_CLASS = "serve_apps.llm_lora.app:LLMServer"
INGRESS_CLASS = "serve_apps.llm_lora.app:OpenAiIngress"


def model_sources(parameters: LlmLoraParameters) -> dict[str, dict[str, Any]]:
    """The model, then each adapter with the rank that the engine has room for."""
    adapters = {
        _role(adapter.id): {
            "id": f"{parameters.model_id}:{adapter.id}",
            "max_rank": parameters.max_lora_rank,
            **adapter.source.model_dump(),
        }
        for adapter in parameters.adapters
    }
    return {ONLY_MODEL: llm.model_source(parameters), **adapters}


def _role(adapter: str) -> str:
    return f"adapter {adapter}"


def code(_: LlmLoraParameters) -> AppCode:
    return AppCode(template="llm_lora")


def ray_needs(parameters: LlmLoraParameters) -> list[RayNeed]:
    """All of it: what `app` extends was another in older Rays."""
    return [RayNeed("adapters", "2.60.0"), *llm.ray_needs(parameters)]


def demand(parameters: LlmLoraParameters) -> ReplicaDemand:
    return llm.demand(parameters)


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: LlmLoraParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str = "",
    model_paths: Mapping[str, str] | None = None,
    cache_path: str | None = None,
    code_uri: str | None = None,
) -> dict[str, Any]:
    """One entry of `applications`; `model_path` is that of the model where it has no adapter. Which adapters there are
    is `user_config`, which running replicas are given: one more replaces none of them."""
    paths = model_paths or {ONLY_MODEL: model_path}
    app = llm.render(
        name=name,
        route_prefix=route_prefix,
        parameters=parameters,
        accelerator=accelerator,
        model_path=paths[ONLY_MODEL],
        cache_path=cache_path,
        code_uri=code_uri,
    )
    (config,) = app["args"]["llm_configs"]
    # The adapters are the ingress's to know, and in direct streaming there is none.
    for each in (app["runtime_env"], config["runtime_env"]):
        each["env_vars"]["RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"] = "0"
    config["server_cls"] = SERVER_CLASS
    # Without a path, of which Ray takes only those of clouds.
    config["lora_config"] = {"max_num_adapters_per_replica": parameters.max_num_adapters_per_replica}
    if accelerator == "cpu":
        # In one batch with an adapter, the model itself answers with a part of its weights: on CPU vLLM 0.32.0 takes
        # "no adapter" for the last one (vllm/lora/ops/torch_ops; vllm-project/vllm pull request 48421).
        config["engine_kwargs"].setdefault("max_num_seqs", 1)
    config["engine_kwargs"] |= {
        "enable_lora": True,
        "max_loras": parameters.max_loras,
        "max_lora_rank": parameters.max_lora_rank,
        "max_cpu_loras": parameters.max_num_adapters_per_replica,
    }
    app["args"]["ingress_cls_config"] = {"ingress_cls": INGRESS_CLASS}
    adapters = {adapter.id: paths[_role(adapter.id)] for adapter in parameters.adapters}
    server, ingress = app["deployments"]
    server["user_config"] = {"adapters": adapters}
    ingress["user_config"] = {"adapters": sorted(adapters)}
    return app
