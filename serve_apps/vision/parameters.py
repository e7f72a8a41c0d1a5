"""Parameters of a `vision` app: what an inventory may say about one classifier of images."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, field_validator, model_validator

from serve_apps.llm.parameters import MadeModel, ModelSource
from serve_apps.replicas import Number, Positive, Replicas, Seconds
from serve_apps.template import LoggingConfig


class VisionParameters(Replicas):
    """One model that says what is in an image, with replicas only while somebody asks."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] = Field(
        description="the name of the model in answers"
    )
    model_source: ModelSource = Field(
        description="where the weights come from: `{hub: org/name, revision: commit}` or `{folder: /path}`"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what the model calculates in")
    gpu_fraction: Number | None = Field(
        None, gt=0, lt=1, description="share of one GPU that a replica takes; a whole one where nothing is said"
    )
    cpus_per_replica: Positive = Field(
        1, description="CPUs that Ray sets aside for one replica, and threads that read images"
    )

    top_k: StrictInt = Field(5, ge=1, le=1000, description="labels of an answer, where a request says no other number")
    max_image_mib: Positive = Field(10, description="size of one image; a larger one is refused")
    max_pixels: StrictInt = Field(
        50_000_000, ge=1, description="width by height; a larger image is refused before it is decoded"
    )
    response_timeout_s: Positive = Field(
        300, description="how long a request waits for its answer, a replica's start included; then it gets 503"
    )
    max_batch_size: StrictInt = Field(32, ge=1, description="images that the model works on at a time")
    batch_wait_timeout_s: Seconds = Field(
        0.01, description="how long an image waits for others, so that they are worked on together"
    )

    min_replicas: StrictInt = Field(0, ge=0, description="never fewer; 0 lets an idle model go away")
    # Not Serve's own 5: images of so many requests come together in one batch.
    max_ongoing_requests: StrictInt = Field(64, ge=1, description="images that one replica has at a time")
    target_ongoing_requests: Positive = Field(32, description="images per replica that scaling aims at")

    env_vars: dict[str, str] = Field({}, description="environment of the replicas")
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")

    @field_validator("model_source")
    @classmethod
    def _sees(cls, value: ModelSource) -> ModelSource:
        if isinstance(value, MadeModel):
            raise ValueError("tiny-llama sees nothing: name a model that classifies images, by hub or folder")
        return value

    @model_validator(mode="after")
    def _check_batches(self) -> VisionParameters:
        if self.max_ongoing_requests < self.max_batch_size:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is below max_batch_size ({self.max_batch_size}): "
                "images of single requests would never fill a batch"
            )
        return self
