"""How many replicas the deployments of an app get. Runs in Serve's controller.

Serve builds it where it builds the app, and brings this one module to the controller, which has none of the app's
code (ray 2.60.0, serve/_private/application_state.py, build_serve_application). So it needs nothing but what Python
and Ray have. An exception here would end the controller's round for all apps: none leaves this module.
"""

from __future__ import annotations

import datetime
import io
import logging
import math
import struct
import zoneinfo
from typing import Any

logger = logging.getLogger("ray.serve")

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


class Policies:
    """For Serve's `autoscaling_policy` of an app.

    deployments  by name: what each goes by (queue_depth, replica_stats, schedule)
    ratio        by name: the deployments that keep these proportions
    """

    def __init__(self, deployments: dict[str, Any] | None = None, ratio: dict[str, float] | None = None) -> None:
        # Nothing is looked at yet: what fails here stops the controller as well.
        self.deployments, self.ratio = deployments or {}, ratio or {}
        self.told: set[str] = set()

    def __call__(self, contexts: dict[Any, Any]) -> tuple[dict[Any, float], dict[Any, Any]]:
        """How many each wants, by Serve's id; Serve keeps to the bounds and delays of each."""
        try:
            found = {key: self._wanted(context) for key, context in contexts.items()}
            return self._together(contexts, found), {}
        except Exception as error:
            self._tell(f"nothing is scaled: {error!r}")
            return {}, {}

    def _wanted(self, context: Any) -> float:
        """Of one deployment, by its own load and its own schedule."""
        given = self.deployments.get(context.deployment_name) or {}
        found: float
        try:
            found = self._by_load(context, given)
        except Exception as error:
            self._tell(f"{context.deployment_name} stays as it is: {error!r}")
            found = context.target_num_replicas
        try:
            return max(found, planned(given.get("schedule"), context.current_time))
        except Exception as error:
            # Too many rather than too few.
            self._tell(f"{context.deployment_name} has the most of its schedule, at all times: {error!r}")
            return max([found, *(float(times["min_replicas"]) for times in given["schedule"]["times"])])

    def _by_load(self, context: Any, given: dict[str, Any]) -> float:
        running = context.current_num_replicas
        if running == 0:
            # They start, or nobody asks: Serve itself wakes a deployment whose requests wait.
            return float(context.target_num_replicas)
        target = float(context.config.get_target_ongoing_requests())
        found: list[float] = []
        if given.get("queue_depth"):
            waiting = context.total_queued_requests / given["queue_depth"]["target_queued_requests"]
            found.append(context.total_running_requests / target + waiting)
        for name, aim in (given.get("replica_stats") or {}).items():
            said = list((context.aggregated_metrics or {}).get(name, {}).values())
            # Those that said nothing yet count as the others.
            found.append(sum(said) / len(said) * running / aim if said else context.target_num_replicas)
        if not found:
            found.append(context.total_num_requests / target)
        if not all(map(math.isfinite, found)):
            raise ValueError(f"no number of replicas follows from {found}")
        return max(found)

    def _together(self, contexts: dict[Any, Any], wanted: dict[Any, float]) -> dict[Any, float]:
        """Those of the ratio have as many as the one needs that needs most, whole replicas within their own bounds."""
        parts = {key: self.ratio[context.deployment_name] for key, context in contexts.items()
                 if context.deployment_name in self.ratio}  # fmt: skip
        if not parts:
            return wanted
        share = 0.0
        for key, part in parts.items():
            low, high = contexts[key].capacity_adjusted_min_replicas, contexts[key].capacity_adjusted_max_replicas
            share = max(share, min(max(whole(wanted[key]), low), high) / part)
        return {**wanted, **{key: whole(share * part) for key, part in parts.items()}}

    def _tell(self, what: str) -> None:
        """Once: rounds come ten times a second."""
        kind = what.partition(":")[0]
        if kind not in self.told:
            self.told.add(kind)
            logger.error("clusterkit's scaling policy: %s", what)


def whole(number: float) -> int:
    """The next whole number, where 3.0000000000000004 is 3."""
    return math.ceil(number - 1e-9)


def planned(schedule: dict[str, Any] | None, now: float) -> int:
    """How many replicas a schedule has at this moment (seconds since 1970); 0 outside of its times."""
    if not schedule:
        return 0
    local = datetime.datetime.fromtimestamp(now, zone(schedule["time_zone"], schedule["rule"]))
    today, yesterday, clock = DAYS[local.weekday()], DAYS[local.weekday() - 1], local.strftime("%H:%M")
    found = 0
    for times in schedule["times"]:
        start, end, days = times["start"], times["end"], times["days"]
        late = start < end
        inside = today in days and start <= clock and (clock < end or not late)
        if inside or (not late and yesterday in days and clock < end):
            found = max(found, times["min_replicas"])
    return found


def zone(name: str, rule: str) -> datetime.tzinfo:
    """The time zone; by its rule alone where this machine has no time zones."""
    try:
        return zoneinfo.ZoneInfo(name)
    except zoneinfo.ZoneInfoNotFoundError:
        if not rule:
            raise
    # A file of RFC 8536 (3.1 to 3.3) with nothing in it but the rule.
    header = b"TZif2" + bytes(15) + struct.pack(">6L", 0, 0, 0, 0, 1, 4)
    nothing = struct.pack(">lBB", 0, 0, 0) + b"UTC\0"
    return zoneinfo.ZoneInfo.from_file(io.BytesIO((header + nothing) * 2 + b"\n" + rule.encode() + b"\n"), key=name)
