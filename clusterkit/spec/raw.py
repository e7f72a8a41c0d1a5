"""What Ansible resolved, before any model reads it: values, their places, and which of them failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clusterkit.spec.findings import Finding, Place

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class RawValue:
    """One variable of one host: plain data, where each part of it stands, or why it has no value.

    `places` maps a path inside the value (`()` is the value itself) to its place.
    `secrets` are the texts in it that came out of a vault: they are never shown.
    `undecryptable` says that the error is a missing or wrong vault password.
    """

    value: Any = None
    places: Mapping[Path, Place] = field(default_factory=dict)
    error: str | None = None
    secrets: frozenset[str] = frozenset()
    undecryptable: bool = False

    def place(self, path: Path = ()) -> Place:
        """The place of the deepest known part on the way to `path`."""
        for end in range(len(path), -1, -1):
            found = self.places.get(path[:end])
            if found is not None:
                return found
        return Place()


@dataclass(frozen=True)
class RawInventory:
    """The inventory as Ansible resolved it.

    hosts     variables of each host, by name
    groups    hosts of each group, by name
    children  direct child groups of each group
    sources   what was given as `-i`
    broken    files that Ansible passed over or could not read
    role_options  option types of each role, from its argument_specs
    """

    hosts: Mapping[str, Mapping[str, RawValue]]
    groups: Mapping[str, tuple[str, ...]]
    children: Mapping[str, tuple[str, ...]]
    sources: tuple[str, ...]
    places: Mapping[str, Place] = field(default_factory=dict)
    role_options: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    broken: tuple[Finding, ...] = ()

    @property
    def secrets(self) -> tuple[str, ...]:
        """Longest first, so that none is left as a part. Very short ones would blank out half the words."""
        values = [value for variables in self.hosts.values() for value in variables.values()]
        found = {secret for value in values for secret in value.secrets if len(secret) > 3}
        return tuple(sorted(found, key=lambda secret: (-len(secret), secret)))

    def group(self, name: str) -> tuple[str, ...]:
        return tuple(self.groups.get(name, ()))

    def place_of(self, name: str) -> Place:
        """Where a host or group is declared, else the inventory's own file."""
        found = self.places.get(name) or self.places.get("")
        if found is not None:
            return found
        return Place(self.sources[0]) if self.sources else Place()
