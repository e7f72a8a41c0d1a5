"""The Unix socket: one JSON object a line, both ways. Only Ray's user and root may speak to it.

    {"v": 1, "verb": "list", "session": "…"}               {"v": 1, "ok": true, "nodes": [...]}
      (without a session: somebody who only looks)
    {"v": 1, "verb": "create", "request": "…", "session": "…", "pool": "…", "count": 1, "tags": {}}
    {"v": 1, "verb": "terminate", "ids": ["…"]}            {"v": 1, "ok": true, "terminated": [], "unknown": []}
    {"v": 1, "verb": "tags", "id": "…", "tags": {}}
    {"v": 1, "verb": "status"}                             {"v": 1, "ok": true, "hosts": [...], "open": [...]}
    {"v": 1, "verb": "hold", "host": "…", "owner": "…", "reason": "…"}             root only, as all that follow
    {"v": 1, "verb": "release", "host": "…"}               (with "only": "maintenance": a quarantine stays)
    {"v": 1, "verb": "reserve", "hosts": ["…"], "owner": "…", "seconds": 3600}
    {"v": 1, "verb": "free", "hosts": ["…"], "converged": true}
    {"v": 1, "verb": "skip", "hosts": ["…"]}
                                                           {"v": 1, "ok": false, "code": "…", "error": "…"}

Codes: `version`, `request`, `forbidden`, `not_now` (ask again; nothing was changed), `failed`.
"""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import pwd
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

from clusterkit.errors import ClusterkitError, UsageError
from clusterkit.fleet.config import FleetConfig
from clusterkit.fleet.daemon import Fleet, NotNow

VERSION = 1
LINE_LIMIT = 1024 * 1024
IDLE_S = 60.0
COUNT_LIMIT = 10_000

log = logging.getLogger(__name__)


class Wrong(ClusterkitError):
    """A request that is none."""


class Forbidden(ClusterkitError):
    """Not for this user."""


_CODES: tuple[tuple[type[ClusterkitError], str], ...] = (
    (Wrong, "request"),
    (Forbidden, "forbidden"),
    (NotNow, "not_now"),
)


class Server:
    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self._users = allowed_users(fleet.config)

    async def listen(self) -> asyncio.Server:
        """Takes over the socket's path; UsageError where another daemon answers there."""
        config = self.fleet.config
        group = socket_group(config)
        _free(config.socket)
        mask = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._talk, config.socket, limit=LINE_LIMIT)
        finally:
            os.umask(mask)
        if group is not None:
            os.chown(config.socket, -1, group)
        os.chmod(config.socket, 0o660)
        return server

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        user = peer(writer)
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    line = await reader.readline()
                if not line:
                    return
                await _say(writer, await self._answer(line, user))
        except (TimeoutError, ValueError, ConnectionError):
            return  # who sends no end of a line, or leaves, is no longer listened to
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, line: bytes, user: int) -> dict[str, Any]:
        try:
            if user not in self._users:
                log.warning("user %d may not speak to the fleet", user)
                raise Forbidden("this user may not speak to the fleet")
            request = json.loads(line)
            if not isinstance(request, dict):
                raise Wrong("a request is a JSON object")
            if request.get("v") != VERSION:
                return {"ok": False, "code": "version", "error": f"this daemon speaks version {VERSION}"}
            verb = _VERBS.get(str(request.get("verb")))
            if verb is None:
                raise Wrong(f"a verb is one of {', '.join(_VERBS)}")
            return {"ok": True, **await verb(self.fleet, request, user)}
        except ClusterkitError as error:
            code = next((code for kind, code in _CODES if isinstance(error, kind)), "failed")
            return {"ok": False, "code": code, "error": str(error)}
        except ValueError:
            return {"ok": False, "code": "request", "error": "a request is one line of JSON"}
        except Exception as error:
            log.exception("a request failed")
            return {"ok": False, "code": "failed", "error": f"a mistake of the daemon: {type(error).__name__}"}


