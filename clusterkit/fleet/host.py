"""One worker as the daemon holds it: what it is, what it said, what was noted of it, and how to reach it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from clusterkit.fleet.config import HostConfig, PoolConfig
from clusterkit.fleet.connection import Connection
from clusterkit.fleet.power import Switch
from clusterkit.fleet.record import HostRecord, Phase
from clusterkit.fleet.view import View


@dataclass
class Host:
    name: str
    config: HostConfig
    pool: PoolConfig
    record: HostRecord
    connection: Connection
    switch: Switch
    view: View = field(default_factory=View)
    noted: bool = True  # what is under way is on disk, so it may be done
    off_seen: float | None = None  # monotonic: since when it has been off without a count
    acts: int = 0  # an answer to a question that is older than the last act is no news
    actor: asyncio.Task[None] | None = None
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def up(self) -> bool:
        """On, without a node, and nothing under way: it can be given at once."""
        return self.record.phase is None and self.view.idle

    @property
    def booting(self) -> bool:
        return self.record.phase in (Phase.POWER_ON, Phase.BOOT)

    @property
    def held(self) -> str | None:
        """Why people or its own agent keep it out. What the agent said last holds while it does not answer: a host
        that is off because somebody works on it must not be switched on."""
        if self.record.maintenance is not None:
            by = self.record.maintenance
            return f"in maintenance: {by['reason']} (by {by['owner']})"
        return self.view.held if self.view.reachable else self.record.held

    @property
    def off(self) -> bool:
        """As far as anybody knows."""
        if self.view.alive:
            return False
        return not self.view.reachable and self.record.phase is None and (self.record.off or self.view.power == "off")

    async def next_news(self, timeout_s: float) -> None:
        """Wait until the host was asked once more, or for so long."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)), self.news:
                await self.news.wait()
        except TimeoutError:
            return

    async def tell_news(self) -> None:
        async with self.news:
            self.news.notify_all()
