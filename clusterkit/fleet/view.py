"""What a host said last, and what that means."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clusterkit.fleet.power import State


@dataclass
class View:
    """The last answer of one host. Observed, never stored."""

    answer: Mapping[str, Any] | None = None  # the last one that came
    answered: float = 0.0  # monotonic
    asked: bool = False  # at least once, with an answer or without
    error: str | None = None  # why the last call brought none
    error_since: float = 0.0  # epoch
    misses: int = 0  # in a row
    alive: bool = False  # no answer of its agent, but one of its sshd
    power: State = None
    power_error: str | None = None
    power_asked: float = 0.0  # monotonic
    took_s: float = 0.0

    def heard(self, answer: Mapping[str, Any], took_s: float) -> None:
        self.answer, self.answered, self.took_s = answer, time.monotonic(), took_s
        self.error, self.asked, self.power, self.misses, self.alive = None, True, None, 0, False

    def missed(self, error: str, *, alive: bool = False) -> None:
        if self.error is None:
            self.error_since = time.time()
        self.alive = alive
        self.error, self.asked, self.misses = error, True, self.misses + 1

    @property
    def reachable(self) -> bool:
        return self.answer is not None and self.error is None

    @property
    def age_s(self) -> float | None:
        return time.monotonic() - self.answered if self.answer is not None else None

    def _said(self, key: str) -> Any:
        return self.answer.get(key) if self.answer is not None else None

    @property
    def instance(self) -> str | None:
        """Of the node that is there, whatever state it is in."""
        return str(self._said("instance_id")) if self._said("instance_id") and not self.gone else None

    @property
    def running(self) -> bool:
        return bool(self._said("state") == "running")

    @property
    def stopped(self) -> bool:
        return bool(self._said("state") == "stopped")

    @property
    def gone(self) -> bool:
        """There is no raylet here: the one case in which Ray is told that a node vanished."""
        return self.stopped or self.leftover

    @property
    def leftover(self) -> bool:
        """The raylet is certainly gone, as the launcher says, but something of the node has to be cleared away.
        Everything else that is not `stopped` may still serve, and is never given up."""
        return bool(self._said("state") == "degraded" and self._said("raylet") == "gone")

    @property
    def held(self) -> str | None:
        found = self._said("held")
        return str(found) if found else None

    @property
    def quarantined(self) -> bool:
        return bool(self._said("quarantine"))

    @property
    def maintained(self) -> bool:
        return bool(self._said("maintenance"))

    @property
    def generation(self) -> str | None:
        found = self._said("generation_on_disk")
        return str(found) if found else None

    @property
    def reason(self) -> str | None:
        found = self._said("reason")
        return str(found) if found else None

    @property
    def idle(self) -> bool:
        """On, and without a node."""
        return self.reachable and self.stopped
