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
    def stale(self) -> bool:
        known = self.view.generation or self.record.generation
        return self.config.stale is not None and known == self.config.stale

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
