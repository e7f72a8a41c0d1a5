"""What the replicas of a deployment go by, beside Serve's own count of requests: the block `scaling_policy`."""

from __future__ import annotations

import zoneinfo
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    field_validator,
    model_validator,
)

# What Serve imports where it builds the app: code/ goes along with every app that has such a block.
POLICY_FUNCTION = "clusterkit_policies:Policies"
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Positive = Annotated[StrictInt | StrictFloat, Field(gt=0)]


def _clock(value: Any) -> Any:
    # YAML reads 18:00 as 1080.
    if isinstance(value, int):
        raise ValueError("must be a time in quotes, such as '08:00' or '18:30': YAML takes it for a number without")
    return value


Clock = Annotated[str, BeforeValidator(_clock), Field(pattern=r"^(([01]\d|2[0-3]):[0-5]\d|24:00)$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class QueueDepth(_Strict):
    """Requests that wait for a replica, in the proxies and in handles."""

    target_queued_requests: Positive = Field(description="for so many that wait there is one more replica")


class Times(_Strict):
    """A part of the week, by the clocks of the time zone."""

    days: Annotated[tuple[Day, ...], Field(min_length=1)] = Field(
        DAYS, description="on which it begins: `[mon, tue, wed, thu, fri, sat, sun]`"
    )
    start: Clock = Field(description="`'08:00'`, in quotes")
    end: Clock = Field(description="`'18:30'`; earlier than `start`: on the next day; `'24:00'` is midnight")
    min_replicas: StrictInt = Field(ge=1, description="never fewer meanwhile")

    @model_validator(mode="after")
    def _lasts(self) -> Times:
        if self.start == self.end or self.start == "24:00":
            raise ValueError(f"{self.start} to {self.end} is no time: a whole day is '00:00' to '24:00'")
        return self


class Schedule(_Strict):
    """Times of the week in which more replicas run than the load asks for."""

    time_zone: str = Field(description="by its name, such as `Europe/Berlin` or `UTC`")
    times: Annotated[tuple[Times, ...], Field(min_length=1)] = Field(
        description="they may overlap: the most counts. Outside of them it is `min_replicas`"
    )

    @field_validator("time_zone")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in zoneinfo.available_timezones():
            near = [name for name in sorted(zoneinfo.available_timezones()) if value.lower() in name.lower()]
            hint = f"did you mean {near[0]!r}?" if value and near else "its name is that of a city, or UTC"
            raise ValueError(f"this machine knows no time zone {value!r}: {hint}")
        return value


def zone_rule(name: str) -> str:
    """The zone's rule for the years to come, as POSIX's TZ has it: the last line of its file (RFC 8536, 3.3). It goes
    along for heads that have no time zones. "" where this machine has no such file."""
    for folder in zoneinfo.TZPATH:
        path = Path(folder) / name
        if path.is_file():
            text = path.read_bytes()
            return text.rstrip(b"\n").rpartition(b"\n")[2].decode("ascii") if text[4:5] >= b"2" else ""
    return ""


class ScalingPolicy(_Strict):
    """What it goes by; of several the most counts. The bounds stay `min_replicas` and `max_replicas`."""

    queue_depth: QueueDepth | None = Field(None, description="requests that wait, beside those that are worked on")
    replica_stats: dict[Annotated[str, Field(pattern=r"^\w+$")], Positive] = Field(
        {}, description="what replicas say of themselves (`record_autoscaling_stats`): aimed at, on average"
    )
    schedule: Schedule | None = Field(None, description="times of the week with more replicas")

    @model_validator(mode="after")
    def _says_something(self) -> ScalingPolicy:
        if not (self.queue_depth or self.replica_stats or self.schedule):
            raise ValueError("says nothing: give it queue_depth, replica_stats or schedule, or take it out")
        return self

    def above(self, most: int) -> str:
        """What is wrong with it where there are never more than `most` replicas; "" where nothing is."""
        for index, times in enumerate(self.schedule.times if self.schedule else ()):
            if times.min_replicas > most:
                return (
                    f"scaling_policy.schedule.times[{index}].min_replicas ({times.min_replicas}) is above max_replicas"
                )
        return ""

    def rendered(self) -> dict[str, Any]:
        """As Serve has a policy of one deployment."""
        kwargs: dict[str, Any] = {}
        if self.queue_depth is not None:
            kwargs["queue_depth"] = self.queue_depth.model_dump()
        if self.replica_stats:
            kwargs["replica_stats"] = dict(self.replica_stats)
        if self.schedule is not None:
            rule = zone_rule(self.schedule.time_zone)
            kwargs["schedule"] = {**self.schedule.model_dump(mode="json"), "rule": rule}
        return {"policy_function": POLICY_FUNCTION, "policy_kwargs": kwargs}
