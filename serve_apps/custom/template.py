"""Turns the parameters of a `custom` app into one entry of Serve's `applications`."""

from __future__ import annotations

from typing import Any, Literal

from serve_apps.custom.parameters import CustomParameters, Deployment
from serve_apps.template import AppCode, RayNeed, ReplicaDemand, entry

PARAMETERS = CustomParameters
OPENAI_API = False

ACTOR_OPTIONS = {"num_cpus", "num_gpus", "memory", "resources", "accelerator_type"}


def model_source(_: CustomParameters) -> None:
    """Weights are the code's own business."""


def code(parameters: CustomParameters) -> AppCode:
    module = parameters.import_path.partition(":")[0]
    return AppCode(folder=parameters.code, module=module, parameter="code")


def ray_needs(parameters: CustomParameters) -> list[RayNeed]:
    items = enumerate(parameters.deployments)
    return [RayNeed(f"deployments.{n}.{need.parameter}", need.ray) for n, item in items for need in item.needs()]


def demand(parameters: CustomParameters) -> tuple[ReplicaDemand, ...]:
    """What the inventory says; deployments that it does not name ask for what their code says."""
    return tuple(
        ReplicaDemand(
            gpus=item.num_gpus,
            gpus_per_host=item.num_gpus,
            min_replicas=item.fewest,
            max_replicas=item.most,
            minimum_cpus=item.fewest * item.num_cpus,
        )
        for item in parameters.deployments
    )


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: CustomParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    code_uri: str | None = None,
) -> dict[str, Any]:
    """One entry of `applications`. Another code is another `code_uri`, and so other replicas."""
    return entry(
        name=name,
        route_prefix=route_prefix,
        import_path=parameters.import_path,
        env_vars=parameters.env_vars,
        code_uri=code_uri,
        logging_config=parameters.logging_config,
        args=parameters.args,
        deployments=[_deployment(item, accelerator) for item in parameters.deployments],
    )


def _deployment(item: Deployment, accelerator: str) -> dict[str, Any]:
    """What the inventory says of it, and no more: all else is as the code has it."""
    said = item.model_fields_set
    entry = {"name": item.name, **item.overrides(said)}
    if said & ACTOR_OPTIONS:
        entry["ray_actor_options"] = _actor_options(item, accelerator)
    if item.user_config is not None:
        entry["user_config"] = item.user_config
    return entry


def _actor_options(item: Deployment, accelerator: str) -> dict[str, Any]:
    """All of them: Serve takes these for the code's own, as a whole."""
    on_gpus = accelerator != "cpu"
    options: dict[str, Any] = {"num_cpus": item.num_cpus, "num_gpus": item.num_gpus if on_gpus else 0}
    if item.memory is not None:
        options["memory"] = item.memory
    if item.resources:
        options["resources"] = item.resources
    if item.accelerator_type is not None and on_gpus:
        options["accelerator_type"] = item.accelerator_type
    return options
