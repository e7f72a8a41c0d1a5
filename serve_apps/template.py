"""What an app template offers: typed parameters, one entry of Serve's config, and what a replica needs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel


@dataclass(frozen=True)
class ReplicaDemand:
    """What the replicas of an app ask of a pool.

    gpus            GPUs of one replica; below 1 a share of one GPU
    gpus_per_host   GPUs that one replica needs on one host
    memory_fraction share of each GPU's memory that the engine takes
    minimum_cpus    CPUs of all replicas that the app starts with, ingress included
    """

    gpus: float
    gpus_per_host: float
    min_replicas: int
    max_replicas: int
    memory_fraction: float | None = None
    minimum_cpus: float = 0


@dataclass(frozen=True)
class Template:
    """One folder of `serve_apps`."""

    name: str
    parameters: type[BaseModel]
    render: Callable[..., dict[str, Any]]
    demand: Callable[..., ReplicaDemand]
    model_source: Callable[..., dict[str, Any] | None]
    openai_api: bool


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
        model_source=module.model_source,
        openai_api=module.OPENAI_API,
    )
