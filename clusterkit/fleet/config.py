"""The daemon's configuration: one JSON file, rendered by Ansible. Units stand in the names: `_s` seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clusterkit.errors import UsageError

Seconds = Annotated[float, Field(gt=0)]
# What ssh, a path and Ray's instance ids can all hold.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]
Absolute = Annotated[str, Field(pattern=r"^/")]
HOURS = r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"
# A Unix socket's path ends at 107 bytes; ssh appends 17 while it makes one, and ours is 17 with its slash.
CONTROL_DIR_LIMIT = 107 - 17 - 17


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PowerConfig(_Part):
    """How one host is switched on and off. `credentials`: a root-only JSON file with `user` and `password`."""

    kind: Literal["none", "wol", "ipmi", "redfish"] = "none"
    mac: Annotated[str, Field(pattern=r"^([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}$")] | None = None
    broadcast: str = "255.255.255.255"
    port: Annotated[int, Field(ge=1, le=65535)] = 9
    address: str | None = None
    credentials: Absolute | None = None
    ca: Absolute | None = None
    system: str | None = None
    timeout_s: Seconds = 20

    @model_validator(mode="after")
    def _complete(self) -> PowerConfig:
        needed = {"wol": ("mac",), "ipmi": ("address", "credentials"), "redfish": ("address", "credentials")}
        missing = [name for name in needed.get(self.kind, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"power by {self.kind} needs {' and '.join(missing)}")
        if self.kind == "redfish" and not str(self.address).startswith("https://"):
            raise ValueError("the address of a redfish BMC starts with https://")
        return self


class HostConfig(_Part):
    """One worker. `node_ip`: Ray's address; `address`: where its sshd answers."""

    address: Name | Annotated[str, Field(pattern=r"^[0-9A-Fa-f:.]+$")]
    node_ip: str
    pool: str
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    power: PowerConfig = PowerConfig()


class PoolConfig(_Part):
    """A node type of Ray. `idle_off_s`: how long a host without a node stays on; null means for ever.

    `warm`: so many hosts are on without a node, within `warm_hours` (of the head's clock; null: always).
    `idle_watts`: what an idle host burns, for the estimate of what was saved.
    """

    max: Annotated[int, Field(ge=0)]
    gpus: Annotated[int, Field(ge=0)] = 0
    boot_budget_s: Seconds = 600
    start_timeout_s: Seconds = 300
    drain_grace_s: Annotated[int, Field(ge=1, le=99999)] = 900
    idle_off_s: Seconds | None = None
    warm: Annotated[int, Field(ge=0)] = 0
    warm_hours: Annotated[str, Field(pattern=HOURS)] | None = None
    idle_watts: Annotated[int, Field(gt=0)] | None = None


class Limits(_Part):
    """What protects hosts from a daemon that tries too hard."""

    power_ons: Annotated[int, Field(ge=1)] = 4
    cycles_per_day: Annotated[int, Field(ge=1)] = 12
    backoff_s: Seconds = 30
    backoff_max_s: Seconds = 1800
    quarantine_after: Annotated[int, Field(ge=1)] = 3
    # Shorter than Ray's own patience with a request (RAY_AUTOSCALER_RECONCILE_REQUEST_STATUS_TIMEOUT_S, 600): when
    # that ends, Ray asks again, and a request that lived on here would be served twice.
    request_s: Seconds = 590


class Ssh(_Part):
    """`command`: the program and what always comes first; the words of one call follow."""

    command: Annotated[tuple[str, ...], Field(min_length=1)] = ("ssh",)
    user: Name = "clusterkit-agent"
    identity: Absolute
    known_hosts: Absolute
    control_dir: Annotated[str, Field(pattern=r"^/", max_length=CONTROL_DIR_LIMIT)]
    connect_timeout_s: Annotated[int, Field(ge=1)] = 8
    status_timeout_s: Seconds = 20
    persist_s: Annotated[int, Field(ge=1)] = 600


class Polling(_Part):
    """How often each host is asked, and how many calls may run at once."""

    interval_s: Seconds = 5
    away_interval_s: Seconds = 20
    power_interval_s: Seconds = 30
    parallel: Annotated[int, Field(ge=1)] = 64


class FleetConfig(_Part):
    cluster: str
    socket: Absolute
    socket_group: str | None = None
    users: tuple[str | int, ...] = ()
    record: Absolute
    ssh: Ssh
    polling: Polling = Polling()
    limits: Limits = Limits()
    pools: dict[str, PoolConfig]
    hosts: dict[Name, HostConfig]

    @model_validator(mode="after")
    def _pools_exist(self) -> FleetConfig:
        unknown = sorted({host.pool for host in self.hosts.values()} - set(self.pools))
        if unknown:
            raise ValueError(f"hosts name pools that are not there: {', '.join(unknown)}")
        return self


def read_config(path: str) -> FleetConfig:
    """UsageError, with everything that is wrong, where the file is no such configuration. Never shows a value."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the configuration {path}: {error}") from error
    try:
        return FleetConfig.model_validate(data)
    except ValidationError as error:
        found = [
            f"{'.'.join(str(part) for part in item['loc']) or 'the whole'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise UsageError(f"the configuration {path} is wrong: {'; '.join(found)}") from error