def allowed_users(config: FleetConfig) -> frozenset[int]:
    """Root, ourselves, and who the configuration names. UsageError where there is no such user."""
    users = {0, os.geteuid()}
    for name in config.users:
        try:
            users.add(name if isinstance(name, int) else pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise UsageError(f"there is no user {name} on this host") from None
    return frozenset(users)


def socket_group(config: FleetConfig) -> int | None:
    """Who may open the socket: the configured group, else the first user's own. UsageError where there is none."""
    try:
        if config.socket_group is not None:
            return grp.getgrnam(config.socket_group).gr_gid
        first = config.users[0] if config.users else None
        if first is None:
            return None
        return (pwd.getpwuid(first) if isinstance(first, int) else pwd.getpwnam(first)).pw_gid
    except KeyError as error:
        raise UsageError(f"the group of the socket cannot be found on this host: {error.args[0]}") from None


def peer(writer: asyncio.StreamWriter) -> int:
    """Who is at the other end, as the kernel says (unix(7), SO_PEERCRED)."""
    size = struct.calcsize("3i")
    data = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", data)[1])


def _free(path: str) -> None:
    with suppress(FileNotFoundError, ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(2)
        probe.connect(path)
        raise UsageError(f"another daemon answers on {path}", hint="stop it first")
    with suppress(FileNotFoundError):
        os.unlink(path)


async def _say(writer: asyncio.StreamWriter, answer: Mapping[str, Any]) -> None:
    writer.write(json.dumps({"v": VERSION, **answer}).encode() + b"\n")
    await writer.drain()


# --------------------------------------------------------------------------- verbs


def _text(request: Mapping[str, Any], key: str) -> str:
    found = request.get(key)
    if not isinstance(found, str) or not found or len(found) > 200:
        raise Wrong(f"{key} must be a text")
    return found


def _tags(request: Mapping[str, Any]) -> dict[str, str]:
    found = request.get("tags", {})
    if not isinstance(found, dict) or not all(isinstance(part, str) for item in found.items() for part in item):
        raise Wrong("tags must be texts by name")
    return found


async def _list(fleet: Fleet, request: Mapping[str, Any], _user: int) -> dict[str, Any]:
    return {"nodes": fleet.nodes(_text(request, "session") if "session" in request else None)}


async def _create(fleet: Fleet, request: Mapping[str, Any], _user: int) -> dict[str, Any]:
    count = request.get("count")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 < count <= COUNT_LIMIT:
        raise Wrong("count must be a number above 0")
    request_id, session, pool = (_text(request, key) for key in ("request", "session", "pool"))
    fleet.meet(session)
    return await fleet.create(request_id, session, pool, count, _tags(request))


async def _terminate(fleet: Fleet, request: Mapping[str, Any], _user: int) -> dict[str, Any]:
    ids = request.get("ids")
    if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids):
        raise Wrong("ids must be a list of texts")
    return await fleet.terminate(ids)


async def _set_tags(fleet: Fleet, request: Mapping[str, Any], _user: int) -> dict[str, Any]:
    await fleet.tags(_text(request, "id"), _tags(request))
    return {}


async def _status(fleet: Fleet, _request: Mapping[str, Any], _user: int) -> dict[str, Any]:
    return fleet.status()


def _root_only(user: int) -> None:
    if user not in (0, os.geteuid()):
        raise Forbidden("only root holds, reserves and releases hosts")


def _names(request: Mapping[str, Any]) -> list[str]:
    found = request.get("hosts")
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise Wrong("hosts must be a list of names")
    return found


async def _hold(fleet: Fleet, request: Mapping[str, Any], user: int) -> dict[str, Any]:
    _root_only(user)
    return await fleet.hold(_text(request, "host"), _text(request, "owner"), _text(request, "reason"))


async def _release(fleet: Fleet, request: Mapping[str, Any], user: int) -> dict[str, Any]:
    _root_only(user)
    only = request.get("only")
    if only not in (None, "maintenance"):
        raise Wrong("only may be maintenance, or be left out")
    return await fleet.release(_text(request, "host"), only)


async def _reserve(fleet: Fleet, request: Mapping[str, Any], user: int) -> dict[str, Any]:
    _root_only(user)
    seconds = request.get("seconds")
    if not isinstance(seconds, int) or isinstance(seconds, bool) or seconds <= 0:
        raise Wrong("seconds must be a number above 0")
    return await fleet.reserve(_names(request), _text(request, "owner"), seconds)


async def _set_free(fleet: Fleet, request: Mapping[str, Any], user: int) -> dict[str, Any]:
    _root_only(user)
    return await fleet.free(_names(request), converged=request.get("converged") is True)


async def _skip(fleet: Fleet, request: Mapping[str, Any], user: int) -> dict[str, Any]:
    _root_only(user)
    return await fleet.skip(_names(request))


_Verb = Callable[[Fleet, Mapping[str, Any], int], Awaitable[dict[str, Any]]]
_VERBS: dict[str, _Verb] = {
    "list": _list,
    "create": _create,
    "terminate": _terminate,
    "tags": _set_tags,
    "status": _status,
    "hold": _hold,
    "release": _release,
    "reserve": _reserve,
    "free": _set_free,
    "skip": _skip,
}
