"""Switches: real packets, a real child process, and a BMC that speaks Redfish over TLS."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clusterkit.errors import UsageError
from clusterkit.fleet.config import PowerConfig, read_config
from clusterkit.fleet.power import NoPower, PowerError, Switches, backend
from clusterkit.fleet.power.base import read_credentials
from clusterkit.fleet.power.wol import magic_packet
from tests.support import certificate

PASSWORD = "s3cret-word"


@pytest.fixture
def credentials(tmp_path: Path) -> str:
    path = tmp_path / "bmc.json"
    path.write_text(json.dumps({"user": "admin", "password": PASSWORD}))
    path.chmod(0o600)
    return str(path)


# --------------------------------------------------------------------------- credentials


def test_credentials_are_read_from_a_file_that_is_closed(credentials: str) -> None:
    assert read_credentials(credentials) == ("admin", PASSWORD)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_credentials_that_others_may_read_are_not_used(credentials: str, mode: int) -> None:
    os.chmod(credentials, mode)
    with pytest.raises(PowerError, match="others may read") as refused:
        read_credentials(credentials)
    assert "chmod 0600" in str(refused.value.hint)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_credentials_of_somebody_else_are_not_used(credentials: str) -> None:
    os.chown(credentials, 65534, -1)
    with pytest.raises(PowerError, match="others may read"):
        read_credentials(credentials)


@pytest.mark.parametrize("text", ["", "{}", '{"user": "admin"}', f'{{"password": "{PASSWORD}"', "[1]"])
def test_a_broken_file_of_credentials_is_told_without_its_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bmc.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(PowerError, match="no user and password in") as refused:
        read_credentials(str(path))
    assert PASSWORD not in str(refused.value)
    with pytest.raises(PowerError, match="FileNotFoundError"):
        read_credentials(str(tmp_path / "none"))


# --------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("power", "words"),
    [
        ({"kind": "wol"}, "needs mac"),
        ({"kind": "wol", "mac": "02:00"}, "mac"),
        ({"kind": "ipmi", "address": "bmc"}, "needs credentials"),
        ({"kind": "redfish", "credentials": "/x"}, "needs address"),
        ({"kind": "redfish", "credentials": "/x", "address": "http://bmc"}, "https://"),
        ({"kind": "magic"}, "kind"),
    ],
)
def test_power_that_cannot_work_is_refused(tmp_path: Path, power: dict[str, Any], words: str) -> None:
    config = {
        "cluster": "x",
        "socket": "/s",
        "record": "/r",
        "ssh": {"identity": "/i", "known_hosts": "/k", "control_dir": "/c"},
        "pools": {"p": {"max": 1}},
        "hosts": {"w1": {"address": "w1", "node_ip": "192.0.2.1", "pool": "p", "power": power}},
    }
    path = tmp_path / "fleet.json"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"hosts\.w1\.power") as refused:
        read_config(str(path))
    assert words in str(refused.value)


def test_a_host_that_people_switch() -> None:
    power = backend(PowerConfig())
    assert isinstance(power, NoPower)
    assert (power.can_switch, power.reports, power.state()) == (False, False, None)
    with pytest.raises(PowerError, match="no power control"):
        power.on()


# --------------------------------------------------------------------------- Wake-on-LAN


def test_a_magic_packet_arrives() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(10)
        config = PowerConfig(kind="wol", mac="02:00:00:AA:bb:02", broadcast="127.0.0.1", port=listener.getsockname()[1])
        power = backend(config)
        power.on()
        packet = listener.recv(1024)
    assert packet == b"\xff" * 6 + b"\x02\x00\x00\xaa\xbb\x02" * 16
    assert packet == magic_packet("02-00-00-aa-bb-02")
    assert (power.can_switch, power.reports, power.state()) == (True, False, None)
    with pytest.raises(PowerError, match="switches nothing off"):
        power.off()


# --------------------------------------------------------------------------- IPMI

IPMITOOL = """#!/bin/sh
echo "$*" >> FOLDER/argv
[ "$IPMI_PASSWORD" = "s3cret-word" ] || { echo "Error: wrong password $IPMI_PASSWORD" >&2; exit 1; }
for word; do :; done
[ -e FOLDER/hang ] && exec sleep 1000
[ -e FOLDER/fail ] && { echo "Error in open session response message: $IPMI_PASSWORD" >&2; exit 1; }
[ $word = on ] && touch FOLDER/on
[ $word = off ] && rm -f FOLDER/on
if [ -e FOLDER/on ]; then echo "Chassis Power is on"; else echo "Chassis Power is off"; fi
"""


@pytest.fixture
def ipmitool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "ipmitool").write_text(IPMITOOL.replace("FOLDER", str(folder)))
    (folder / "ipmitool").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def ipmi(credentials: str, timeout_s: float = 20) -> PowerConfig:
    return PowerConfig(kind="ipmi", address="192.0.2.99", credentials=credentials, timeout_s=timeout_s)


def test_ipmi_switches_and_the_password_stays_out_of_argv(ipmitool: Path, credentials: str) -> None:
    power = backend(ipmi(credentials))
    assert power.state() == "off"
    power.on()
    assert power.state() == "on"
    power.off()
    assert power.state() == "off"
    said = (ipmitool / "argv").read_text()
    assert said.splitlines()[1] == "-I lanplus -H 192.0.2.99 -U admin -E chassis power on"
    assert PASSWORD not in said


def test_what_ipmitool_says_is_told_without_the_password(ipmitool: Path, credentials: str) -> None:
    (ipmitool / "fail").touch()
    with pytest.raises(PowerError, match="Error in open session") as refused:
        backend(ipmi(credentials)).on()
    assert PASSWORD not in str(refused.value)


def test_a_bmc_that_hangs_ends_at_its_deadline(ipmitool: Path, credentials: str) -> None:
    (ipmitool / "hang").touch()
    with pytest.raises(PowerError, match=r"did not answer in 0\.5 s"):
        backend(ipmi(credentials, 0.5)).state()


def test_without_ipmitool(tmp_path: Path, credentials: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PowerError, match="not installed"):
        backend(ipmi(credentials)).state()


def test_one_bmc_that_hangs_delays_no_other(ipmitool: Path, credentials: str) -> None:
    async def run() -> float:
        switches = Switches()
        hung, well = switches.of(ipmi(credentials, 3)), switches.of(PowerConfig())
        began = time.monotonic()
        waiting = asyncio.create_task(hung.state())
        assert await well.state() is None
        quick = time.monotonic() - began
        with pytest.raises(PowerError):
            await waiting
        switches.close()
        return quick

    (ipmitool / "hang").touch()
    assert asyncio.run(run()) < 2


# --------------------------------------------------------------------------- Redfish


class ConstructedBmc(BaseHTTPRequestHandler):
    """As little of a BMC as sushy asks for; made from DMTF's DSP0266 and sushy's own reading of it."""

    power = "Off"
    broken = False
    posted: list[str]

    def answer(self, body: dict[str, Any] | None, status: int = 200) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(500 if self.broken else status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def known(self) -> bool:
        sent = self.headers.get("Authorization", "")
        if sent == "Basic " + base64.b64encode(f"admin:{PASSWORD}".encode()).decode():
            return True
        self.answer({"error": {"code": "Base.1.0.GeneralError", "message": "who are you"}}, 401)
        return False

    def do_GET(self) -> None:
        path = self.path.rstrip("/")
        if path == "/redfish/v1":
            root = {"Id": "RootService", "Name": "x", "RedfishVersion": "1.6.0", "UUID": "1", "@odata.id": path}
            self.answer({**root, "Systems": {"@odata.id": "/redfish/v1/Systems"}})
        elif not self.known():
            return
        elif path == "/redfish/v1/Systems":
            self.answer({"Name": "x", "Members": [{"@odata.id": "/redfish/v1/Systems/1"}]})
        else:
            reset = {"target": f"{path}/Actions/ComputerSystem.Reset"}
            allowed = {"ResetType@Redfish.AllowableValues": ["On", "ForceOff"]}
            system = {"Id": "1", "Name": "x", "@odata.id": path, "PowerState": type(self).power}
            self.answer({**system, "Actions": {"#ComputerSystem.Reset": {**reset, **allowed}}})

    def do_POST(self) -> None:
        data = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.known():
            self.posted.append(data["ResetType"])
            type(self).power = "On" if data["ResetType"] == "On" else "Off"
            self.answer(None, 204)

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture
def bmc(tmp_path: Path) -> Iterator[tuple[type[ConstructedBmc], str, str]]:
    """(what it does, its address, its certificate)"""
    pytest.importorskip("sushy", reason="sushy is not in this environment")
    kind = type("Bmc", (ConstructedBmc,), {"posted": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate(tmp_path, "bmc"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield kind, f"https://127.0.0.1:{server.server_address[1]}", str(tmp_path / "crt")
    server.shutdown()
    thread.join()
    server.server_close()


def redfish(address: str, credentials: str, ca: str | None) -> PowerConfig:
    return PowerConfig(kind="redfish", address=address, credentials=credentials, ca=ca, timeout_s=10)


def test_redfish_switches(bmc: tuple[type[ConstructedBmc], str, str], credentials: str) -> None:
    kind, address, ca = bmc
    power = backend(redfish(address, credentials, ca))
    assert power.state() == "off"
    power.on()
    power.on()
    assert (power.state(), kind.posted) == ("on", ["On"]), "some BMCs refuse On when on"
    power.off()
    power.off()
    assert (power.state(), kind.posted) == ("off", ["On", "ForceOff"])


def test_a_certificate_that_is_not_trusted_gets_no_password(
    bmc: tuple[type[ConstructedBmc], str, str], credentials: str, tmp_path: Path
) -> None:
    kind, address, _ = bmc
    certificate(tmp_path / "other", "other")
    for ca in (None, str(tmp_path / "other/crt")):
        with pytest.raises(PowerError, match=r"(?i)certificate"):
            backend(redfish(address, credentials, ca)).on()
    assert kind.posted == []


def test_a_bmc_that_answers_500_and_one_that_knows_us_not(
    bmc: tuple[type[ConstructedBmc], str, str], credentials: str
) -> None:
    kind, address, ca = bmc
    power = backend(redfish(address, credentials, ca))
    kind.broken = True
    with pytest.raises(PowerError, match="500") as refused:
        power.on()
    assert PASSWORD not in str(refused.value)
    kind.broken = False
    Path(credentials).write_text(json.dumps({"user": "admin", "password": "old"}))
    with pytest.raises(PowerError) as refused:
        power.state()
    assert "old" not in str(refused.value)
    assert kind.posted == []


def test_a_bmc_that_is_not_there(credentials: str) -> None:
    pytest.importorskip("sushy", reason="sushy is not in this environment")
    with pytest.raises(PowerError, match="the BMC https://127"):
        backend(redfish("https://127.0.0.1:1", credentials, None)).state()


def test_without_sushy(credentials: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sushy", None)
    with pytest.raises(PowerError, match="sushy is not installed"):
        backend(redfish("https://127.0.0.1:1", credentials, None)).state()


@pytest.mark.slow
def test_redfish_against_openstack_s_emulator(tmp_path: Path, credentials: str) -> None:
    """Its fake systems take up to eleven seconds to change."""
    pytest.importorskip("sushy", reason="sushy is not in this environment")
    pytest.importorskip("sushy_tools", reason="sushy-tools are not in this environment")
    certificate(tmp_path, "bmc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "emulator.conf"
    config.write_text(f"SUSHY_EMULATOR_STATE_DIR = {str(tmp_path)!r}\n")
    program = Path(sys.executable).with_name("sushy-emulator")
    words = [str(program), "--config", str(config), "--fake", "-i", "127.0.0.1", "-p", str(port)]
    words += ["--ssl-certificate", str(tmp_path / "crt"), "--ssl-key", str(tmp_path / "key")]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        power = backend(redfish(f"https://127.0.0.1:{port}", credentials, str(tmp_path / "crt")))

        def becomes(state: str) -> bool:
            end = time.monotonic() + 60
            while time.monotonic() < end:
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    if power.state() == state:
                        return True
                except PowerError:
                    pass  # it has not come up yet
                time.sleep(0.2)
            return False

        assert becomes("off"), (tmp_path / "log").read_text()
        power.on()
        assert becomes("on")
        power.on()
        power.off()
        assert becomes("off")
    finally:
        process.terminate()
        process.wait()
