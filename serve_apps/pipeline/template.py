"""Turns the parameters of a `pipeline` app into one entry of Serve's `applications`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from serve_apps.pipeline.parameters import Classifier, Generator, PipelineParameters
from serve_apps.replicas import AUTOSCALING
from serve_apps.template import AppCode, RayNeed, ReplicaDemand, entry, gpu_share, offline

PARAMETERS = PipelineParameters
# It chats, but the probe's question might be one that the site's classifier blocks.
OPENAI_API = False
# A replica's share of a GPU is a part of its memory.
GPU_MEMORY = True

IMPORT_PATH = "serve_apps.pipeline.app:build"
INGRESS, CLASSIFIER, GENERATOR = "Ingress", "Classifier", "Generator"
# More than nothing, so that none lands on a head that offers no CPU; it only passes texts on.
INGRESS_CPUS = 0.1
# Its requests wait in it for the other two, whose own limits count.
INGRESS_ONGOING = 1000


def model_sources(parameters: PipelineParameters) -> dict[str, dict[str, Any]]:
    generator, classifier = parameters.generator.model_source, parameters.classifier.model_source
    return {
        "generator": {"id": parameters.model_id, **generator.model_dump()},
        "classifier": {"id": f"{parameters.model_id}-classifier", **classifier.model_dump()},
    }


def code(_: PipelineParameters) -> AppCode:
    return AppCode(template="pipeline")


def ray_needs(parameters: PipelineParameters) -> list[RayNeed]:
    parts = {"classifier": parameters.classifier, "generator": parameters.generator}
    return [RayNeed(f"{name}.{need.parameter}", need.ray) for name, part in parts.items() for need in part.needs()]


def demand(parameters: PipelineParameters) -> tuple[ReplicaDemand, ...]:
    ingress = parameters.generator.fewest * INGRESS_CPUS
    # A classifier without memory on a GPU runs on CPUs, a generator has a GPU for itself.
    return (
        _demand("classifier", parameters.classifier, 1 if parameters.classifier.gpu_memory_gib else 0),
        _demand("generator", parameters.generator, 1, ingress),
    )


def _demand(name: str, part: Classifier | Generator, gpus: float, more_cpus: float = 0) -> ReplicaDemand:
    return ReplicaDemand(
        gpus=gpus,
        gpus_per_host=gpus,
        min_replicas=part.fewest,
        max_replicas=part.most,
        minimum_cpus=part.fewest * part.cpus_per_replica + more_cpus,
        gpu_memory_gib=part.gpu_memory_gib,
        parameter=name,
    )


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: PipelineParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_paths: Mapping[str, str],
    cache_path: str | None = None,
    code_uri: str | None = None,
    gpu_memory_gib: float | None = None,
) -> dict[str, Any]:
    """One entry of `applications`; `gpu_memory_gib` is what a GPU of the pool has. What the models are stands in
    `args`: a change there replaces all replicas. What is blocked, how long answers are and how large batches is
    `user_config`, which running replicas are given."""
    classifier, generator = parameters.classifier, parameters.generator
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
            "max_prompt_chars": parameters.max_prompt_chars,
            "classifier": {
                **_model(classifier, model_paths["classifier"], on_gpus and classifier.gpu_memory_gib is not None),
                "max_length": classifier.max_length,
            },
            "generator": _model(generator, model_paths["generator"], on_gpus),
        },
        deployments=[
            {
                "name": INGRESS,
                # As many as generators: they come and go with the same load, and end as slowly.
                **generator.overrides({*AUTOSCALING, "graceful_shutdown_wait_loop_s", "graceful_shutdown_timeout_s"}),
                "max_ongoing_requests": INGRESS_ONGOING,
                "ray_actor_options": {"num_cpus": INGRESS_CPUS, "num_gpus": 0},
            },
            {
                "name": CLASSIFIER,
                **classifier.overrides(),
                "user_config": {
                    "block_labels": list(classifier.block_labels),
                    "threshold": classifier.threshold,
                    "max_batch_size": classifier.max_batch_size,
                    "batch_wait_timeout_s": classifier.batch_wait_timeout_s,
                },
                "ray_actor_options": _resources(classifier, on_gpus, 0, gpu_memory_gib),
            },
            {
                "name": GENERATOR,
                **generator.overrides(),
                "user_config": {"max_new_tokens": generator.max_new_tokens},
                "ray_actor_options": _resources(generator, on_gpus, 1, gpu_memory_gib),
            },
        ],
    )


def _model(part: Classifier | Generator, path: str, on_gpu: bool) -> dict[str, Any]:
    return {
        "model_path": path,
        "dtype": part.dtype,
        # PyTorch calls AMD's GPUs so, too.
        "device": "cuda" if on_gpu else "cpu",
    }


def _resources(part: Classifier | Generator, on_gpus: bool, otherwise: int, of: float | None) -> dict[str, Any]:
    gpus: float = otherwise if part.gpu_memory_gib is None else gpu_share(part.gpu_memory_gib, of)
    return {"num_cpus": part.cpus_per_replica, "num_gpus": gpus if on_gpus else 0}
