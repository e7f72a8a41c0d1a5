"""Parameters of an `llm` app: what an inventory may say about one model."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StrictInt,
    Tag,
    field_validator,
    model_validator,
)

from serve_apps.policy.parameters import ScalingPolicy
from serve_apps.replicas import AUTOSCALING, POLICY, Number, Positive, Seconds, Strict, check_policy
from serve_apps.template import LoggingConfig

# What Ray LLM takes as accelerator_type; anything else stops the app when it is built.
ACCELERATOR_TYPES = (
    "A10G",
    "A100",
    "A100-40G",
    "A100-80G",
    "AMD-Instinct-MI100",
    "AMD-Instinct-MI210",
    "AMD-Instinct-MI250X",
    "AMD-Instinct-MI250X-MI250",
    "AMD-Instinct-MI300A",
    "AMD-Instinct-MI300X-HF",
    "AMD-Instinct-MI300X-OAM",
    "AMD-Instinct-MI308X",
    "AMD-Instinct-MI325X-OAM",
    "AMD-Instinct-MI350X-OAM",
    "AMD-Instinct-MI355X-OAM",
    "AMD-Radeon-HD-7900",
    "AMD-Radeon-R9-200-HD-7900",
    "B200",
    "B300",
    "GB200",
    "GB300",
    "H100",
    "H20",
    "H200",
    "K80",
    "L4",
    "L40S",
    "P100",
    "P4",
    "RTX-PRO-6000",
    "T4",
    "V100",
)

# Engine arguments that a parameter sets, or that Ray LLM sets by itself.
OWNED_ENGINE_KWARGS = {
    "tensor_parallel_size": "set the parameter tensor_parallel",
    "pipeline_parallel_size": "set the parameter pipeline_parallel",
    "model": "set the parameter model_source",
    "served_model_name": "set the parameter model_id",
    "distributed_executor_backend": "Ray LLM chooses it",
    "data_parallel_size": "use max_replicas: Serve runs the replicas",
}

# What only an app says whose replicas come and go.
SCALING = (*AUTOSCALING, POLICY, "ingress_min_replicas", "ingress_max_replicas")


def nearest_accelerator(name: str) -> str | None:
    """The known accelerator type that was probably meant: `MI300X` for `AMD-Instinct-MI300X-OAM`."""
    by_folded = {known.lower(): known for known in ACCELERATOR_TYPES}
    folded = re.sub(r"[\s_]+", "-", name.strip().lower())
    if folded in by_folded:
        return by_folded[folded]
    parts = [known for known in ACCELERATOR_TYPES if folded in known.lower().split("-")]
    if parts:
        # The module as it is sold, before its rarer forms.
        return next((known for known in parts if known.endswith("-OAM")), parts[0])
    # Without the vendor in front, which people write in many ways.
    core = re.sub(r"^(nvidia|amd|instinct|tesla|geforce|-)+", "", folded)
    if core and core != folded:
        return nearest_accelerator(core)
    near = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.6)
    return by_folded[near[0]] if near else None


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("must be an absolute path")
    return value.rstrip("/") or "/"


class MadeModel(Strict):
    """A model that the kit makes on the host: random weights, for checks."""

    make: Annotated[str, Field(pattern=r"^tiny-llama$", description="which one; there is `tiny-llama`")]


class FolderModel(Strict):
    """A folder that is there already, on every host under the same path."""

    folder: Annotated[str, AfterValidator(_absolute), Field(description="absolute path on the hosts")]


class HubModel(Strict):
    """A repository of the Hugging Face Hub, or of a mirror that speaks its API: fetched once to every host."""

    hub: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")] = Field(
        description="the repository, such as Qwen/Qwen3-0.6B"
    )
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w./-]{0,127}$")] = Field(
        description="a commit (40 characters); a tag or branch is what it was when a host first fetched it"
    )
    allow_patterns: tuple[str, ...] = Field((), description="only files that match one of these, such as *.gguf")
    ignore_patterns: tuple[str, ...] = Field((), description="no file that matches one of these")


_SOURCES: dict[str, type[Strict]] = {"make": MadeModel, "folder": FolderModel, "hub": HubModel}


def _source_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return next((kind for kind in _SOURCES if kind in value), None)
    return next((kind for kind, model in _SOURCES.items() if isinstance(value, model)), None)


ModelSource = Annotated[
    Annotated[MadeModel, Tag("make")] | Annotated[FolderModel, Tag("folder")] | Annotated[HubModel, Tag("hub")],
    Discriminator(
        _source_kind,
        custom_error_type="model_source",
        custom_error_message="must be {hub: org/name, revision: commit}, {folder: /path} or {make: tiny-llama}",
    ),
]


class LlmParameters(Strict):
    """One model, served with the OpenAI API."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] = Field(
        description="the name that clients put into `model`"
    )
    model_source: ModelSource = Field(
        description="where the weights come from: `{hub: org/name, revision: commit}`, `{folder: /path}` or "
        "`{make: tiny-llama}`"
    )
    engine_kwargs: dict[str, Any] = Field(
        {},
        description="arguments of the vLLM engine, by the names of its Python API (`max_model_len`); "
        "on CPU `enforce_eager` is true where nothing is said, as compiling needs a compiler on the host",
    )
    accelerator_type: str | None = Field(
        None, description="run only on this accelerator, by Ray's name (`AMD-Instinct-MI300X-OAM`)"
    )
    tensor_parallel: StrictInt = Field(1, ge=1, description="GPUs of one host that one replica spans")
    pipeline_parallel: StrictInt = Field(
        1, ge=1, description="stages of one replica, each of `tensor_parallel` GPUs, also across hosts"
    )
    gpu_fraction: Number | None = Field(
        None, gt=0, lt=1, description="share of one GPU that a replica takes, for several models on one GPU"
    )
    cpus_per_replica: Number | None = Field(
        None, gt=0, description="CPUs that Ray sets aside for one replica; 1 where nothing is said"
    )

    num_replicas: StrictInt | None = Field(
        None, ge=1, description="always so many replicas and as many of the ingress, instead of all that scales"
    )
    min_replicas: StrictInt = Field(1, ge=0, description="never fewer replicas; 0 lets an idle model go away")
    max_replicas: StrictInt = Field(1, ge=1, description="never more replicas")
    initial_replicas: StrictInt | None = Field(
        None,
        ge=0,
        description="replicas after the first deploy, `min_replicas` where nothing is said; where given, again after "
        "each change of the app",
    )
    target_ongoing_requests: Positive = Field(
        16, description="requests per replica that scaling aims at; Ray LLM's own default never scales"
    )
    upscale_delay_s: Seconds = Field(30, description="load must stay high for so long before replicas are added")
    downscale_delay_s: Seconds = Field(600, description="load must stay low for so long before replicas are removed")
    downscale_to_zero_delay_s: Seconds | None = Field(
        None, description="the same for the last replica; `downscale_delay_s` where nothing is said"
    )
    scaling_policy: ScalingPolicy | None = Field(
        None, description="what the model's replicas go by instead: requests that wait, times of the week"
    )
    ingress_min_replicas: StrictInt | None = Field(
        None, ge=0, description="ingress replicas, at least; `min_replicas` where nothing is said"
    )
    ingress_max_replicas: StrictInt | None = Field(
        None, ge=1, description="ingress replicas, at most; `max_replicas` where nothing is said"
    )

    max_ongoing_requests: StrictInt = Field(256, ge=1, description="requests that one replica works on at a time")
    max_queued_requests: StrictInt = Field(
        -1, ge=-1, description="requests that each ingress replica lets wait; the rest gets 503. -1: no limit"
    )
    health_check_period_s: Positive = Field(10, description="how often a replica is asked whether it is well")
    health_check_timeout_s: Positive = Field(30, description="how long it may take to answer that")
    graceful_shutdown_wait_loop_s: Positive = Field(
        2, description="how often a replica that is to stop looks whether its requests are done"
    )
    graceful_shutdown_timeout_s: Seconds = Field(600, description="how long its requests may take until they are cut")
    rolling_update_percentage: Positive | None = Field(
        None, le=1, description="share of the replicas that are replaced at a time; Ray's own is 0.2, at least one"
    )
    max_surge_percent: StrictInt | None = Field(
        None, ge=0, le=100, description="so many more replicas may run while they are replaced; Ray's own is 0"
    )

    engine_start_timeout_s: StrictInt | None = Field(
        None, gt=0, description="how long an engine may take to start; 600 where nothing is said, which is vLLM's own"
    )
    response_timeout_s: Number | None = Field(
        None,
        gt=0,
        description="how long the ingress waits for an answer, of a stream for its beginning; 600, and "
        "`engine_start_timeout_s` more where that is set: a request may have woken the engine",
    )
    stream_batching_interval_ms: Number | None = Field(
        None, ge=0, description="tokens of a stream are sent together for so long; Ray's own is 50"
    )
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")

    server_class: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*[.:][A-Za-z_]\w*$")] | None = Field(
        None, description="own subclass of Ray's LLMServer, importable on every node (`package.module:Class`)"
    )
    user_config: dict[str, Any] = Field(
        {}, description="given to `reconfigure` of `server_class`, without a restart of the replicas"
    )
    environment: dict[str, str] = Field({}, description="environment of the replicas")

    @model_validator(mode="before")
    @classmethod
    def _say_what_serve_refuses(cls, value: Any) -> Any:
        if isinstance(value, dict) and "max_replicas_per_node" in value:
            raise ValueError(
                "max_replicas_per_node: Serve refuses it for replicas with a placement group, which those of a model "
                "all have; how many fit a host is for its GPUs to say, and cpus_per_replica"
            )
        return value

    @field_validator("engine_kwargs")
    @classmethod
    def _check_engine_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in OWNED_ENGINE_KWARGS:
                raise ValueError(f"{name} does not belong here: {OWNED_ENGINE_KWARGS[name]}")
            if not name.isidentifier():
                spelt = re.sub("-+", "_", name.strip("-"))
                raise ValueError(f"{name!r} is no name of the Python API: write {spelt!r}")
        share = value.get("gpu_memory_utilization", 1)
        if isinstance(share, bool) or not isinstance(share, int | float) or share <= 0:
            raise ValueError("gpu_memory_utilization must be a number above 0, such as 0.9")
        return value

    @field_validator("accelerator_type")
    @classmethod
    def _check_accelerator_type(cls, value: str | None) -> str | None:
        if value is None or value in ACCELERATOR_TYPES:
            return value
        near = nearest_accelerator(value)
        hint = f"did you mean {near!r}?" if near else f"one of {', '.join(ACCELERATOR_TYPES)}"
        raise ValueError(f"Ray knows no accelerator type {value!r}: {hint}")

    @model_validator(mode="after")
    def _check_together(self) -> LlmParameters:
        if self.gpu_fraction is not None and self.tensor_parallel * self.pipeline_parallel > 1:
            raise ValueError("gpu_fraction is for one GPU: leave tensor_parallel and pipeline_parallel at 1")
        both = [name for name in SCALING if name in self.model_fields_set]
        if self.num_replicas is not None and both:
            raise ValueError(f"num_replicas is for an app that does not scale: take out {' and '.join(both)}")
        _check_order("min_replicas", self.min_replicas, "max_replicas", self.max_replicas)
        _check_order("ingress_min_replicas", self.ingress_min, "ingress_max_replicas", self.ingress_max)
        check_policy(self.scaling_policy, self.max_replicas)
        if self.initial_replicas is not None:
            _check_order("min_replicas", self.min_replicas, "initial_replicas", self.initial_replicas)
            _check_order("initial_replicas", self.initial_replicas, "max_replicas", self.max_replicas)
        if self.num_replicas is None and self.max_ongoing_requests < self.target_ongoing_requests:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is below target_ongoing_requests "
                f"({self.target_ongoing_requests:g}): the app would never scale up"
            )
        if self.user_config and self.server_class is None:
            raise ValueError("user_config needs a server_class: Ray's own LLMServer would not start with it")
        return self

    @property
    def fewest(self) -> int:
        return self.min_replicas if self.num_replicas is None else self.num_replicas

    @property
    def most(self) -> int:
        return self.max_replicas if self.num_replicas is None else self.num_replicas

    @property
    def ingress_min(self) -> int:
        return self.fewest if self.ingress_min_replicas is None else self.ingress_min_replicas

    @property
    def ingress_max(self) -> int:
        if self.ingress_max_replicas is None:
            return max(self.most, self.ingress_min)
        return self.ingress_max_replicas


def _check_order(low_name: str, low: int, high_name: str, high: int) -> None:
    if low > high:
        raise ValueError(f"{low_name} ({low}) is above {high_name} ({high})")
