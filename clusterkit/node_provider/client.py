"""The fleet's socket, from a process that may only use the standard library. Thread-safe: a connection a call."""

from __future__ import annotations

import json
import socket
import uuid
from typing import Any

VERSION = 1
TIMEOUT_S = 5.0
ANSWER_LIMIT = 64 * 1024 * 1024


class FleetAway(Exception):
    """Nobody answers on the socket, or the answer broke off."""


class FleetRefused(Exception):
    """The daemon says no; `code` is its reason in one word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class FleetClient:
    """`session` tells one autoscaler from the one before it: the daemon drops what only the old one asked for."""

    def __init__(self, path: str, timeout_s: float = TIMEOUT_S) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.session = uuid.uuid4().hex

    def nodes(self) -> Any:
        return self._ask({"verb": "list", "session": self.session})["nodes"]

    def create(self, pool: str, count: int, tags: dict[str, str]) -> dict[str, Any]:
        """Asked twice where the first answer was lost: the request's id makes it one request all the same."""
        request: dict[str, Any] = {"verb": "create", "session": self.session, "request": uuid.uuid4().hex, "pool": pool}
        request.update(count=count, tags=tags)
        try:
            return self._ask(request)
        except FleetAway:
            return self._ask(request)

    def terminate(self, ids: list[str]) -> dict[str, Any]:
        return self._ask({"verb": "terminate", "ids": ids})

    def tags(self, instance: str, tags: dict[str, str]) -> None:
        self._ask({"verb": "tags", "id": instance, "tags": tags})

    def status(self) -> dict[str, Any]:
        return self._ask({"verb": "status"})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self.timeout_s)
                connection.connect(self.path)
                connection.sendall(json.dumps({"v": VERSION, **request}).encode() + b"\n")
                with connection.makefile("rb") as stream:
                    line = stream.readline(ANSWER_LIMIT)
            answer = json.loads(line)
        except (OSError, ValueError) as error:
            raise FleetAway(f"the fleet daemon does not answer on {self.path}: {error}") from error
        if not isinstance(answer, dict) or answer.get("ok") is not True:
            code = str(answer.get("code", "failed")) if isinstance(answer, dict) else "failed"
            raise FleetRefused(
                code, str(answer.get("error", "no reason given") if isinstance(answer, dict) else answer)
            )
        return answer
