"""Switching hosts on and off: `none`, `wol`, `ipmi`, `redfish`, each behind the same few words.

A backend blocks; `Switch` gives each call a deadline and runs it aside, so a BMC that hangs delays nobody.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from clusterkit.fleet.config import PowerConfig
from clusterkit.fleet.power.base import NoPower, Power, PowerError, State
from clusterkit.fleet.power.ipmi import Ipmi
from clusterkit.fleet.power.redfish import Redfish
from clusterkit.fleet.power.wol import WakeOnLan

# A call that outlives its deadline keeps its thread until its own timeout ends it.
THREADS = 32


def backend(config: PowerConfig) -> Power:
    if config.kind == "wol":
        return WakeOnLan(config)
    if config.kind == "ipmi":
        return Ipmi(config)
    if config.kind == "redfish":
        return Redfish(config)
    return NoPower()


class Switches:
    """The threads in which BMCs are asked, for all hosts."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="power")

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def of(self, config: PowerConfig) -> Switch:
        return Switch(backend(config), config.timeout_s, self._threads)


class Switch:
    """One host's power. Every word ends, or raises PowerError, within its deadline."""

    def __init__(self, power: Power, timeout_s: float, threads: ThreadPoolExecutor) -> None:
        self.power = power
        # A backend may take several requests for one word, each with a timeout of its own.
        self.deadline_s = 2 * timeout_s
        self._threads = threads

    @property
    def can_switch(self) -> bool:
        return self.power.can_switch

    @property
    def reports(self) -> bool:
        return self.power.reports

    async def on(self) -> None:
        await self._call("on")

    async def off(self) -> None:
        await self._call("off")

    async def state(self) -> State:
        found = await self._call("state")
        return "on" if found == "on" else "off" if found == "off" else None

    async def _call(self, word: str) -> object:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.deadline_s):
                return await loop.run_in_executor(self._threads, getattr(self.power, word))
        except TimeoutError:
            raise PowerError(f"the BMC did not answer in {self.deadline_s:g} s") from None


__all__ = ["NoPower", "Power", "PowerError", "State", "Switch", "Switches", "backend"]
