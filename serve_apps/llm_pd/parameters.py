"""Parameters of an `llm_pd` app: one model, whose prompts one engine reads and another one answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictInt, Tag, field_validator, model_validator

from serve_apps.llm.parameters import LlmParameters, ModelSource
from serve_apps.replicas import Number, Strict
from serve_apps.template import LoggingConfig

# What both halves have from the app, by the app's parameters or by Ray's classes for the two.
OF_THE_APP = {
    "model_id": "both halves serve the same model",
    "model_source": "both halves serve the same model",
    "environment": "say it once, of the app",
    "engine_start_timeout_s": "say it once, of the app",
    "response_timeout_s": "say it once, of the app",
    "logging_config": "say it once, of the app",
    "ingress_min_replicas": "say it once, of the app",
    "ingress_max_replicas": "say it once, of the app",
    "server_class": "Ray's own server of this half belongs here",
    "user_config": "Ray's own server of this half takes none",
}
PREFILL, DECODE = "prefill", "decode"
# Stand-ins in the halves, until the app's own are rendered.
NOBODY: dict[str, Any] = {"model_id": "model", "model_source": {"make": "tiny-llama"}}


def _folder(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return value


class Connector(Strict):
    """What brings the KV cache of a prompt from one engine to the other."""

    extra_config: dict[str, Any] = Field({}, description="`kv_connector_extra_config` of vLLM, for both halves")
    kv_load_failure_policy: Literal["recompute", "fail"] = Field(
        "recompute", description="what decode does with a cache that does not come: calculate it itself, or fail"
    )


class Nixl(Connector):
    """NIXL: from GPU memory to GPU memory, over InfiniBand, RoCE or NVLink, else TCP."""

    kind: Literal["nixl"]
    side_channel_port: StrictInt = Field(
        20000, ge=1024, le=63000, description="first port of the prefill replicas; those of decode begin 2000 above"
    )


class Moriio(Connector):
    """MoRIIO: the same, by AMD."""

    kind: Literal["moriio"]
    handshake_port: StrictInt = Field(
        6301, ge=1024, le=64000, description="first port of the prefill replicas; those of decode begin 1000 above"
    )
    notify_port: StrictInt = Field(61005, ge=1024, le=64000, description="the same, of another port that it needs")


class LmCache(Connector):
    """LMCache: by way of a store of its own."""

    kind: Literal["lmcache"]


class Files(Connector):
    """Files in a folder, by vLLM's ExampleConnector: for checks."""

    kind: Literal["files"]
    folder: Annotated[str, AfterValidator(_folder)] = Field(
        description="absolute path; all hosts of the pool see the same files there, and nobody takes them away"
    )


class Other(Connector):
    """Another connector of vLLM's, or of a package in the image."""

    kind: Literal["other"]
    kv_connector: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")] = Field(description="vLLM's name of it")
    kv_connector_module_path: str | None = Field(None, description="the module that has it, where it is not vLLM's")
    kv_role: Literal["producer and consumer", "both"] = Field(
        "producer and consumer", description="whether each half has its own role, or both have both"
    )


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


AnyConnector = Annotated[
    Annotated[Nixl, Tag("nixl")]
    | Annotated[Moriio, Tag("moriio")]
    | Annotated[LmCache, Tag("lmcache")]
    | Annotated[Files, Tag("files")]
    | Annotated[Other, Tag("other")],
    Discriminator(
        _kind,
        custom_error_type="kind",
        custom_error_message="must have a kind: nixl, moriio, lmcache, files or other",
    ),
]


class LlmPdParameters(Strict):
    """One model, served with the OpenAI API by two kinds of engines."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] = Field(
        description="the name that clients put into `model`"
    )
    model_source: ModelSource = Field(description="where the weights come from, as with `llm`")
    connector: AnyConnector = Field(description="what brings a prompt's KV cache to decode: see below")
    prefill: LlmParameters = Field(description="the engines that read prompts: parameters of `llm`")
    decode: LlmParameters = Field(description="the engines that answer: parameters of `llm`")
    ingress_min_replicas: StrictInt | None = Field(
        None, ge=0, description="ingress replicas, at least; as many as of decode where nothing is said"
    )
    ingress_max_replicas: StrictInt | None = Field(
        None, ge=1, description="ingress replicas, at most; as many as of decode where nothing is said"
    )
    engine_start_timeout_s: StrictInt | None = Field(
        None, gt=0, description="how long an engine may take to start; 600 where nothing is said, which is vLLM's own"
    )
    response_timeout_s: Number | None = Field(
        None, gt=0, description="how long the ingress waits for an answer, of a stream for its beginning; as with `llm`"
    )
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")
    environment: dict[str, str] = Field({}, description="environment of all replicas")

    @field_validator(PREFILL, DECODE, mode="before")
    @classmethod
    def _as_of_an_llm(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value:
            if name in OF_THE_APP:
                raise ValueError(f"{name} does not belong here: {OF_THE_APP[name]}")
        if "kv_transfer_config" in (value.get("engine_kwargs") or {}):
            raise ValueError("engine_kwargs.kv_transfer_config does not belong here: set the parameter connector")
        return {**NOBODY, **value}

    @model_validator(mode="after")
    def _check_together(self) -> LlmPdParameters:
        # Numbers of the ingress are held against those of decode.
        self.half(DECODE)
        return self

    def half(self, name: str) -> LlmParameters:
        """An `llm` app's parameters for one half; decode has the ingress."""
        given: LlmParameters = getattr(self, name)
        own = {item: getattr(given, item) for item in given.model_fields_set - OF_THE_APP.keys()}
        shared = {item: getattr(self, item) for item in ("model_id", "model_source", "environment", "logging_config")}
        for item in ("engine_start_timeout_s", "response_timeout_s"):
            shared[item] = getattr(self, item)
        if name == DECODE:
            ingress = ("ingress_min_replicas", "ingress_max_replicas")
            shared |= {item: getattr(self, item) for item in ingress if item in self.model_fields_set}
        return LlmParameters.model_validate({**own, **shared})
