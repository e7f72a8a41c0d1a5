"""Redfish through `sushy`, OpenStack's library for it: loaded on first use, certificates verified."""

from __future__ import annotations

from typing import Any

from clusterkit.fleet.config import PowerConfig
from clusterkit.fleet.power.base import PowerError, State, read_credentials


class Redfish:
    """Asks anew each time: a BMC's sessions are few, and it may have been restarted since."""

    can_switch = True
    reports = True

    def __init__(self, config: PowerConfig) -> None:
        self._config = config

    def on(self) -> None:
        self._do(lambda sushy, system: system.reset_system(sushy.ResetType.ON), unless="on")

    def off(self) -> None:
        self._do(lambda sushy, system: system.reset_system(sushy.ResetType.FORCE_OFF), unless="off")

    def state(self) -> State:
        return self._do(lambda _, system: None)

    def _do(self, action: Any, unless: State = None) -> State:
        """The state that was found; `action` is left out where that is `unless`: some BMCs refuse On when on."""
        try:
            import sushy
            from sushy import auth
        except ImportError:
            raise PowerError("sushy is not installed here", hint="pip install 'clusterkit[fleet]'") from None
        config = self._config
        user, password = read_credentials(str(config.credentials))
        try:
            # Basic, not a session: one that is never closed stays on the BMC, which has room for few.
            root = sushy.Sushy(
                config.address,
                auth=auth.BasicAuth(username=user, password=password),
                verify=config.ca or True,
                server_side_retries=0,
                read_timeout=config.timeout_s / 2,
                connect_timeout=config.timeout_s / 2,
            )
            system = root.get_system(config.system)
            found = {sushy.PowerState.ON: "on", sushy.PowerState.OFF: "off"}.get(system.power_state)
            if unless is None or found != unless:
                action(sushy, system)
        except Exception as error:
            # sushy's, requests' and urllib3's own; a caller has to survive all of them.
            said = " ".join(str(error).split()).replace(password, "***") or type(error).__name__
            raise PowerError(f"the BMC {config.address}: {said[:300]}") from None
        return "on" if found == "on" else "off" if found == "off" else None
