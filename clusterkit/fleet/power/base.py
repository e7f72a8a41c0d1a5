"""What every backend is, and what all of them share."""

from __future__ import annotations

import json
import os
import stat
from typing import Literal, Protocol

from clusterkit.errors import ClusterkitError

State = Literal["on", "off"] | None


class PowerError(ClusterkitError):
    """A host could not be switched, or not asked. Never carries a credential."""


class Power(Protocol):
    """One host's switch. Words block, and end by their own timeouts; each raises PowerError."""

    can_switch: bool  # on, at least
    reports: bool  # `state` knows

    def on(self) -> None:
        """Idempotent."""

    def off(self) -> None:
        """At once, without asking the system: only for a host whose node is gone."""

    def state(self) -> State:
        """None where nobody knows."""


class NoPower:
    """A host that people switch."""

    can_switch = False
    reports = False

    def on(self) -> None:
        raise PowerError("this host has no power control")

    def off(self) -> None:
        raise PowerError("this host has no power control")

    def state(self) -> State:
        return None


def read_credentials(path: str) -> tuple[str, str]:
    """(user, password) from a file that nobody but its owner, root or us, may read."""
    try:
        with open(path, encoding="utf-8") as handle:
            found = os.fstat(handle.fileno())
            if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO) or found.st_uid not in (0, os.geteuid()):
                raise PowerError(f"others may read {path}", hint=f"chown root: {path} && chmod 0600 {path}")
            data = json.load(handle)
        return str(data["user"]), str(data["password"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        # No chain: the text of the file would stand in the error of the parser.
        raise PowerError(f"no user and password in {path}: {type(error).__name__}") from None
