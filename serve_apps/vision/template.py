"""Turns the parameters of a `vision` app into one entry of Serve's `applications`."""

from __future__ import annotations

from typing import Any, Literal

from serve_apps.replicas import AUTOSCALING
from serve_apps.template import AppCode, RayNeed, ReplicaDemand, entry, offline
from serve_apps.vision.parameters import VisionParameters

PARAMETERS = VisionParameters
OPENAI_API = False

IMPORT_PATH = "serve_apps.vision.app:build"
INGRESS, CLASSIFIER = "Ingress", "Classifier"
# More than nothing, so that none lands on a head that offers no CPU; it only looks at headers.
INGRESS_CPUS = 0.1
# Requests wait in it for a replica that starts.
INGRESS_ONGOING = 1000


def model_source(parameters: VisionParameters) -> dict[str, Any]:
    return {"id": parameters.model_id, **parameters.model_source.model_dump()}


def code(_: VisionParameters) -> AppCode:
    return AppCode(template="vision")


def ray_needs(parameters: VisionParameters) -> list[RayNeed]:
    return parameters.needs()


def demand(parameters: VisionParameters) -> ReplicaDemand:
    gpus = parameters.gpu_fraction or 1
    return ReplicaDemand(
        gpus=gpus,
        gpus_per_host=gpus,
        min_replicas=parameters.fewest,
        max_replicas=parameters.most,
        minimum_cpus=parameters.fewest * parameters.cpus_per_replica + max(1, parameters.fewest) * INGRESS_CPUS,
    )


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: VisionParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    code_uri: str | None = None,
) -> dict[str, Any]:
    """One entry of `applications`. What the model is stands in `args`: a change there replaces the replicas. Limits,
    waiting and sizes of batches are `user_config`, which running replicas are given."""
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
            "dtype": parameters.dtype,
            # PyTorch calls AMD's GPUs so, too.
            "device": "cuda" if on_gpus else "cpu",
            "readers": max(1, int(parameters.cpus_per_replica)),
        },
        deployments=[
            _ingress(parameters),
            {
                "name": CLASSIFIER,
                **parameters.overrides(),
                "user_config": {
                    "max_batch_size": parameters.max_batch_size,
                    "batch_wait_timeout_s": parameters.batch_wait_timeout_s,
                },
                "ray_actor_options": {
                    "num_cpus": parameters.cpus_per_replica,
                    "num_gpus": (parameters.gpu_fraction or 1) if on_gpus else 0,
                },
            },
        ],
    )


def _ingress(parameters: VisionParameters) -> dict[str, Any]:
    """As many as classifiers, but one at least: it takes the request that wakes the model, refuses what is no image
    without waking it, and costs next to nothing."""
    # A policy is about what the model needs; whoever waits for it waits in here.
    update: dict[str, Any] = {"min_replicas": max(1, parameters.min_replicas), "scaling_policy": None}
    if parameters.initial_replicas is not None:
        update["initial_replicas"] = max(1, parameters.initial_replicas)
    scaling = parameters.model_copy(update=update).overrides({*AUTOSCALING, "graceful_shutdown_wait_loop_s"})
    return {
        "name": INGRESS,
        **scaling,
        "max_ongoing_requests": INGRESS_ONGOING,
        # Its requests may last so long.
        "graceful_shutdown_timeout_s": max(parameters.graceful_shutdown_timeout_s, parameters.response_timeout_s),
        "user_config": {
            "top_k": parameters.top_k,
            "max_image_bytes": int(parameters.max_image_mib * 2**20),
            "max_pixels": parameters.max_pixels,
            "response_timeout_s": parameters.response_timeout_s,
        },
        "ray_actor_options": {"num_cpus": INGRESS_CPUS, "num_gpus": 0},
    }
