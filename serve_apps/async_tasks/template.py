"""Turns the parameters of an `async_tasks` app into one entry of Serve's `applications`."""

from __future__ import annotations

from typing import Any, Literal

from serve_apps.async_tasks.parameters import AsyncTasksParameters
from serve_apps.template import AppCode, RayNeed, ReplicaDemand, entry

PARAMETERS = AsyncTasksParameters
OPENAI_API = False

IMPORT_PATH = "serve_apps.async_tasks.app:build"
API, WORKER = "Api", "Worker"
# More than nothing, so that none lands on a head that offers no CPU; it only passes tasks on.
API_CPUS = 0.1
API_ONGOING = 200

RULES = (
    "max_retries",
    "retry_backoff_s",
    "retry_backoff_max_s",
    "lease_s",
    "max_queued_tasks",
    "result_ttl_s",
    "dead_letter_ttl_s",
)


def model_source(_: AsyncTasksParameters) -> None:
    """Weights are the work's own business."""


def code(parameters: AsyncTasksParameters) -> AppCode:
    """The kit's own, and the site's beside it."""
    if parameters.code is None or parameters.import_path is None:
        return AppCode(template="async_tasks")
    module = parameters.import_path.partition(":")[0]
    return AppCode(template="async_tasks", folder=parameters.code, module=module, parameter="code")


def ray_needs(parameters: AsyncTasksParameters) -> list[RayNeed]:
    return parameters.needs()


def demand(parameters: AsyncTasksParameters) -> ReplicaDemand:
    return ReplicaDemand(
        gpus=parameters.gpus_per_replica,
        gpus_per_host=parameters.gpus_per_replica,
        min_replicas=parameters.fewest,
        max_replicas=parameters.most,
        minimum_cpus=parameters.fewest * parameters.cpus_per_replica + parameters.api_replicas * API_CPUS,
    )


def render(
    *,
    name: str,
    route_prefix: str,
    parameters: AsyncTasksParameters,
    accelerator: Literal["rocm", "cuda", "cpu"],
    model_path: str,
    cache_path: str | None = None,
    code_uri: str | None = None,
) -> dict[str, Any]:
    """One entry of `applications`. Where the tasks are and what the work is stands in `args`: a change there replaces
    the replicas. How often it is tried, and for how long, is `user_config`, which running replicas are given."""
    redis = {
        "url": parameters.redis_url,
        "password_env": parameters.redis_password_env,
        "password_file": parameters.redis_password_file,
        "ca_file": parameters.redis_ca_file,
    }
    work = {"import_path": parameters.import_path, "args": parameters.args, "forward_to": parameters.forward_to}
    config = {
        "rules": {rule: getattr(parameters, rule) for rule in RULES},
        "task_timeout_s": parameters.task_timeout_s,
        "max_payload_bytes": parameters.max_payload_bytes,
    }
    return entry(
        name=name,
        route_prefix=route_prefix,
        import_path=IMPORT_PATH,
        env_vars=parameters.env_vars,
        code_uri=code_uri,
        logging_config=parameters.logging_config,
        args={
            "queue": parameters.queue_name or name,
            "redis": {key: value for key, value in redis.items() if value is not None},
            **{key: value for key, value in work.items() if value},
        },
        deployments=[
            {
                "name": API,
                "num_replicas": parameters.api_replicas,
                "max_ongoing_requests": API_ONGOING,
                "user_config": {**config, "window": parameters.window},
                "ray_actor_options": {"num_cpus": API_CPUS, "num_gpus": 0},
            },
            {
                "name": WORKER,
                **parameters.overrides(),
                "user_config": config,
                "ray_actor_options": {
                    "num_cpus": parameters.cpus_per_replica,
                    "num_gpus": parameters.gpus_per_replica if accelerator != "cpu" else 0,
                },
            },
        ],
    )
