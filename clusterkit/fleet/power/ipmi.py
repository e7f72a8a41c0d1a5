"""IPMI over LAN by `ipmitool`, which reads the password from its environment (`-E`), never from argv."""

from __future__ import annotations

import os
import subprocess

from clusterkit.fleet.config import PowerConfig
from clusterkit.fleet.power.base import PowerError, State, read_credentials

TOOL = "ipmitool"


class Ipmi:
    can_switch = True
    reports = True

    def __init__(self, config: PowerConfig) -> None:
        self._config = config

    def on(self) -> None:
        self._chassis("on")

    def off(self) -> None:
        self._chassis("off")

    def state(self) -> State:
        # "Chassis Power is on"
        said = self._chassis("status").strip().lower()
        return "on" if said.endswith(" on") else "off" if said.endswith(" off") else None

    def _chassis(self, word: str) -> str:
        user, password = read_credentials(str(self._config.credentials))
        argv = [TOOL, "-I", "lanplus", "-H", str(self._config.address), "-U", user, "-E", "chassis", "power", word]
        try:
            done = subprocess.run(
                argv,
                env={**os.environ, "IPMI_PASSWORD": password},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=self._config.timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise PowerError(f"{TOOL} is not installed here", hint="install the package ipmitool") from None
        except subprocess.TimeoutExpired:
            raise PowerError(f"the BMC {self._config.address} did not answer in {self._config.timeout_s:g} s") from None
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip().replace(password, "***").splitlines()
            raise PowerError(f"ipmitool: {said[-1] if said else f'exit code {done.returncode}'}")
        return done.stdout
