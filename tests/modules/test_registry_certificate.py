"""registry_certificate: a real openssl makes them; what keeps one, and what makes another."""

from __future__ import annotations

import grp
import os
import shutil
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest

from tests.modules.conftest import load_module
from tests.modules.conftest import run_module as call

pytestmark = pytest.mark.skipif(not shutil.which("openssl"), reason="makes certificates: needs openssl")

Json = dict[str, Any]

module = load_module("registry_certificate")


def make(folder: Path, *, check: bool = False, **more: Any) -> Json:
    given = {"addresses": ["192.0.2.10", "2001:db8::a"], "names": ["reg"], "group": grp.getgrgid(os.getgid()).gr_name}
    files = {"certificate": str(folder / "tls.crt"), "key": str(folder / "tls.key")}
    return call(module, check=check, **{**files, **given, **more})


def test_it_is_made_once_and_kept(tmp_path: Path) -> None:
    planned = make(tmp_path, check=True)
    assert (planned["changed"], list(tmp_path.iterdir())) == (True, [])
    (change,) = make(tmp_path)["changes"]
    assert (change["actual"], change["wanted"]) == ("missing", "one for IP:192.0.2.10, IP:2001:db8::a, DNS:reg")
    assert stat.S_IMODE((tmp_path / "tls.key").stat().st_mode) == 0o640
    made = (tmp_path / "tls.crt").read_text()
    assert make(tmp_path)["changed"] is False
    assert make(tmp_path, addresses=["192.0.2.10"], names=[])["changed"] is False, "fewer names than it has"
    assert (tmp_path / "tls.crt").read_text() == made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tls.crt", "tls.key"]


def test_clients_take_it_for_its_addresses(tmp_path: Path) -> None:
    """As strictly as Python 3.13 does by default, which is more than dockerd asks for."""
    make(tmp_path, addresses=["192.0.2.10"])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
    client = ssl.create_default_context(cafile=str(tmp_path / "tls.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    for name, fits in (("192.0.2.10", True), ("reg", True), ("192.0.2.11", False)):
        assert shaken(server, client, name) is fits, name


def shaken(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bool:
    """Whether a client that asks for this name takes the server's certificate."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = client.wrap_bio(down, up, server_hostname=name)
    other = server.wrap_bio(up, down, server_side=True)
    for _ in range(4):
        for side in (one, other):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return one.version() is not None


def test_what_does_not_fit_is_made_anew(tmp_path: Path) -> None:
    make(tmp_path)
    (change,) = make(tmp_path, addresses=["192.0.2.99"])["changes"]
    assert change["actual"] == "not for IP:192.0.2.99"
    # As a run leaves them that was cut between the two.
    key = (tmp_path / "tls.key").read_bytes()
    make(tmp_path, addresses=["192.0.2.98"])
    (tmp_path / "tls.key").write_bytes(key)
    (change,) = make(tmp_path, addresses=["192.0.2.98"])["changes"]
    assert change["actual"] == "not the key's"
    make(tmp_path, addresses=["192.0.2.97"], days=29)
    (change,) = make(tmp_path, addresses=["192.0.2.97"])["changes"]
    assert change["actual"] == "about to end"
    assert make(tmp_path, addresses=["192.0.2.97"])["changed"] is False


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    assert "no group nobodys-group" in make(tmp_path, group="nobodys-group")["msg"]
    assert "'reg' does not appear to be an IPv4 or IPv6 address" in make(tmp_path, addresses=["reg"])["msg"]
    assert "/none/" in make(tmp_path / "none")["msg"]
