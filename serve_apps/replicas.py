"""What can be said of the replicas of any deployment, by Serve's own names: how many, how busy, how looked after.

All of it is rendered under `deployments`, where Serve applies it without a restart of the replicas.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, model_validator

from serve_apps.policy.parameters import ScalingPolicy
from serve_apps.template import RayNeed

Number = StrictInt | StrictFloat
Seconds = Annotated[Number, Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]

AUTOSCALING = (
    "min_replicas",
    "max_replicas",
    "initial_replicas",
    "target_ongoing_requests",
    "upscale_delay_s",
    "downscale_delay_s",
    "downscale_to_zero_delay_s",
)
LOOKED_AFTER = (
    "max_ongoing_requests",
    "max_queued_requests",
    "health_check_period_s",
    "health_check_timeout_s",
    "graceful_shutdown_wait_loop_s",
    "graceful_shutdown_timeout_s",
)
# Left to Ray where nothing is said. The last two are in the schema of Ray 2.60.0, and not in that of 2.52.1.
OPTIONAL = ("max_replicas_per_node", "rolling_update_percentage", "max_surge_percent")
RAY_2_60 = OPTIONAL[1:]
# Ray 2.52.1 gives a policy no arguments.
POLICY = "scaling_policy"


class Strict(BaseModel):
    """Parameters that an inventory gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Replicas(Strict):
    """A fixed number of replicas, or one that follows the load."""

    # Else what the inventory does not say is as the code has it, and not known here.
    DEFAULTS_ARE_RENDERED: ClassVar[bool] = True

    num_replicas: StrictInt | None = Field(
        None, ge=1, description="so many replicas, always; instead of `min_replicas` and what goes with it"
    )
    min_replicas: StrictInt = Field(1, ge=0, description="never fewer; 0 lets an idle app go away")
    max_replicas: StrictInt = Field(1, ge=1, description="never more")
    initial_replicas: StrictInt | None = Field(
        None,
        ge=0,
        description="after the first deploy, `min_replicas` where nothing is said; where given, again after each "
        "change of the app",
    )
    target_ongoing_requests: Positive = Field(2, description="requests per replica that scaling aims at")
    upscale_delay_s: Seconds = Field(30, description="load must stay high for so long before replicas are added")
    downscale_delay_s: Seconds = Field(600, description="load must stay low for so long before replicas are removed")
    downscale_to_zero_delay_s: Seconds | None = Field(
        None, description="the same for the last replica; `downscale_delay_s` where nothing is said"
    )
    max_replicas_per_node: StrictInt | None = Field(None, ge=1, le=100, description="at most so many on one host")
    scaling_policy: ScalingPolicy | None = Field(
        None,
        description="what the number goes by instead: requests that wait, replicas' own numbers, times of the week",
    )

    max_ongoing_requests: StrictInt = Field(5, ge=1, description="requests that one replica works on at a time")
    max_queued_requests: StrictInt = Field(
        -1, ge=-1, description="requests that each proxy lets wait; the rest gets 503. -1: no limit"
    )
    health_check_period_s: Positive = Field(10, description="how often a replica is asked whether it is well")
    health_check_timeout_s: Positive = Field(30, description="how long it may take to answer that")
    graceful_shutdown_wait_loop_s: Positive = Field(
        2, description="how often a replica that is to stop looks whether its requests are done"
    )
    graceful_shutdown_timeout_s: Seconds = Field(60, description="how long its requests may take until they are cut")
    rolling_update_percentage: Positive | None = Field(
        None, le=1, description="share of the replicas that are replaced at a time; Ray's own is 0.2, at least one"
    )
    max_surge_percent: StrictInt | None = Field(
        None, ge=0, le=100, description="so many more replicas may run while they are replaced; Ray's own is 0"
    )

    @model_validator(mode="after")
    def _check_replicas(self) -> Replicas:
        said = [name for name in (*AUTOSCALING, POLICY) if name in self.model_fields_set]
        if self.num_replicas is not None and said:
            raise ValueError(f"num_replicas is a fixed number, and {said[0]} belongs to scaling: take one of them out")
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        first = self.min_replicas if self.initial_replicas is None else self.initial_replicas
        if not self.min_replicas <= first <= self.max_replicas:
            raise ValueError(f"initial_replicas ({first}) is not between min_replicas and max_replicas")
        check_policy(self.scaling_policy, self.max_replicas)
        known = self.DEFAULTS_ARE_RENDERED or (said and "max_ongoing_requests" in self.model_fields_set)
        if known and self.num_replicas is None and self.max_ongoing_requests < self.target_ongoing_requests:
            raise ValueError(
                f"max_ongoing_requests ({self.max_ongoing_requests}) is below target_ongoing_requests "
                f"({self.target_ongoing_requests:g}): it would never scale up"
            )
        return self

    @property
    def fewest(self) -> int:
        return self.min_replicas if self.num_replicas is None else self.num_replicas

    @property
    def most(self) -> int:
        return self.max_replicas if self.num_replicas is None else self.num_replicas

    def needs(self) -> list[RayNeed]:
        """What older Rays would refuse."""
        return [RayNeed(name, "2.60.0") for name in (*RAY_2_60, POLICY) if getattr(self, name) is not None]

    def overrides(self, names: Collection[str] | None = None) -> dict[str, Any]:
        """Their part of an entry of `deployments`: all, or only what these parameters are about, so that the rest is
        as the code has it. Serve replaces `autoscaling_config` as a whole."""
        wanted = type(self).model_fields.keys() if names is None else names
        entry: dict[str, Any] = {name: getattr(self, name) for name in LOOKED_AFTER if name in wanted}
        entry |= {name: value for name in OPTIONAL if (value := getattr(self, name)) is not None}
        if self.num_replicas is not None:
            # Null, and not left out: what the code says of scaling would stay in force beside the number.
            return {**entry, "num_replicas": self.num_replicas, "autoscaling_config": None}
        if any(name in wanted for name in (*AUTOSCALING, POLICY)):
            scaling = {name: getattr(self, name) for name in AUTOSCALING}
            scaling = {name: value for name, value in scaling.items() if value is not None}
            entry["autoscaling_config"] = {**scaling, **policy(self.scaling_policy)}
        return entry


def check_policy(given: ScalingPolicy | None, most: int) -> None:
    """ValueError where a policy asks for more than there may be."""
    if given is not None and (problem := given.above(most)):
        raise ValueError(f"{problem} ({most})")


def policy(given: ScalingPolicy | None) -> dict[str, Any]:
    """Its part of an `autoscaling_config`. In the app's entry it becomes a part of the app's own policy."""
    return {} if given is None else {"policy": given.rendered()}
