"""The version table: which Ray, vLLM and driver go together. Data in `clusterkit/stacks.yaml`."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict

from clusterkit.spec.facts import Accelerator


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Engine(_Row):
    """How the engine is installed in the venv runtime."""

    requirements: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    provides_vllm: str | None = None
    find_links: tuple[str, ...] = ()
    extra_index_urls: tuple[str, ...] = ()
    python: tuple[str, ...]
    system_packages: tuple[str, ...] = ()
    note: str = ""


class Image(_Row):
    """How the engine's image is built: a folder of images/vllm/, and what it needs.

    From released wheels on Debian: `python` and `glibc` of the base, and its `packages`. From vLLM's source on the
    row's `base_image`: `requirements` beside Ray, and `base_recipe`, a Dockerfile in vLLM's source that makes a base
    with torch out of `base_image` where that has none.
    """

    recipe: str
    python: str = ""
    glibc: str = ""
    packages: tuple[str, ...] = ()
    requirements: tuple[str, ...] = ()
    base_recipe: str = ""

    @property
    def from_source(self) -> bool:
        return not self.glibc


class Driver(_Row):
    """The kernel driver, a pin of its own since ROCm 7.0."""

    name: Literal["amdgpu", "nvidia"]
    version: str = ""


class Stack(_Row):
    """One row. An empty string is a version that no source has shown: pin it in the inventory."""

    name: str
    accelerator: Accelerator
    ray: str
    ray_extra: str
    vllm: str
    rocm: str = ""
    cuda: str = ""
    driver: Driver | None = None
    base_image: str = ""
    base_image_digest: str = ""
    prebuilt_image: str = ""
    engine: Engine | None = None
    image: Image | None = None
    sources: tuple[str, ...] = ()


class StackTable(_Row):
    rows: tuple[Stack, ...]
    ray_llm_extra: dict[str, str]
    gpu_archs: dict[str, str]

    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def get(self, name: str) -> Stack | None:
        return next((row for row in self.rows if row.name == name), None)

    def pairs(self) -> list[tuple[str, str]]:
        """The (Ray, vLLM) pairs that the rows were made of."""
        return sorted({(row.ray, row.vllm) for row in self.rows})

    def pair_problem(self, ray: str, vllm: str) -> str | None:
        """Why this pair does not go together; None where it does, by a row or by ray[llm]'s own bound.

        The bounds are those of the Ray wheels' `llm` extra.
        """
        if (ray, vllm) in self.pairs():
            return None
        bound = self.ray_llm_extra.get(ray)
        try:
            fits = bound is not None and Version(vllm) in SpecifierSet(bound)
        except InvalidVersion:
            return f"{vllm!r} is not a version"
        if fits:
            return None
        if bound is None:
            return f"Ray {ray} is in no row of the version table"
        return f"Ray {ray} asks for vLLM {bound}, not {vllm}"


@cache
def table() -> StackTable:
    """The table that this release ships."""
    text = resources.files("clusterkit").joinpath("stacks.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return StackTable.model_validate(data)
