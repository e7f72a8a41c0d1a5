"""Users and passwords of the hosts' BMCs, as the role fleet hands them to its daemon: one file each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

Hosts = Mapping[str, Mapping[str, Any]]
Credentials = Mapping[str, Any]

# Kinds of power that log in.
KINDS = ("ipmi", "redfish")


def _bmcs(hosts: Hosts) -> list[str]:
    return [name for name, host in hosts.items() if host["power"]["kind"] in KINDS]


def _of(credentials: Credentials, host: str) -> tuple[str, str] | None:
    found = credentials.get(host, credentials.get("default"))
    if not isinstance(found, Mapping) or not found.get("user") or not found.get("password"):
        return None
    return str(found["user"]), str(found["password"])


def bmc_lacking(hosts: Hosts, credentials: Credentials) -> list[str]:
    """Hosts whose BMC has no user and password; names only."""
    return [name for name in _bmcs(hosts) if _of(credentials, name) is None]


def bmc_files(hosts: Hosts, credentials: Credentials, folder: str) -> list[dict[str, str]]:
    """A file for each, as `host_files` takes them."""
    files = []
    for name in _bmcs(hosts):
        user, password = _of(credentials, name) or ("", "")
        text = json.dumps({"user": user, "password": password}) + "\n"
        files.append({"path": f"{folder}/{name}.json", "secret_content": text, "mode": "0600", "owner": "root"})
    return files


def bmc_paths(hosts: Hosts, folder: str, ca: str) -> dict[str, Any]:
    """The hosts, each with the paths of its BMC's credentials and authority."""
    found = {}
    for name, host in hosts.items():
        power = dict(host["power"])
        if power["kind"] in KINDS:
            power["credentials"] = f"{folder}/{name}.json"
        if power["kind"] == "redfish" and ca:
            power["ca"] = ca
        found[name] = {**host, "power": power}
    return found


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"bmc_lacking": bmc_lacking, "bmc_files": bmc_files, "bmc_paths": bmc_paths}
