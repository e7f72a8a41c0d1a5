"""registry_server: whether a registry answers. Real systemd: tests/roles/test_registry_role.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.modules.conftest import load_module
from tests.support import certificate
from tests.unit.registry_server import Registry

module = load_module("registry_server")


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate: needs openssl")
def test_it_answers_to_who_trusts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = certificate(tmp_path, "x")
    # A proxy of the environment would be asked, and is not there.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server, plain = Registry(*files), Registry()
    try:
        url = f"https://{server.address}"
        assert module.silence(url, str(files[0])) == ""
        assert "certificate" in module.silence(url, None)
        assert module.silence(f"http://{plain.address}", None) == ""
        assert module.silence(f"https://{plain.address}", str(files[0])) != ""
    finally:
        server.close()
        plain.close()
    assert "refused" in module.silence(url, str(files[0]))
