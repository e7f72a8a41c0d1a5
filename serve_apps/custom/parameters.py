"""Parameters of a `custom` app: the site's own code, and what each of its deployments is given."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, field_validator

from serve_apps.replicas import Number, Replicas, Strict
from serve_apps.template import LoggingConfig


class Deployment(Replicas):
    """One `@serve.deployment` of the code, by its name."""

    DEFAULTS_ARE_RENDERED: ClassVar[bool] = False

    name: Annotated[str, Field(min_length=1)] = Field(
        description="as the code calls it; its class where it says nothing"
    )
    num_cpus: Number = Field(1, ge=0, description="CPUs that Ray sets aside for one replica")
    num_gpus: Number = Field(0, ge=0, description="GPUs of one replica; below 1 a share of one")
    memory: Number | None = Field(None, gt=0, description="bytes of memory that Ray sets aside for one replica")
    resources: dict[str, Number] = Field({}, description="other resources that Ray sets aside for one replica")
    accelerator_type: str | None = Field(
        None, description="only on this accelerator, by Ray's name (`AMD-Instinct-MI300X-OAM`)"
    )
    user_config: dict[str, Any] | None = Field(
        None, description="given to `reconfigure`, also while the replicas run; none: the code's own"
    )

    @field_validator("num_gpus")
    @classmethod
    def _whole_above_one(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("above 1 it has to be a whole number: Ray gives a share of one GPU only")
        return value


class CustomParameters(Strict):
    """The site's own app."""

    code: Annotated[str, Field(min_length=1)] = Field(
        description="folder on the controller where imports begin: absolute, or relative to the inventory, not in it"
    )
    import_path: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")] = Field(
        description="what Serve imports, `module:name`: an app, or a function that makes one of `args`"
    )
    args: dict[str, Any] = Field({}, description="for that function")
    env_vars: dict[str, str] = Field({}, description="environment of the replicas")
    logging_config: LoggingConfig | None = Field(None, description="instead of `clusterkit_serve.logging_config`")
    deployments: tuple[Deployment, ...] = Field(
        (), description="what the inventory says of single deployments; all else is as the code has it"
    )

    @field_validator("deployments")
    @classmethod
    def _once(cls, value: tuple[Deployment, ...]) -> tuple[Deployment, ...]:
        names = [deployment.name for deployment in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice!r} stands there twice: say all of it in one place")
        return value
