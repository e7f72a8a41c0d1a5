"""The cluster's own registry, as roles need it: what validation publishes of it, and the certificate kept here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError

from clusterkit import registry, workspace
from clusterkit.errors import ClusterkitError


def own_registry(cluster: dict[str, Any], draft: bool = False) -> dict[str, Any]:
    """`address`, `tls` and `certificate` (PEM); empty where there is none. See clusterkit.registry.own."""
    try:
        return registry.own(cluster, store=workspace.cache_home(), draft=draft)
    except ClusterkitError as error:
        raise AnsibleFilterError(f"{error.message}\nFix: {error.hint}") from None


def registry_certificate(cluster: dict[str, Any]) -> str:
    """Where the controller keeps the certificate of the cluster's registry."""
    return str(registry.certificate_of(cluster["name"], store=workspace.cache_home()))


class FilterModule:
    def filters(self) -> dict[str, Callable[..., Any]]:
        return {"own_registry": own_registry, "registry_certificate": registry_certificate}
