"""The little of Redis that a queue of tasks needs, on the standard library: no engine environment has a client.

The protocol is RESP2 (redis.io/docs/latest/develop/reference/protocol-spec).
"""

import asyncio
import contextlib
import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

# For one command, connecting included. The server answers in milliseconds, or something is wrong with it.
TIMEOUT_S = 10.0


class Unreachable(Exception):
    """No answer: nobody knows whether the command was carried out."""


class Denied(Exception):
    """The server's own error."""


@dataclass(frozen=True)
class Address:
    """Where the server is. The password is read for each connection, so that another one needs no restart of Ray."""

    url: str
    password_env: str = ""
    password_file: str = ""
    ca_file: str = ""

    def password(self) -> str:
        """OSError or Denied where it is declared and not there."""
        if self.password_file:
            with open(self.password_file, encoding="utf-8") as handle:
                return handle.read().strip()
        if not self.password_env:
            return ""
        found = os.environ.get(self.password_env)
        if not found:
            raise Denied(
                f"the environment of Ray has no {self.password_env}: put it into clusterkit_environment, and deploy"
            )
        return found

    def tls(self) -> ssl.SSLContext | None:
        if urlsplit(self.url).scheme != "rediss":
            return None
        return ssl.create_default_context(cafile=self.ca_file or None)


class Redis:
    """One connection, made when it is needed and made anew after a fault; commands wait for one another."""

    def __init__(self, address: Address) -> None:
        self.address, self.lock = address, asyncio.Lock()
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, *words: str | bytes | float) -> Any:
        """What one command answers: bytes, a number, None, or a list of these. Denied, Unreachable."""
        async with self.lock:
            return await self._guarded(lambda: self._run(words))

    async def close(self) -> None:
        async with self.lock:
            self._drop()

    async def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return await asyncio.wait_for(work(), TIMEOUT_S)
        except Denied:
            raise
        # A timeout is an OSError, and so is a certificate that does not hold.
        except (OSError, EOFError, ValueError) as error:
            self._drop()
            where = urlsplit(self.address.url)
            raise Unreachable(f"Redis at {where.hostname}:{where.port or 6379}: {str(error) or 'no answer'}") from None
        except BaseException:
            # Given up in the middle: the answer to this would be taken for that to the next.
            self._drop()
            raise

    async def _run(self, words: tuple[str | bytes | float, ...]) -> Any:
        if self.streams is None:
            await self._connect()
        return await self._ask(words)

    async def _connect(self) -> None:
        where, address = urlsplit(self.address.url), self.address
        password, tls = address.password(), address.tls()
        self.streams = await asyncio.open_connection(where.hostname, where.port or 6379, ssl=tls)
        try:
            if password:
                await self._sign_in(unquote(where.username or ""), password)
            if (number := where.path.strip("/")) not in ("", "0"):
                await self._ask(("SELECT", number))
        except Denied:
            self._drop()
            raise

    async def _sign_in(self, user: str, password: str) -> None:
        try:
            await self._ask(("AUTH", user, password) if user else ("AUTH", password))
        except Denied as error:
            # A server that does not know the command repeats what it was given.
            raise Denied(str(error).replace(password, "***")) from None

    async def _ask(self, words: tuple[str | bytes | float, ...]) -> Any:
        assert self.streams is not None
        reader, writer = self.streams
        parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        writer.write(b"*%d\r\n%s" % (len(parts), body))
        await writer.drain()
        answer = await _read(reader)
        if isinstance(answer, Denied):
            if str(answer).startswith("LOADING"):
                raise OSError("it has just been started, and reads its data")
            raise answer
        return answer

    def _drop(self) -> None:
        if self.streams is not None:
            with contextlib.suppress(Exception):
                self.streams[1].close()
        self.streams = None


async def _read(reader: asyncio.StreamReader) -> Any:
    """One answer. An error inside of a list is left there."""
    line = (await reader.readuntil(b"\r\n"))[:-2]
    kind, rest = line[:1], line[1:]
    if kind == b"+":
        return rest
    if kind == b"-":
        return Denied(rest.decode(errors="replace"))
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if rest == b"-1" else (await reader.readexactly(int(rest) + 2))[:-2]
    if kind == b"*":
        return None if rest == b"-1" else [await _read(reader) for _ in range(int(rest))]
    raise ValueError(f"no Redis answers {line[:40]!r}")
