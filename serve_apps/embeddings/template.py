"""Turns the parameters of an `embeddings` app into one entry of Serve's `applications`."""

from __future__ import annotations

from typing import Any, Literal

from serve_apps.embeddings.parameters import EmbeddingsParameters
from serve_apps.template import AppCode, RayNeed, ReplicaDemand, entry, offline

PARAMETERS = EmbeddingsParameters
# It speaks another part of it: nothing there answers a chat.
OPENAI_API = False

IMPORT_PATH = "serve_apps.embeddings.app:build"
DEPLOYMENT = "Embeddings"


def model_source(parameters: EmbeddingsParameters) -> dict[str, Any]:
    return {"id": parameters.model_id, **parameters.model_source.model_dump()}


def code(_: EmbeddingsParameters) -> AppCode:
    return AppCode(template="embeddings")


def ray_needs(parameters: EmbeddingsParameters) -> list[RayNeed]:
    return parameters.needs()


def demand(parameters: EmbeddingsParameters) -> ReplicaDemand:
    gpus = parameters.gpu_fraction or 1
    return ReplicaDemand(
        gpus=gpus,
        gpus_per_host=gpus,
        min_replicas=parameters.fewest,
        max_replicas=parameters.most,
        minimum_cpus=parameters.fewest * parameters.cpus_per_replica,
    )


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: EmbeddingsParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    code_uri: str | None = None,
) -> dict[str, Any]:
    """One entry of `applications`. What the model is stands in `args`: a change there replaces the replicas. Sizes of
    batches are `user_config`, which running replicas are given."""
    on_gpus = accelerator != "cpu"
    return entry(
        name=name,
        route_prefix=route_prefix,
        import_path=IMPORT_PATH,
        env_vars=offline(parameters.env_vars),
        code_uri=code_uri,
        logging_config=parameters.logging_config,
        args={
            "model_id": parameters.model_id,
            "model_path": model_path,
            "pooling": parameters.pooling,
            "normalize": parameters.normalize,
            "max_length": parameters.max_length,
            "dtype": parameters.dtype,
            # PyTorch calls AMD's GPUs so, too.
            "device": "cuda" if on_gpus else "cpu",
        },
        deployments=[
            {
                "name": DEPLOYMENT,
                **parameters.overrides(),
                "user_config": {
                    "max_batch_size": parameters.max_batch_size,
                    "batch_wait_timeout_s": parameters.batch_wait_timeout_s,
                },
                "ray_actor_options": {
                    "num_cpus": parameters.cpus_per_replica,
                    "num_gpus": (parameters.gpu_fraction or 1) if on_gpus else 0,
                },
            }
        ],
    )
