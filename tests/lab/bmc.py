"""BMCs of a lab's hosts: OpenStack's Redfish emulator, whose systems are the lab's system containers.

python -m tests.lab.bmc --lab NAME --listen ADDRESS --port PORT --folder FOLDER

On starts the container, ForceOff kills it, and a container that has ended is off. The folder holds `crt` and `key`,
`htpasswd`, and what is wrong with a host's BMC: FOLDER/<host> with `500` (it answers that), `lies` (it says on,
whatever is), `dead` (On does nothing) or `hangs` (the system starts and freezes) in it.
"""

from __future__ import annotations

import argparse
import ssl
from pathlib import Path
from typing import Any

import docker
from sushy_tools import error
from sushy_tools.emulator import main as emulator
from sushy_tools.emulator.resources.systems.base import AbstractSystemsDriver


class Containers(AbstractSystemsDriver):  # type: ignore[misc]
    """Systems by the names of the lab's hosts."""

    def __init__(self, lab: str, folder: Path) -> None:
        super().__init__()
        self.lab, self.folder, self.docker = lab, folder, docker.from_env()

    def _fault(self, host: str) -> str:
        path = self.folder / host
        fault = path.read_text().strip() if path.exists() else ""
        if fault == "500":
            raise error.FishyError("this BMC is broken")
        return fault

    def _container(self, host: str) -> Any:
        labels = [f"clusterkit.lab={self.lab}", f"clusterkit.lab.host={host}"]
        found = self.docker.containers.list(all=True, filters={"label": labels})
        if not found:
            raise error.NotFound(f"there is no host {host}")
        return found[0]

    @property
    def driver(self) -> str:
        return "<containers of a lab>"

    @property
    def systems(self) -> list[str]:
        found = self.docker.containers.list(all=True, filters={"label": f"clusterkit.lab={self.lab}"})
        return [container.labels["clusterkit.lab.host"] for container in found]

    def uuid(self, identity: str) -> str:
        self._container(identity)
        return identity

    def name(self, identity: str) -> str:
        return identity

    def get_boot_device(self, identity: str) -> None:
        return None

    def set_boot_device(self, identity: str, boot_source: str) -> None:
        raise error.NotSupportedError("a container boots from nothing else")

    def get_power_state(self, identity: str) -> str:
        fault = self._fault(identity)
        off = self._container(identity).status in ("exited", "created", "dead")
        return "Off" if off and fault != "lies" else "On"

    def set_power_state(self, identity: str, state: str) -> None:
        fault, container = self._fault(identity), self._container(identity)
        if state in ("On", "ForceOn"):
            if fault not in ("dead", "lies") and container.status != "running":
                container.start()
                if fault == "hangs":
                    container.pause()
        elif state == "ForceOff":
            if container.status == "paused":
                container.unpause()
            if container.status != "exited":
                container.kill()
        else:
            raise error.NotSupportedError(f"this BMC does not know {state}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lab", required=True)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    given = parser.parse_args()
    systems = Containers(given.lab, given.folder)
    emulator.Application.systems = property(lambda _: systems)
    auth = {"SUSHY_EMULATOR_AUTH_FILE": str(given.folder / "htpasswd")}
    emulator.app.configure(extra_config={**auth, "SUSHY_EMULATOR_STATE_DIR": str(given.folder)})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(given.folder / "crt", given.folder / "key")
    emulator.app.run(host=given.listen, port=given.port, ssl_context=context, threaded=True)


if __name__ == "__main__":
    main()
