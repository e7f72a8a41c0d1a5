"""What an app template offers: typed parameters, one entry of Serve's config, and what a replica needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

# What the weights are for, where an app has one model.
ONLY_MODEL = "model"


class LoggingConfig(BaseModel):
    """What Serve writes into its logs, in session_latest/logs/serve of Ray's temp_dir."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    encoding: Literal["TEXT", "JSON"] = Field("TEXT", description="of each line")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field("INFO", description="and above")
    enable_access_log: bool = Field(True, description="a line for each request")
    additional_log_standard_attrs: tuple[str, ...] = Field(
        (), description="attributes of Python's log records that each line gets, such as `thread`"
    )


@dataclass(frozen=True)
class ReplicaDemand:
    """What the replicas of an app ask of a pool.

    gpus            GPUs of one replica; below 1 a share of one GPU
    gpus_per_host   GPUs that one replica needs on one host
    memory_fraction share of each GPU's memory that the engine takes
    minimum_cpus    CPUs of all replicas that the app starts with, ingress included
    gpu_memory_gib  what one replica takes of a GPU's memory, where its share of a GPU follows from that
    parameter       the parameter that says all this of one of several deployments
    """

    gpus: float
    gpus_per_host: float
    min_replicas: int
    max_replicas: int
    memory_fraction: float | None = None
    minimum_cpus: float = 0
    gpu_memory_gib: float | None = None
    parameter: str = ""


def gpu_share(gpu_memory_gib: float, of: float | None) -> float:
    """What a replica takes of one GPU, so that Ray puts no more on it than its memory (`of`, in GiB) holds; a whole
    one where nobody says how much that is. Ray counts in ten-thousandths. The rest is left off: three thirds are one.
    """
    if of is None or gpu_memory_gib >= of:
        return 1
    return max(1, int(gpu_memory_gib / of * 10000 + 1e-6)) / 10000


@dataclass(frozen=True)
class AppCode:
    """The code that an app imports, which has to lie on every host.

    template  the kit's own: the modules of this folder of `serve_apps` that run in replicas
    folder    the site's: absolute, or relative to the inventory
    module    what Serve imports first; it has to be in the folder
    parameter the parameter that names the folder
    """

    template: str = ""
    folder: str = ""
    module: str = ""
    parameter: str = ""


def parts(parameters: BaseModel, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], BaseModel]]:
    """The parameters, and every block of parameters in them, each with its path."""
    yield path, parameters
    for name in type(parameters).model_fields:
        value = getattr(parameters, name)
        if isinstance(value, BaseModel):
            yield from parts(value, (*path, name))
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from parts(item, (*path, name, index))


def model_arguments(paths: Mapping[str, str]) -> dict[str, Any]:
    """How `render` is given where the models lie, by what each is for."""
    return {"model_path": paths.get(ONLY_MODEL, "")} if paths.keys() <= {ONLY_MODEL} else {"model_paths": paths}


def offline(env_vars: Mapping[str, str]) -> dict[str, str]:
    """An app's environment: the weights lie on the host, so nothing is to be looked up outside."""
    return {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **env_vars}


def entry(
    *,
    name: str,
    route_prefix: str,
    import_path: str,
    env_vars: Mapping[str, str],
    deployments: Sequence[dict[str, Any]],
    args: Mapping[str, Any] | None = None,
    code_uri: str | None = None,
    logging_config: LoggingConfig | None = None,
) -> dict[str, Any]:
    """One entry of `applications`. Serve hashes `args` and `runtime_env` and replaces all replicas when they change;
    what stands under `deployments` is applied to the running ones."""
    runtime_env: dict[str, Any] = {"env_vars": dict(env_vars)}
    if code_uri is not None:
        runtime_env["working_dir"] = code_uri
    app: dict[str, Any] = {
        "name": name,
        "route_prefix": route_prefix,
        "import_path": import_path,
        "runtime_env": runtime_env,
    }
    if args:
        app["args"] = dict(args)
    app["deployments"] = list(deployments)
    if logging_config is not None:
        app["logging_config"] = logging_config.model_dump(mode="json")
    return app


def _no_code(_: BaseModel) -> AppCode | None:
    return None


@dataclass(frozen=True)
class RayNeed:
    """A parameter of an app that older Rays cannot obey; `ray` is the first that was seen to."""

    parameter: str
    ray: str


def _no_needs(_: BaseModel) -> list[RayNeed]:
    return []


def _no_names(_: BaseModel) -> list[str]:
    return []


@dataclass(frozen=True)
class Template:
    """One folder of `serve_apps`."""

    name: str
    parameters: type[BaseModel]
    render: Callable[..., dict[str, Any]]
    demand: Callable[..., ReplicaDemand | Sequence[ReplicaDemand]]
    model_sources: Callable[..., Mapping[str, dict[str, Any]]]
    openai_api: bool
    code: Callable[..., AppCode | None] = _no_code
    ray_needs: Callable[..., list[RayNeed]] = _no_needs
    # Parameters that are obeyed by an ingress only.
    needs_ingress: Callable[..., list[str]] = _no_names
    # Whether `render` takes direct_streaming: true where requests go to replicas without an ingress of the app's.
    direct_streaming: bool = False
    # Whether `render` takes gpu_memory_gib, what a GPU of the pool has.
    gpu_memory: bool = False

    def demands(self, parameters: BaseModel, gpu_memory_gib: float | None = None) -> tuple[ReplicaDemand, ...]:
        """What each deployment of the app asks of its pool, whose GPUs have so much memory."""
        asked = self.demand(parameters)
        return tuple(
            item if item.gpu_memory_gib is None else _share(item, gpu_share(item.gpu_memory_gib, gpu_memory_gib))
            for item in ((asked,) if isinstance(asked, ReplicaDemand) else asked)
        )


def _share(demand: ReplicaDemand, gpus: float) -> ReplicaDemand:
    return replace(demand, gpus=gpus, gpus_per_host=gpus)


def _sources(module: Any) -> Callable[..., Mapping[str, dict[str, Any]]]:
    """By what each model is for. The first is the one that clients ask for by its id; `render` gets `model_path` of
    the only one, or `model_paths`."""
    if hasattr(module, "model_sources"):
        several: Callable[..., Mapping[str, dict[str, Any]]] = module.model_sources
        return several

    def sources(parameters: BaseModel) -> dict[str, dict[str, Any]]:
        source = module.model_source(parameters)
        return {ONLY_MODEL: source} if source else {}

    return sources


def names() -> list[str]:
    """Every template that this checkout has."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob("*/template.py"))


@cache
def load(name: str) -> Template:
    """The template `name`; KeyError where there is none."""
    if name not in names():
        raise KeyError(name)
    module = importlib.import_module(f"serve_apps.{name}.template")
    return Template(
        name=name,
        parameters=module.PARAMETERS,
        render=module.render,
        demand=module.demand,
        model_sources=_sources(module),
        openai_api=module.OPENAI_API,
        code=getattr(module, "code", _no_code),
        ray_needs=getattr(module, "ray_needs", _no_needs),
        needs_ingress=getattr(module, "needs_ingress", _no_names),
        direct_streaming=getattr(module, "DIRECT_STREAMING", False),
        gpu_memory=getattr(module, "GPU_MEMORY", False),
    )
