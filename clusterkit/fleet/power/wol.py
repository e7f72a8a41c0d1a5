"""Wake-on-LAN: a magic packet switches on; nothing reports."""

from __future__ import annotations

import re
import socket

from clusterkit.fleet.config import PowerConfig
from clusterkit.fleet.power.base import PowerError, State


def magic_packet(mac: str) -> bytes:
    """Six times 0xff, then the address sixteen times (AMD publication 20213)."""
    return b"\xff" * 6 + bytes.fromhex(re.sub("[:-]", "", mac)) * 16


class WakeOnLan:
    """The host switches itself off: its agent powers it off."""

    can_switch = True
    reports = False

    def __init__(self, config: PowerConfig) -> None:
        self._packet = magic_packet(str(config.mac))
        self._target = (config.broadcast, config.port)

    def on(self) -> None:
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                sender.sendto(self._packet, self._target)
        except OSError as error:
            raise PowerError(f"no magic packet to {self._target[0]}: {error}") from error

    def off(self) -> None:
        raise PowerError("Wake-on-LAN switches nothing off")

    def state(self) -> State:
        return None
