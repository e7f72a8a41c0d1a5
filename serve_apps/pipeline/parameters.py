"""Parameters of a `pipeline` app: a classifier that looks at texts, and a generator that answers the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictInt, field_validator

from serve_apps.llm.parameters import MadeModel, ModelSource
from serve_apps.replicas import Number, Positive, Replicas, Seconds, Strict
from serve_apps.template import LoggingConfig

Dtype = Literal["float32", "bfloat16", "float16"]


class Classifier(Replicas):
    """What looks at each text: a model for the classification of sequences."""

    model_source: ModelSource = Field(
        description="where its weights come from: `{hub: org/name, revision: commit}` or `{folder: /path}`"
    )
    block_labels: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="labels of the model (`id2label` in its config.json) that block a text"
    )
    threshold: Annotated[Number, Field(gt=0, le=1)] = Field(0.5, description="the score from which a label blocks")
    max_length: StrictInt | None = Field(
        None,
        ge=8,
        description="tokens that it looks at at a time, of a longer text one part after the other; the model's own "
        "limit where nothing is said",
    )
    dtype: Dtype = Field("float32", description="what it calculates in")
    gpu_memory_gib: Number | None = Field(
        None, gt=0, description="what a replica takes of a GPU's memory; without it the classifier runs on CPUs"
    )
    cpus_per_replica: Positive = Field(1, description="CPUs that Ray sets aside for one replica, and threads on CPU")
    max_batch_size: StrictInt = Field(32, ge=1, description="texts that it looks at together")
    batch_wait_timeout_s: Seconds = Field(0.01, description="how long a text waits for others")
    # Not Serve's own 5: texts of so many requests come together in one batch.
    max_ongoing_requests: StrictInt = Field(64, ge=1, description="texts that one replica has at a time")
    target_ongoing_requests: Positive = Field(32, description="texts per replica that scaling aims at")

    @field_validator("model_source")
    @classmethod
    def _classifies(cls, value: ModelSource) -> ModelSource:
        if isinstance(value, MadeModel):
            raise ValueError("tiny-llama classifies nothing: name a model that was trained for it, by hub or folder")
        return value


class Generator(Replicas):
    """What answers: a model with a chat template."""

    model_source: ModelSource = Field(description="where its weights come from, as with `llm`")
    max_new_tokens: StrictInt = Field(
        512, ge=1, description="tokens of an answer, at most; who asks for more gets an error"
    )
    dtype: Dtype = Field("bfloat16", description="what it calculates in")
    gpu_memory_gib: Number | None = Field(
        None, gt=0, description="what a replica takes of a GPU's memory; a whole GPU where nothing is said"
    )
    cpus_per_replica: Positive = Field(1, description="CPUs that Ray sets aside for one replica, and threads on CPU")
    # They are not batched: each is calculated beside the others, and needs its own room in the GPU's memory.
    max_ongoing_requests: StrictInt = Field(4, ge=1, description="answers that one replica works on at a time")
    graceful_shutdown_timeout_s: Seconds = Field(600, description="how long its answers may take until they are cut")


class PipelineParameters(Strict):
    """A chat with the OpenAI API, whose texts a classifier looks at first."""

    model_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")] = Field(
        description="the name that clients put into `model`"
    )
    classifier: Classifier = Field(description="what looks at each text")
    generator: Generator = Field(description="what answers")
    max_prompt_chars: StrictInt = Field(
        65536, ge=1, description="characters of all messages of a request: so much the classifier looks at, and no more"
    )
    env_vars: dict[str, str] = Field({}, description="environment of the replicas")
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")
