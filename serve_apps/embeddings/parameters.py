"""Parameters of an `embeddings` app: what an inventory may say about one model of sentences."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, model_validator

from serve_apps.llm.parameters import ModelSource
from serve_apps.replicas import Number, Positive, Replicas, Seconds
from serve_apps.template import LoggingConfig


class EmbeddingsParameters(Replicas):
    """One model, served with the OpenAI API for embeddings."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] = Field(
        description="the name that clients put into `model`"
    )
    model_source: ModelSource = Field(
        description="where the weights come from: `{hub: org/name, revision: commit}`, `{folder: /path}` or "
        "`{make: tiny-llama}`"
    )
    pooling: Literal["mean", "cls"] = Field(
        "mean", description="what of the model's last layer is the text: the mean of its tokens, or the first"
    )
    normalize: StrictBool = Field(True, description="whether embeddings have the length 1")
    max_length: StrictInt | None = Field(
        None,
        ge=1,
        description="tokens of one text; a longer one is refused. None: the model's own limit",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what the model calculates in")
    gpu_fraction: Number | None = Field(
        None, gt=0, lt=1, description="share of one GPU that a replica takes; a whole one where nothing is said"
    )
    cpus_per_replica: Positive = Field(1, description="CPUs that Ray sets aside for one replica, and threads on CPU")

    max_batch_size: StrictInt = Field(32, ge=1, description="texts that the model works on at a time")
    batch_wait_timeout_s: Seconds = Field(
        0.01, description="how long a text waits for others, so that they are worked on together"
    )
    # Not Serve's own 5: texts of so many requests come together in one batch.
    max_ongoing_requests: StrictInt = Field(64, ge=1, description="requests that one replica works on at a time")
    target_ongoing_requests: Positive = Field(32, description="requests per replica that scaling aims at")

    env_vars: dict[str, str] = Field({}, description="environment of the replicas")
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")

    @model_validator(mode="after")
    def _check_batches(self) -> EmbeddingsParameters:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is below max_batch_size ({self.max_batch_size}): "
                "texts of single requests would never fill a batch"
            )
        return self
